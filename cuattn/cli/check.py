"""``cuattn check``: the promise and the accuracy of attention and its gradients, examined on this machine."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from cuattn import __version__
from cuattn import backend as backends
from cuattn.api import attention as dense_attention
from cuattn.api import attention_varlen
from cuattn.cache import attention_kvcache
from cuattn.cli import libraries, machine
from cuattn.config import ARCHITECTURES, DTYPES
from cuattn.gradients import attention_backward, attention_varlen_backward
from cuattn.partials import attention_partials, chunk_starts, combine
from cuattn.reporting import Reporter, Table, counted, make_reporter
from cuattn.testing import (
    GRADIENT_CHECKS,
    Accuracy,
    GradientAccuracy,
    Library,
    TrialResult,
    accuracy_cases,
    gradient_accuracy_cases,
    measure_accuracy,
    measure_gradient_accuracy,
    plan_sweep,
    run_gradient_sweep,
    run_sweep,
    standard_cases,
    with_cache,
    with_packed,
    with_packed_gradients,
    with_shards,
)
from cuattn.testing.cases import COMMON_HEAD_DIMS

A = TypeVar("A", Accuracy, GradientAccuracy)

#: What is examined.
attention = with_cache(with_packed(dense_attention, attention_varlen), attention_kvcache)
attention = with_shards(attention, attention_partials, combine, chunk_starts)
gradients = with_packed_gradients(attention_backward, attention_varlen_backward)
#: Failures that are printed in full; the rest is counted, and all are in the JSON.
SHOWN_FAILURES = 10


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check on this machine that bits do not depend on the batch, and the accuracy",
        description="Run the invariance sweep, its negative controls and the accuracy tables, of gradients too. "
        "Exit code 0 if all is well, 1 if not.",
    )
    parser.add_argument("--backend", choices=backends.NAMES, help="default: CUATTN_BACKEND, else auto: a GPU if any")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), help="what the emulator takes the part of")
    parser.add_argument("--library", choices=libraries.NAMES, help="whose arrays to use; default: what is installed")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all that the arrays can hold")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument(
        "--json", metavar="FILE", type=_report_file, help="also write all results as JSON; - for standard output"
    )
    parser.set_defaults(run=run, usage_error=parser.error)


def _report_file(path: str) -> str:
    if path != "-" and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise argparse.ArgumentTypeError(f"got {path!r}, expected a file in an existing folder")
    return path


@dataclass(frozen=True)
class Setting:
    """Where and with what the checks run."""

    backend: str
    arch: str | None
    library: Library
    dtypes: tuple[str, ...]
    quick: bool

    @property
    def variants(self) -> dict[str, Any]:
        """Which cases: as many and as large as the backend gets through in about a minute, or, where the emulator
        compiles each variant's kernels for the first time, in a few.
        """
        if self.backend == "cuda":
            return {"size": "small" if self.quick else "device", "dtypes": self.dtypes}
        if self.quick:
            return {"size": "tiny", "dtypes": self.dtypes[:1], "head_dims": COMMON_HEAD_DIMS[:1]}
        return {"size": "tiny", "dtypes": self.dtypes, "head_dims": COMMON_HEAD_DIMS}


def run(arguments: argparse.Namespace) -> int:
    try:
        setting = _setting(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))
    reporter = make_reporter(sys.stderr if arguments.json == "-" else sys.stdout)
    library = setting.library
    backend = " ".join(filter(None, (setting.backend, setting.arch)))
    reporter.line(f"cuattn {__version__}: backend {backend}, {library.name} arrays on {library.device}")
    for dtype in set(DTYPES) - set(library.dtypes()):
        reporter.line(f"without {dtype}, which {library.name} cannot hold: pip install ml_dtypes")
    with backends.use_backend(setting.backend, setting.arch):
        found = _examine(setting, reporter)
    passed = _report(reporter, found)
    if arguments.json:
        _write_json(arguments.json, setting, found, passed)
    return 0 if passed else 1


@dataclass(frozen=True)
class Found:
    """What the checks found."""

    sweep: Sequence[TrialResult]
    accuracy: Sequence[Accuracy]
    gradients: Sequence[GradientAccuracy]


def _examine(setting: Setting, reporter: Reporter) -> Found:
    library, variants = setting.library, setting.variants
    trials = plan_sweep(attention, standard_cases(**variants))
    gradient_trials = plan_sweep(gradients, standard_cases(**variants), GRADIENT_CHECKS)
    sweep = chain(
        run_sweep(attention, trials, library), run_gradient_sweep(gradients, attention, gradient_trials, library)
    )
    cases, gradient_cases = list(accuracy_cases(**variants)), list(gradient_accuracy_cases(**variants))
    accuracy = measure_accuracy(attention, cases, library)
    of_gradients = measure_gradient_accuracy(gradients, attention, gradient_cases, library)
    return Found(
        list(reporter.track(sweep, len(trials) + len(gradient_trials), "invariance")),
        list(reporter.track(accuracy, len(cases), "accuracy")),
        list(reporter.track(of_gradients, len(gradient_cases), "accuracy of gradients")),
    )


def _setting(arguments: argparse.Namespace) -> Setting:
    """Raises ValueError for arguments that do not go together."""
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
    dtypes = tuple(arguments.dtype or library.dtypes())
    for dtype in dtypes:
        if dtype not in library.dtypes():
            raise ValueError(f"--dtype: got {dtype}, which {library.name} cannot hold: pip install ml_dtypes")
    return Setting(backend, arch, library, dtypes, arguments.quick)


def _report(reporter: Reporter, found: Found) -> bool:
    """Print the tables and the verdict; returns it."""
    sweep = found.sweep
    measured: dict[str, Sequence[Accuracy | GradientAccuracy]] = {
        "accuracy": found.accuracy,
        "accuracy of gradients": found.gradients,
    }
    reporter.table(_sweep_table(sweep))
    reporter.table(_accuracy_table(found.accuracy))
    reporter.table(_gradient_table(found.gradients))
    failures = [
        f"{'negative control of ' * r.trial.control}{r.trial.check.name}, {r.trial.case}: {r.detail}"
        for r in sweep
        if not r.passed
    ]
    for name, results in measured.items():
        failures += [f"{name}, {a.case}: {'; '.join(a.failures)}" for a in results if not a.passed]
    for failure in failures[:SHOWN_FAILURES]:
        reporter.line(failure, good=False)
    if len(failures) > SHOWN_FAILURES:
        reporter.line(f"and {counted(len(failures) - SHOWN_FAILURES, 'more failure')}", good=False)

    trials = [r for r in sweep if not r.trial.control]
    checks = {r.trial.check.name for r in sweep}
    found_out = sum(r.passed for r in sweep if r.trial.control)
    counts = (
        ("invariance: {} of {} trials passed", sum(r.passed for r in trials), len(trials)),
        *(
            (f"{name}: {{}} of {{}} cases passed", sum(a.passed for a in results), len(results))
            for name, results in measured.items()
        ),
        ("negative control: {} of {} checks failed as they must", found_out, len(checks)),
    )
    for text, good, total in counts:
        reporter.line(text.format(good, total), good=good == total)
    return all(good == total for _, good, total in counts)


def _sweep_table(sweep: Sequence[TrialResult]) -> Table:
    rows, good = [], []
    for name in dict.fromkeys(r.trial.check.name for r in sweep):
        mine = [r for r in sweep if r.trial.check.name == name]
        plain = [r for r in mine if not r.trial.control]
        control = [r.passed for r in mine if r.trial.control]
        passed = sum(r.passed for r in plain)
        verdict = "not run" if not control else "failed, as it must" if all(control) else "PASSED"
        rows.append((name, f"{passed} of {len(plain)}", verdict, f"{sum(r.seconds for r in mine):.1f}"))
        good.append(passed == len(plain) and control == [True])
    return Table("Invariance, raw bits", ("what varies", "passed", "negative control", "seconds"), rows, good)


def _accuracy_table(accuracy: Sequence[Accuracy]) -> Table:
    """A row for each dtype and family of inputs: of its cases the worst."""
    groups = _by_inputs(accuracy)
    worst = [max(group, key=lambda a: (not a.passed, a.ratio)) for group in groups.values()]
    rows = [
        (
            *group,
            f"{a.case.dims} {a.case.mask}",
            *_errors(a.error, a.peer_error, a.ratio, a.worst_element),
            f"{a.lse_error:.0e}",
        )
        for group, a in zip(groups, worst, strict=True)
    ]
    columns = ("dtype", "inputs", "worst case", "rel-L2", "peer's", "ratio", "element", "LSE")
    title = "Accuracy against float64, the worst case of each family of inputs"
    return Table(title, columns, rows, [a.passed for a in worst])


def _gradient_table(accuracy: Sequence[GradientAccuracy]) -> Table:
    """The same for gradients, and of each case the worst one."""
    groups = _by_inputs(accuracy)
    worst = [max(group, key=lambda a: (not a.passed, a.worst[1].ratio)) for group in groups.values()]
    rows = []
    for group, a in zip(groups, worst, strict=True):
        name, e = a.worst
        errors = _errors(e.error, e.peer_error, e.ratio, e.worst_element)
        rows.append((*group, f"{a.case.dims} {a.case.mask}", name, *errors))
    columns = ("dtype", "inputs", "worst case", "of", "rel-L2", "peer's", "ratio", "element")
    title = "Accuracy of gradients, the worst of each family of inputs"
    return Table(title, columns, rows, [a.passed for a in worst])


def _by_inputs(accuracy: Sequence[A]) -> dict[tuple[str, str], list[A]]:
    groups: dict[tuple[str, str], list[A]] = {}
    for result in accuracy:
        groups.setdefault((result.case.dtype, result.case.family), []).append(result)
    return groups


def _errors(error: float, peer_error: float, ratio: float, worst_element: float) -> tuple[str, ...]:
    return f"{error:.1e}", f"{peer_error:.1e}", f"{ratio:.2f}", f"{worst_element:.2f}"


def _write_json(path: str, setting: Setting, found: Found, passed: bool) -> None:
    report = {
        "passed": passed,
        "versions": machine.versions(),
        "devices": machine.devices(),
        "backend": setting.backend,
        "arch": setting.arch,
        "library": setting.library.name,
        "device": setting.library.device,
        "invariance": [
            {
                "check": r.trial.check.name,
                "case": asdict(r.trial.case),
                "control": r.trial.control,
                "passed": r.passed,
                "detail": r.detail,
                "seconds": round(r.seconds, 4),
            }
            for r in found.sweep
        ],
        "accuracy": [{**_finite(asdict(a)), "ratio": _finite(a.ratio), "passed": a.passed} for a in found.accuracy],
        "gradient_accuracy": [
            {
                "case": asdict(a.case),
                **{name: _finite({**asdict(e), "ratio": e.ratio}) for name, e in a.errors.items()},
                "failures": a.failures,
                "passed": a.passed,
            }
            for a in found.gradients
        ],
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """The value with None for every float that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
