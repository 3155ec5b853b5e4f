"""Accuracy: the error against float64 in proportion to the error of a peer, on inputs that show errors.

The peer is what a framework computes without a fused kernel: inputs in low precision, scores and softmax in fp32,
weights rounded to the dtype, output rounded. The rules, with the `Limits` of the dtype:

- relative L2 error <= ``ratio`` times the peer's, which counts at least as ``floor``: rounding the output alone; on
  normal inputs also <= ``absolute``, where there is such a limit;
- each element: |out - gold| <= ``element`` times the peer's largest error + one unit in the last place of gold;
- each LSE: |lse - gold| <= ``lse_units`` fp32 units in the last place of the row's largest possible |score|;
- rows that see nothing: out is +0 and LSE is -inf.

An operation without the keyword return_lse has no LSE to be judged.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cuattn.reference.gold import gold_attention, visible_keys
from cuattn.testing.arrays import Library, NumpyLibrary, round_to_bits, values_of
from cuattn.testing.inputs import Case, Inputs
from cuattn.testing.limits import LIMITS
from cuattn.testing.subject import FAILURES, INSURMOUNTABLE, Operation, Result, Subject

T = TypeVar("T")

_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


def peer_attention(inputs: Inputs, dtype: str, mask: str, scale: float) -> NDArray[np.float32]:
    """The peer's output (B, Hq, Lq, Dv), fp32 values that are exact in ``dtype``."""
    q, k, v = (values_of(bits, dtype).astype(np.float32) for bits in (inputs.q, inputs.k, inputs.v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores, highest = peer_scores(q, k, mask, scale)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total > 0, total, np.float32(1))
    return rounded(rounded(weights, dtype) @ v, dtype)


def peer_scores(
    q: NDArray[np.float32], k: NDArray[np.float32], mask: str, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores (B, H, Lq, Lk), -inf where a key is not seen, and the largest of each row, or 0 if it sees none."""
    scores = np.float32(scale) * (q @ k.swapaxes(-1, -2))
    seen = np.arange(k.shape[2]) < visible_keys(q.shape[2], k.shape[2], mask)[:, None]
    scores = np.where(seen, scores, np.float32(-np.inf))
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    return scores, np.where(np.isfinite(highest), highest, np.float32(0))


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    return values_of(round_to_bits(values, dtype), dtype).astype(np.float32)


def relative_error(actual: NDArray[Any], gold: NDArray[np.float64]) -> float:
    """``|actual - gold| / |gold|`` in the Euclidean norm over all elements; 0 for 0 / 0."""
    norm = float(np.linalg.norm(gold))
    error = float(np.linalg.norm(actual.astype(np.float64) - gold))
    return error / norm if norm > 0 else error


def unit_of(gold: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """One unit in the last place of each value."""
    return LIMITS[dtype].epsilon * np.maximum(np.abs(gold), _SMALLEST_NORMAL[dtype])


@dataclass(frozen=True)
class Accuracy:
    """Measured errors of one case, each beside what is allowed."""

    case: Case
    error: float  # relative L2 against float64
    peer_error: float
    worst_element: float  # largest |out - gold| as a share of what its element is allowed
    lse_error: float | None  # largest |lse - gold|; None for an operation without LSE
    lse_allowed: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def ratio(self) -> float:
        return self.error / self.peer_error if self.peer_error > 0 else float(self.error > 0)


def judge_output(case: Case, inputs: Inputs, result: Result) -> Accuracy:
    """The errors of a result on the case's inputs."""
    limits = LIMITS[case.dtype]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    q, k, v = (values_of(bits, case.dtype).astype(np.float64) for bits in (inputs.q, inputs.k, inputs.v))
    gold, gold_lse = gold_attention(q, k, v, case.mask, scale)
    peer = peer_attention(inputs, case.dtype, case.mask, scale)
    values = values_of(result.out, case.dtype).astype(np.float64)

    error, peer_error = relative_error(values, gold), relative_error(peer, gold)
    allowed = limits.element * np.abs(peer - gold).max(initial=0.0) + unit_of(gold, case.dtype)
    worst_element = float((np.abs(values - gold) / allowed).max(initial=0.0))

    seen = np.isfinite(gold_lse)
    largest_score = abs(scale) * np.linalg.norm(q, axis=-1).max(initial=0.0) * np.linalg.norm(k, axis=-1).max(initial=0)
    lse_allowed = limits.lse_units * float(np.spacing(np.float32(max(1.0, largest_score))))
    lse_error = None

    failures = []
    # "not <=" and not ">": a NaN fails
    if not error <= limits.ratio * max(peer_error, limits.floor):
        failures.append(f"relative L2 error {error:.3g}, the peer's is {peer_error:.3g}")
    if limits.absolute is not None and case.family == "normal" and not error <= limits.absolute:
        failures.append(f"relative L2 error {error:.3g}, allowed {limits.absolute:.3g}")
    if not worst_element <= 1:
        failures.append(f"an element's error is {worst_element:.3g} times what is allowed")
    if result.lse is not None:
        logs = values_of(result.lse, "float32").astype(np.float64)
        lse_error = float(np.abs(logs[seen] - gold_lse[seen]).max(initial=0.0))
        if not lse_error <= lse_allowed:
            failures.append(f"LSE error {lse_error:.3g}, allowed {lse_allowed:.3g}")
        if not np.all(logs[~seen] == -np.inf):
            failures.append("the LSE of a row that sees no key is not -inf")
    if np.any(result.out[~seen]):
        failures.append("a row that sees no key is not +0")
    return Accuracy(case, error, peer_error, worst_element, lse_error, lse_allowed, tuple(failures))


def measure_accuracy(op: Operation, cases: Iterable[Case], library: Library | None = None) -> Iterator[Accuracy]:
    """Run ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)`` on each case and judge it, one by one.

    ``library`` makes the arrays (default: NumPy). An exception of ``op`` is a failed case; only a missing package and
    a kernel that does not compile end the run.
    """
    library = library or NumpyLibrary()

    def measured(case: Case) -> Accuracy:
        subject = Subject(op, library, case)
        return judge_output(case, subject.inputs, subject.baseline)

    nan = float("nan")
    yield from measure(cases, measured, lambda case, failure: Accuracy(case, nan, nan, nan, nan, nan, (failure,)))


def measure(cases: Iterable[Case], one: Callable[[Case], T], failed: Callable[[Case, str], T]) -> Iterator[T]:
    """``one`` of each case; for one that raises, ``failed`` with what it raised."""

    def attempt(case: Case) -> T:
        try:
            return one(case)
        except INSURMOUNTABLE:
            raise
        except FAILURES as error:
            return failed(case, f"{type(error).__name__}: {error}")

    return map(attempt, cases)


def assert_accurate(op: Operation, case: Case, library: Library | None = None) -> None:
    """Raises AssertionError, naming each broken rule, unless ``op`` is accurate on the case."""
    (result,) = measure_accuracy(op, [case], library)
    if not result.passed:
        raise AssertionError(f"{case}: " + "; ".join(result.failures))
