"""The sweep: every check on every case, and once the negative control of every check."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cuattn.testing.arrays import Library, NumpyLibrary
from cuattn.testing.bitwise import BitwiseMismatch
from cuattn.testing.checks import CHECKS, GRADIENT_CHECKS, Check
from cuattn.testing.controls import CUTS, FIRST_CUT
from cuattn.testing.gradients import GradientSubject
from cuattn.testing.inputs import Case
from cuattn.testing.subject import FAILURES, INSURMOUNTABLE, BaseSubject, Operation, Subject, accepts

AnySubject = BaseSubject[Any]
MakeSubject = Callable[[Operation, Library, Case], AnySubject]


@dataclass(frozen=True)
class Trial:
    """A check to be run on a case; as a control, it must find the check's negative control out."""

    check: Check
    case: Case
    control: bool = False


@dataclass(frozen=True)
class TrialResult:
    """passed: the bits agree, or, for a control, they do not; detail: the first mismatch or the error."""

    trial: Trial
    passed: bool
    detail: str
    seconds: float


def plan_sweep(op: Operation, cases: Iterable[Case], checks: Sequence[Check] = CHECKS) -> list[Trial]:
    """The trials of a sweep: all checks that mean something for a case and that ``op`` has the keyword for.

    The control of a check comes right after the check's first case with keys enough for a control to act.
    """
    trials: list[Trial] = []
    controlled: set[str] = set()
    usable = [check for check in checks if check.keyword is None or accepts(op, check.keyword)]
    for case in cases:
        for check in usable:
            if not check.applies(case):
                continue
            trials.append(Trial(check, case))
            if check.name not in controlled and case.len_k >= FIRST_CUT + 2 * CUTS and case.len_q > 1:
                trials.append(Trial(check, case, control=True))
                controlled.add(check.name)
    return trials


def run_sweep(
    op: Operation, trials: Iterable[Trial], library: Library | None = None, subject: MakeSubject = Subject
) -> Iterator[TrialResult]:
    """Run the trials in order and yield each result when it is there.

    An exception of ``op`` is a failed trial; only a missing package and a kernel that does not compile end the sweep.
    ``library`` makes the arrays (default: NumPy). The plain result of a case is computed once for trials in a row.
    ``subject`` makes what the trials' checks examine, as of ``subject(op, library, case)``.
    """
    library = library or NumpyLibrary()
    plain: AnySubject | None = None
    for trial in trials:
        start = time.perf_counter()
        if plain is None or plain.case != trial.case:
            plain = subject(op, library, trial.case)
        examined = subject(trial.check.control(op), library, trial.case) if trial.control else plain
        passed, detail = _outcome(trial, examined)
        yield TrialResult(trial, passed, detail, time.perf_counter() - start)


def run_gradient_sweep(
    op: Operation,
    forward: Operation,
    trials: Iterable[Trial],
    library: Library | None = None,
    runs: int | None = None,
) -> Iterator[TrialResult]:
    """The same for trials of GRADIENT_CHECKS; the arguments are those of `assert_gradient_batch_invariant`."""
    return run_sweep(op, trials, library, partial(GradientSubject, forward, runs=runs))


def _outcome(trial: Trial, subject: AnySubject) -> tuple[bool, str]:
    try:
        trial.check.run(subject)
    except BitwiseMismatch as mismatch:
        return trial.control, str(mismatch)
    except INSURMOUNTABLE:
        raise
    except FAILURES as error:  # the sweep goes on, and shows it
        return False, f"{type(error).__name__}: {error}"
    return not trial.control, "a non-invariant operation passed" if trial.control else ""


def invariance_sweep(
    op: Operation, cases: Iterable[Case], library: Library | None = None, checks: Sequence[Check] = CHECKS
) -> Iterator[TrialResult]:
    """Plan and run: results one by one for ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``.

    q is (B, Hq, Lq, D), k is (B, Hkv, Lk, D), v is (B, Hkv, Lk, Dv), mask is "full" or "causal" (bottom-right aligned),
    LSE is fp32 (B, Hq, Lq). Keywords layout, num_splits, out, kv_lengths and key_padding_mask are checked where the
    operation has them, and so are those that `with_packed`, `with_cache` and `with_shards` add.
    """
    return run_sweep(op, plan_sweep(op, cases, checks), library)


def assert_invariant(
    op: Operation, cases: Iterable[Case], library: Library | None = None, checks: Sequence[Check] = CHECKS
) -> None:
    """Raises AssertionError with every failed trial of the sweep, the controls included."""
    _assert_passed(invariance_sweep(op, cases, library, checks))


def assert_gradient_batch_invariant(
    op: Operation,
    forward: Operation,
    cases: Iterable[Case],
    library: Library | None = None,
    checks: Sequence[Check] = GRADIENT_CHECKS,
    runs: int | None = None,
) -> None:
    """Raises AssertionError with every failed trial of a sweep over gradients, the controls included.

    op: ``op(dout, q, k, v, out, lse, mask, scale=...) -> (dq, dk, dv)``; dout and out are (B, Hq, Lq, Dv), lse is fp32
        (B, Hq, Lq), all else as in `invariance_sweep`, and gradients have the shapes of q, k and v. Keywords dlse,
        layout, kv_lengths and key_padding_mask are used where the operation has them, and so are those that
        `with_packed_gradients` adds.
    forward: ``forward(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``, where out and lse come from.
    runs: how often the check of repeated runs asks for the same; default 100 on a device and 4 on a CPU.

    A sequence has the same bits alone, in any batch and at any place of it, among sequences of NaN, packed, and padded
    with NaN in q, k, v, out and lse and zeros in dout and dlse; gradients of padding are +0.
    """
    trials = plan_sweep(op, cases, checks)
    _assert_passed(run_gradient_sweep(op, forward, trials, library, runs))


def _assert_passed(results: Iterable[TrialResult]) -> None:
    failed = [result for result in results if not result.passed]
    if failed:
        lines = (f"{r.trial.check.name}{' (control)' * r.trial.control}, {r.trial.case}: {r.detail}" for r in failed)
        raise AssertionError(f"{len(failed)} trials failed:\n" + "\n".join(lines))
