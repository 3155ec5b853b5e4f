"""``cuattn cache list``, ``cuattn cache clear`` and ``cuattn precompile``: kernels on disk."""

import argparse
import time
from typing import Any

from cuattn import env
from cuattn.bench.options import positive
from cuattn.config import ARCHITECTURES, DTYPES, HEAD_DIMS, MASKS
from cuattn.reporting import Table, counted, make_reporter


def add_commands(commands: Any) -> None:
    cache = commands.add_parser("cache", help="list or clear the compiled kernels on disk")
    actions = cache.add_subparsers(title="actions", metavar="ACTION", required=True)
    actions.add_parser("list", help="compiled kernels, their size and age").set_defaults(run=list_cache)
    actions.add_parser("clear", help="remove them all").set_defaults(run=clear_cache)

    precompile = commands.add_parser(
        "precompile", help="compile kernels ahead of time", description="Compile kernels ahead of time; needs no GPU."
    )
    precompile.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, help="default: all")
    precompile.add_argument(
        "--value-dim", type=int, nargs="+", choices=HEAD_DIMS, help="head dims of values; default: the --head-dim"
    )
    precompile.add_argument("--mask", nargs="+", choices=MASKS, help="default: all")
    precompile.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all")
    precompile.add_argument(
        "--arch",
        nargs="+",
        choices=list(ARCHITECTURES),
        help="default: those of the devices present; without one, that of each compute capability",
    )
    precompile.add_argument("--jobs", type=positive, help="kernels compiled at a time; default: one a core")
    precompile.set_defaults(run=run_precompile)


def list_cache(arguments: argparse.Namespace) -> int:
    from cuattn.jit import ArtifactCache

    entries = ArtifactCache(env.cache_dir()).entries()
    reporter = make_reporter()
    if entries:
        rows = [
            (entry.name, kibibytes(entry.size), entry.created, "yes" if entry.intact else "no, built anew on use")
            for entry in entries
        ]
        reporter.table(Table("", ("kernel", "size", "built (UTC)", "intact"), rows, [e.intact for e in entries]))
    total = kibibytes(sum(entry.size for entry in entries))
    reporter.line(f"{counted(len(entries), 'file')}, {total}, in {env.cache_dir()}")
    return 0


def clear_cache(arguments: argparse.Namespace) -> int:
    from cuattn.jit import ArtifactCache

    removed = ArtifactCache(env.cache_dir()).clear()
    make_reporter().line(f"{counted(removed, 'file')} removed from {env.cache_dir()}")
    return 0


def run_precompile(arguments: argparse.Namespace) -> int:
    from cuattn.jit import Precompiled, precompile

    reporter = make_reporter()

    def show(done: int, total: int, kernel: Precompiled) -> None:
        took = "was there" if kernel.from_cache else f"{kernel.seconds:.1f} s"
        reporter.line(f"[{done}/{total}] {kernel.config.name}: {took}")

    start = time.perf_counter()
    kernels = precompile(
        arguments.head_dim,
        arguments.mask,
        arguments.dtype,
        arguments.arch,
        value_dims=arguments.value_dim,
        jobs=arguments.jobs,
        progress=show,
    )
    seconds = time.perf_counter() - start
    reporter.line(f"{counted(len(kernels), 'kernel')} in {seconds:.1f} s, in {env.cache_dir()}", good=True)
    return 0


def kibibytes(size: int) -> str:
    return f"{size / 1024:.0f} KiB"
