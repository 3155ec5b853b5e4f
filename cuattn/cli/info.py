"""``cuattn info``: versions, devices, backend, folders."""

import argparse
from typing import Any

from cuattn import backend as backends
from cuattn import env, machine
from cuattn.cli.kernels import kibibytes
from cuattn.reporting import Table, counted, make_reporter


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("info", help="print versions, devices, backend and folders")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from cuattn.jit import ArtifactCache

    entries = ArtifactCache(env.cache_dir()).entries()
    devices = machine.devices()
    facts = [
        *machine.versions().items(),
        *(("device", device) for device in devices or ["no CUDA device that CuPy can use"]),
        ("backend", _backend(bool(devices))),
        ("kernel folder", str(env.kernel_dir())),
        ("cache folder", str(env.cache_dir())),
        ("cache", f"{counted(len(entries), 'file')}, {kibibytes(sum(entry.size for entry in entries))}"),
    ]
    make_reporter().table(Table("cuattn", ("", ""), facts))
    return 0


def _backend(has_device: bool) -> str:
    chosen = backends.active()
    if chosen.name != "auto":
        return f"{':'.join(filter(None, (chosen.name, chosen.arch)))} ({env.BACKEND})"
    return "cuda for CUDA arrays, reference for CPU arrays" if has_device else "reference, on the CPU"
