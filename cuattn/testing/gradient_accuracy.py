"""Accuracy of gradients: the error of dq, dk and dv against float64, each in proportion to the error of a peer.

The peer is what a framework's backward pass computes from attention's results, without a fused kernel: inputs in low
precision; scores, and weights from them and the LSE, in fp32; the correction of each row from the rounded output;
weights and gradients of scores rounded to the dtype before they are multiplied; gradients rounded. The rules for each,
with the `Limits` of the dtype:

- relative L2 error <= ``gradient_ratio`` times the peer's, which counts at least as rounding the result, and at least
  as a sum in fp32, term by term, of so many terms;
- each element: |gradient - gold| <= ``gradient_element`` times the peer's largest error, which counts at least as 4
  times what is usual in such a sum, + one unit in the last place of the gold value; more than 2 times, since a largest
  error is a matter of chance;
- dq of rows that see nothing is +0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuattn.reference.gold import gold_gradients, visible_keys
from cuattn.testing.accuracy import measure, peer_scores, relative_error, rounded, unit_of
from cuattn.testing.arrays import Library, NumpyLibrary, values_of
from cuattn.testing.gradients import Gradients, GradientSubject
from cuattn.testing.inputs import Case, Inputs
from cuattn.testing.limits import LIMITS
from cuattn.testing.subject import Operation

Arrays = dict[str, NDArray[np.float32]]


def _values(inputs: Inputs, dtype: str) -> Arrays:
    """All inputs as fp32 numbers."""
    return {
        name: values_of(bits, "float32" if bits.ndim == 3 else dtype).astype(np.float32)
        for name, bits in inputs.named.items()
    }


def peer_gradients(values: Arrays, dtype: str, mask: str, scale: float) -> Arrays:
    """The peer's dq, dk and dv, fp32 values that are exact in ``dtype``; from q, k, v, dout and, if there, dlse."""
    q, dout, factor = values["q"], values["dout"], np.float32(scale)
    batch, kv_heads, len_k, _ = values["k"].shape
    group = q.shape[1] // kv_heads
    k, v = (np.repeat(values[name], group, axis=1) for name in ("k", "v"))
    scores, highest = peer_scores(q, k, mask, scale)
    total = np.exp(scores - highest).sum(axis=-1, keepdims=True)
    lse = highest + np.log(np.where(total > 0, total, np.float32(1)))
    weights = np.exp(scores - lse)
    out = rounded(rounded(weights, dtype) @ v, dtype)
    delta = (dout * out).sum(axis=-1)
    if "dlse" in values:
        delta -= values["dlse"]
    dscores = rounded(weights * (dout @ v.swapaxes(-1, -2) - delta[..., None]), dtype)

    def of_key_heads(x: NDArray[np.float32]) -> NDArray[np.float32]:
        summed: NDArray[np.float32] = x.reshape(batch, kv_heads, group, len_k, x.shape[3]).sum(axis=2)
        return summed

    gradients = {
        "dq": factor * (dscores @ k),
        "dk": factor * of_key_heads(dscores.swapaxes(-1, -2) @ q),
        "dv": of_key_heads(rounded(weights, dtype).swapaxes(-1, -2) @ dout),
    }
    return {name: rounded(gradient, dtype) for name, gradient in gradients.items()}


@dataclass(frozen=True)
class GradientError:
    """Measured errors of one gradient."""

    error: float  # relative L2 against float64
    peer_error: float
    worst_element: float  # largest error of an element as a share of what it is allowed
    floor: float  # what the peer's error counts at least

    @property
    def ratio(self) -> float:
        return self.error / max(self.peer_error, self.floor)

    @classmethod
    def of(
        cls,
        values: NDArray[np.float64],
        gold: NDArray[np.float64],
        peer: NDArray[np.float32],
        dtype: str,
        terms: int,
    ) -> "GradientError":
        """``terms``: how many each element is the sum of."""
        limits = LIMITS[dtype]
        floor = max(limits.floor, LIMITS["float32"].floor * (terms / 2) ** 0.5)
        usual = floor * float(np.sqrt(np.square(gold).mean())) if gold.size else 0.0
        largest = max(float(np.abs(peer - gold).max(initial=0.0)), 4 * usual)
        element = np.abs(values - gold) / (limits.gradient_element * largest + unit_of(gold, dtype))
        return cls(relative_error(values, gold), relative_error(peer, gold), float(element.max(initial=0.0)), floor)


