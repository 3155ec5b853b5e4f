"""Four judgments of an operation: accuracy and invariance of its results, accuracy and invariance of its gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cuattn.config import DTYPES
from cuattn.testing.accuracy import measure_accuracy
from cuattn.testing.arrays import Library, NumpyLibrary
from cuattn.testing.cases import COMMON_HEAD_DIMS, HeadDim, accuracy_cases, gradient_accuracy_cases, standard_cases
from cuattn.testing.checks import CHECKS, GRADIENT_CHECKS, Check
from cuattn.testing.gradient_accuracy import measure_gradient_accuracy
from cuattn.testing.inputs import Case
from cuattn.testing.report import JUDGMENTS, Report, Row, short_name
from cuattn.testing.subject import Operation, accepts
from cuattn.testing.sweep import Trial, TrialResult, plan_sweep, run_gradient_sweep, run_sweep

#: Passes results on one by one, as they come: (results, their number, what they are of).
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Cases:
    """What an operation is examined on."""

    invariance: Sequence[Case]
    accuracy: Sequence[Case]
    gradient_accuracy: Sequence[Case]

    @classmethod
    def standard(
        cls,
        size: str = "tiny",
        dtypes: Sequence[str] = DTYPES,
        head_dims: Sequence[HeadDim] = COMMON_HEAD_DIMS,
        masks: Sequence[str] = ("causal", "full"),
    ) -> "Cases":
        """The cases of `standard_cases`, `accuracy_cases` and `gradient_accuracy_cases`."""
        generators = (standard_cases, accuracy_cases, gradient_accuracy_cases)
        return cls(*(tuple(generate(size, dtypes, head_dims, masks)) for generate in generators))


def judge(
    op: Operation,
    backward: Operation | None = None,
    *,
    judgments: Sequence[str] = JUDGMENTS,
    cases: Cases | None = None,
    library: Library | None = None,
    checks: Sequence[str] | None = None,
    runs: int | None = None,
    track: Track = lambda results, total, label: results,
) -> Report:
    """Examine an operation and give a verdict on each of the ``judgments``.

    op: ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``, as in `invariance_sweep`; without the keyword
        return_lse it returns out alone, and no LSE is judged.
    backward: ``backward(dout, q, k, v, out, lse, mask, scale=...) -> (dq, dk, dv)``, as in
        `assert_gradient_batch_invariant`; out and lse are those of ``op``.
    judgments: of JUDGMENTS. Each that is named here fails if there is no result, and so does each of its parts: an
        operation without ``backward`` fails the two of gradients.
    cases: default: `Cases.standard` of the dtypes that the library holds.
    library: makes the arrays; default: NumPy.
    checks: names of CHECKS and GRADIENT_CHECKS; default: those that the operation has the keywords for. A check that is
        named here is missing if it cannot be run; by default it is shown as skipped.
    runs: how often the check of repeated gradients asks for the same.
    track: gets each part's results, their number and a label, and passes them on: for a progress bar.

    An exception of an operation is a failed row; only a missing package and a kernel that does not compile are raised.
    Raises ValueError for unknown names.
    """
    for argument, names, known in (
        ("judgments", judgments, JUDGMENTS),
        ("checks", checks or (), [check.name for check in (*CHECKS, *GRADIENT_CHECKS)]),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: got {name!r}, expected some of {', '.join(map(repr, known))}")
    if not judgments:
        raise ValueError("judgments: got none, expected at least one")
    library = library or NumpyLibrary()
    cases = cases or Cases.standard(dtypes=library.dtypes())
    found: dict[str, list[Any]] = {}
    others: list[Row] = []
    for judgment in dict.fromkeys(judgments):
        if judgment == "forward accuracy":
            part = _measured(judgment, cases.accuracy, measure_accuracy(op, cases.accuracy, library))
        elif judgment == "forward invariance":
            part = _swept(judgment, op, CHECKS, checks, cases.invariance, partial(run_sweep, op, library=library))
        elif backward is None:
            part = _Part([Row(judgment, "gradients", "missing", "no gradient operation was given")], iter(()))
        elif judgment == "gradient accuracy":
            own = cases.gradient_accuracy
            part = _measured(judgment, own, measure_gradient_accuracy(backward, op, own, library))
        else:
            run = partial(run_gradient_sweep, backward, op, library=library, runs=runs)
            part = _swept(judgment, backward, GRADIENT_CHECKS, checks, cases.invariance, run)
        found[judgment] = list(track(part.results, len(part.asked), judgment))
        others += [*part.asked[len(found[judgment]) :], *part.others]
    accuracy, sweep, gradients, gradient_sweep = (found.get(name, ()) for name in JUDGMENTS)
    return Report(tuple(found), sweep, gradient_sweep, accuracy, gradients, others)


@dataclass(frozen=True)
class _Part:
    """What one judgment takes.

    asked: in the order of the results, the row that stands for each if it does not come; others: what cannot be run.
    """

    asked: Sequence[Row]
    results: Iterator[Any]
    others: Sequence[Row] = ()


def _measured(judgment: str, cases: Sequence[Case], results: Iterator[Any]) -> _Part:
    others = [] if cases else [Row(judgment, "cases", "missing", "there are none")]
    return _Part([_missing(judgment, str(case)) for case in cases], results, others)


def _swept(
    judgment: str,
    op: Operation,
    known: Sequence[Check],
    names: Sequence[str] | None,
    cases: Sequence[Case],
    run: Callable[[Sequence[Trial]], Iterator[TrialResult]],
) -> _Part:
    checks = [check for check in known if names is None or check.name in names]
    trials = plan_sweep(op, cases, checks)
    planned = {(trial.check.name, trial.control) for trial in trials}
    others = [] if checks else [Row(judgment, "checks", "missing", "none of those that were named")]
    for check in checks:
        name = short_name(check)
        if check.keyword is not None and not accepts(op, check.keyword):
            outcome = "skipped" if names is None else "missing"
            others.append(Row(judgment, name, outcome, f"the operation has no keyword {check.keyword}"))
        elif (check.name, False) not in planned:
            others.append(Row(judgment, name, "missing", "no case that it applies to"))
        elif (check.name, True) not in planned:
            others.append(Row(judgment, name, "missing", "no case with keys and rows enough", control=True))
    asked = [_missing(judgment, f"{short_name(t.check)}, {t.case}", t.control) for t in trials]
    return _Part(asked, run(trials), others)


def _missing(judgment: str, name: str, control: bool = False) -> Row:
    return Row(judgment, name, "missing", "no result", control=control)
