"""``cuattn check``: the promise and the accuracy of attention and its gradients, examined on this machine."""

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuattn import __version__, machine
from cuattn import backend as backends
from cuattn.api import attention as dense_attention
from cuattn.api import attention_varlen
from cuattn.cache import attention_kvcache
from cuattn.cli import libraries
from cuattn.cli.arguments import output_file, output_file_or_standard
from cuattn.cli.operations import AUTOGRAD, CONVENTIONS, load_attention, load_gradients
from cuattn.config import ARCHITECTURES, DTYPES
from cuattn.gradients import attention_backward, attention_varlen_backward
from cuattn.jit import precompile
from cuattn.partials import attention_partials, chunk_starts, combine
from cuattn.reporting import Reporter, make_reporter
from cuattn.testing import (
    FORWARD,
    JUDGMENTS,
    Cases,
    Library,
    judge,
    with_cache,
    with_packed,
    with_packed_gradients,
    with_shards,
)
from cuattn.testing.cases import COMMON_HEAD_DIMS
from cuattn.testing.subject import Operation, returns_lse

#: What is examined where no other operation is named.
attention = with_cache(with_packed(dense_attention, attention_varlen), attention_kvcache)
attention = with_shards(attention, attention_partials, combine, chunk_starts)
gradients = with_packed_gradients(attention_backward, attention_varlen_backward)


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check on this machine that bits do not depend on the batch, and the accuracy",
        description="Judge the accuracy and the invariance of attention and of its gradients, with negative controls: "
        "cuattn's own, or another operation's. Exit code 0 if all is well, 1 if not, 2 for wrong usage.",
    )
    parser.add_argument("--backend", choices=backends.NAMES, help="default: CUATTN_BACKEND, else auto: a GPU if any")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), help="what the emulator takes the part of")
    parser.add_argument("--library", choices=libraries.NAMES, help="whose arrays to use; default: what is installed")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all that the arrays can hold")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--forward-only", action="store_true", help="do not ask for gradients")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=output_file_or_standard,
        help="also write all results as JSON; - for standard output",
    )
    parser.add_argument("--junit", metavar="FILE", type=output_file, help="also write all results as JUnit XML")
    others = parser.add_argument_group("another operation")
    others.add_argument("--op", metavar="MODULE:FUNCTION", help="what to examine; see docs/testing.md")
    others.add_argument(
        "--backward",
        metavar="MODULE:FUNCTION",
        help=f"its gradients, or {AUTOGRAD}: by torch; without them, and without --forward-only, two judgments fail",
    )
    forms = "; ".join(f"{name}: {form}" for name, (_, form) in CONVENTIONS.items())
    others.add_argument("--convention", choices=CONVENTIONS, help=f"how it is called, default: cuattn. {forms}")
    others.add_argument("--device", help="cpu, cuda or cuda:INDEX; default: a GPU if the library finds one")
    parser.set_defaults(run=run, usage_error=parser.error)


@dataclass(frozen=True)
class Setting:
    """What is examined, where and with what. backend and arch: None for an operation that is not cuattn's."""

    name: str
    operation: Operation
    backward: Operation | None
    backend: str | None
    arch: str | None
    library: Library
    dtypes: tuple[str, ...]
    quick: bool
    judgments: tuple[str, ...]

    @property
    def variants(self) -> dict[str, Any]:
        """Which cases: as many and as large as the device gets through in about a minute, or, where the emulator
        compiles each variant's kernels for the first time, in a few.
        """
        if self.library.device != "cpu":
            return {"size": "small" if self.quick else "device", "dtypes": self.dtypes}
        if self.quick:
            return {"size": "tiny", "dtypes": self.dtypes[:1], "head_dims": COMMON_HEAD_DIMS[:1]}
        return {"size": "tiny", "dtypes": self.dtypes, "head_dims": COMMON_HEAD_DIMS}

    @property
    def place(self) -> contextlib.AbstractContextManager[None]:
        """Where calls run."""
        return contextlib.nullcontext() if self.backend is None else backends.use_backend(self.backend, self.arch)