_UNKNOWN = GradientError(*4 * (float("nan"),))


@dataclass(frozen=True)
class GradientAccuracy:
    """Measured errors of the gradients of one case."""

    case: Case
    dq: GradientError
    dk: GradientError
    dv: GradientError
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def errors(self) -> dict[str, GradientError]:
        return {"dq": self.dq, "dk": self.dk, "dv": self.dv}

    @property
    def worst(self) -> tuple[str, GradientError]:
        """The gradient whose error is largest beside the peer's."""
        return max(self.errors.items(), key=lambda item: item[1].ratio)


def judge_gradients(case: Case, inputs: Inputs, result: Gradients) -> GradientAccuracy:
    """The errors of gradients on the case's inputs, which are without dlse if the operation takes none."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    values = _values(inputs, case.dtype)
    exact = {name: x.astype(np.float64) for name, x in values.items()}
    dout, dlse = exact["dout"], exact.get("dlse")
    gold = gold_gradients(dout, exact["q"], exact["k"], exact["v"], case.mask, scale, dlse=dlse)
    peer = peer_gradients(values, case.dtype, case.mask, scale)
    rows = case.len_q * case.heads // case.kv_heads
    errors, failures = {}, []
    for (name, bits), expected, terms in zip(result.named.items(), gold, (case.len_k, rows, rows), strict=True):
        got = values_of(bits, case.dtype).astype(np.float64)
        errors[name] = own = GradientError.of(got, expected, peer[name], case.dtype, terms)
        # "not <=" and not ">": a NaN fails
        if not own.ratio <= LIMITS[case.dtype].gradient_ratio:
            counted = max(own.peer_error, own.floor)
            failures.append(f"{name}: relative L2 error {own.error:.3g}, the peer's counts as {counted:.3g}")
        if not own.worst_element <= 1:
            failures.append(f"{name}: an element's error is {own.worst_element:.3g} times what is allowed")
    if np.any(result.q[:, :, visible_keys(case.len_q, case.len_k, case.mask) == 0]):
        failures.append("dq of a row that sees no key is not +0")
    return GradientAccuracy(case, errors["dq"], errors["dk"], errors["dv"], tuple(failures))


def measure_gradient_accuracy(
    op: Operation, forward: Operation, cases: Iterable[Case], library: Library | None = None
) -> Iterator[GradientAccuracy]:
    """Run ``op(dout, q, k, v, out, lse, mask, scale=..., dlse=...) -> (dq, dk, dv)`` on each case and judge it.

    out and lse are those of ``forward(q, k, v, mask, scale=..., return_lse=True)``; dlse is given if ``op`` has the
    keyword. All else is as in `measure_accuracy`.
    """
    library = library or NumpyLibrary()

    def measured(case: Case) -> GradientAccuracy:
        subject = GradientSubject(forward, op, library, case)
        return judge_gradients(case, subject.judged, subject.baseline)

    yield from measure(
        cases, measured, lambda case, failure: GradientAccuracy(case, _UNKNOWN, _UNKNOWN, _UNKNOWN, (failure,))
    )


def assert_gradients_accurate(op: Operation, forward: Operation, case: Case, library: Library | None = None) -> None:
    """Raises AssertionError, naming each broken rule, unless ``op`` is accurate on the case."""
    (result,) = measure_gradient_accuracy(op, forward, [case], library)
    if not result.passed:
        raise AssertionError(f"{case}: " + "; ".join(result.failures))
