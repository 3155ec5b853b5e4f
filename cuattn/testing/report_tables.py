"""A report as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from cuattn.reporting import Table
from cuattn.testing.accuracy import Accuracy
from cuattn.testing.gradient_accuracy import GradientAccuracy
from cuattn.testing.sweep import TrialResult

if TYPE_CHECKING:
    from cuattn.testing.report import Report

A = TypeVar("A", Accuracy, GradientAccuracy)


def tables(report: Report) -> list[Table]:
    """Those of what has results."""
    made = []
    if report.sweep or report.gradient_sweep:
        made.append(_sweep_table([*report.sweep, *report.gradient_sweep]))
    if report.accuracy:
        made.append(_accuracy_table(report.accuracy))
    if report.gradients:
        made.append(_gradient_table(report.gradients))
    return made


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
            "none" if a.lse_error is None else f"{a.lse_error:.0e}",
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