def run(arguments: argparse.Namespace) -> int:
    try:
        setting = _setting(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))
    reporter = make_reporter(sys.stderr if arguments.json == "-" else sys.stdout)
    _introduce(reporter, setting)
    cases = Cases.standard(**setting.variants)
    if setting.backend == "cuda":
        _compile(reporter, cases)
    with setting.place:
        report = judge(
            setting.operation,
            setting.backward,
            judgments=setting.judgments,
            cases=cases,
            library=setting.library,
            track=reporter.track,
        )
    report.show(reporter)
    if arguments.json:
        text = report.to_json(
            operation=setting.name,
            versions=machine.versions(),
            devices=machine.devices(),
            backend=setting.backend,
            arch=setting.arch,
            library=setting.library.name,
            device=setting.library.device,
        )
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    if arguments.junit:
        Path(arguments.junit).write_text(report.to_junit(), encoding="utf-8")
    return 0 if report.ok else 1


def _introduce(reporter: Reporter, setting: Setting) -> None:
    library = setting.library
    arrays = f"{library.name} arrays on {library.device}"
    if setting.backend is None:
        reporter.line(f"cuattn {__version__}: {setting.name}, {arrays}")
        if not returns_lse(setting.operation):
            reporter.line("without return_lse: no LSE is judged")
    else:
        backend = " ".join(filter(None, (setting.backend, setting.arch)))
        reporter.line(f"cuattn {__version__}: backend {backend}, {arrays}")
    for dtype in set(DTYPES) - set(library.dtypes()):
        reporter.line(f"without {dtype}, which {library.name} cannot hold: pip install ml_dtypes")


def _compile(reporter: Reporter, cases: Cases) -> None:
    """All kernels of the cases at once, on all cores, rather than each where it is first needed."""
    start = time.monotonic()
    every = [*cases.invariance, *cases.accuracy, *cases.gradient_accuracy]
    chosen = ({getattr(case, name) for case in every} for name in ("head_dim", "mask", "dtype"))
    kernels = precompile(*map(sorted, chosen))
    reporter.line(f"{len(kernels)} kernels compiled or found in {time.monotonic() - start:.0f} s")


def _setting(arguments: argparse.Namespace) -> Setting:
    """Raises ValueError for arguments that do not go together."""
    if arguments.forward_only and arguments.backward:
        raise ValueError("--backward: got it with --forward-only, expected one of the two")
    judgments = FORWARD if arguments.forward_only else JUDGMENTS
    own = _own if arguments.op is None else _other
    name, operation, backward, backend, arch, library = own(arguments)
    dtypes = tuple(arguments.dtype or library.dtypes())
    for dtype in dtypes:
        if dtype not in library.dtypes():
            raise ValueError(f"--dtype: got {dtype}, which {library.name} cannot hold: pip install ml_dtypes")
    return Setting(name, operation, backward, backend, arch, library, dtypes, arguments.quick, judgments)


_Examined = tuple[str, Operation, Operation | None, str | None, str | None, Library]


def _own(arguments: argparse.Namespace) -> _Examined:
    for option in ("backward", "convention", "device"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option}: got it without --op, expected the two together")
    active = backends.active()
    backend = arguments.backend or active.name
    arch = arguments.arch or (active.arch if backend == active.name else None)
    if arch is None and backend == "emulator":
        arch = backends.DEFAULT_EMULATED_ARCH
    if arch is not None and backend != "emulator":
        raise ValueError(f"--arch: got {arch} for the backend {backend}, expected it with --backend emulator alone")
    library = libraries.choose(backend, arguments.library)
    if backend == "auto":
        backend = "reference" if library.device == "cpu" else "cuda"
    return "cuattn", attention, gradients, backend, arch, library


def _other(arguments: argparse.Namespace) -> _Examined:
    for option in ("backend", "arch"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option}: got it with --op, expected --device in its place")
    library = libraries.on_device(arguments.library, arguments.device)
    if arguments.backward == AUTOGRAD and library.name != "torch":
        raise ValueError(f"--backward: got {AUTOGRAD} for {library.name} arrays, expected it with --library torch")
    operation = load_attention(arguments.op, arguments.convention or "cuattn")
    backward = load_gradients(arguments.backward, operation) if arguments.backward else None
    return arguments.op, operation, backward, None, None, library
