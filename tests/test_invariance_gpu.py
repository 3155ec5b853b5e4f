"""The promise on a CUDA device, and the emulator's equality with it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import attention_on

import cuattn
from cuattn import testing
from cuattn.devices import device_architecture
from cuattn.testing import Case, CupyLibrary, Library, NumpyLibrary, Subject, TorchLibrary
from cuattn.testing.arrays import round_to_bits, values_of
from cuattn.testing.inputs import Inputs

pytestmark = pytest.mark.gpu

#: Architectures whose tensor cores and ex2 were captured and compared with the emulator's models.
VALIDATED = ("sm_90", "sm_90a")
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38}
on_both_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
on_both_head_dims = pytest.mark.parametrize("head_dim", [64, 128])
on_both_masks = pytest.mark.parametrize("mask", ["causal", "full"])


def on_device() -> Library:
    return TorchLibrary(device="cuda:0") if torch.cuda.is_available() else CupyLibrary()


def on_host() -> Library:
    return TorchLibrary() if torch.cuda.is_available() else NumpyLibrary()


@on_both_dtypes
@on_both_head_dims
@on_both_masks
def test_sweep(dtype: str, head_dim: int, mask: str) -> None:
    cases = testing.standard_cases("device", (dtype,), (head_dim,), (mask,))
    attention = testing.with_packed(cuattn.attention, cuattn.attention_varlen)
    testing.assert_invariant(attention, cases, on_device())


@on_both_dtypes
def test_many_runs(dtype: str) -> None:
    """A race shows as a rare difference."""
    subject = Subject(cuattn.attention, on_device(), Case(257, 1100, "causal", dtype, 128, 4, 8, 2))
    for run in range(300):
        subject.run(subject.inputs).assert_equals(subject.baseline, f"run {run + 2} against run 1")


@on_both_dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_unseen_values_of_any_size(dtype: str, sign: int) -> None:
    """Finite keys and values that a causal row cannot see change nothing, however large, beside small ones it sees."""
    case = Case(140, 700, "causal", dtype, 64, heads=2)
    inputs = testing.make_inputs(case)
    small = round_to_bits(np.array([1e-3], np.float32), dtype)
    v = np.where(inputs.v & 0x8000, small | 0x8000, small)
    word = round_to_bits(np.array([sign * LARGEST[dtype]], np.float32), dtype)
    subject = Subject(cuattn.attention, on_device(), case)
    clean = subject.run(replace(inputs, v=v))
    for first in (561, 570, 639, 640, 699):
        k, bad = inputs.k.copy(), v.copy()
        k[:, :, first:] = bad[:, :, first:] = word
        rows = first - (case.len_k - case.len_q)
        result = subject.run(replace(inputs, k=k, v=bad))
        result[:, :, :rows].assert_equals(clean[:, :, :rows], f"largest numbers from key {first} on")


def _set(name: str, index: tuple[int, ...], value: float) -> Callable[[Inputs, str], Inputs]:
    def change(inputs: Inputs, dtype: str) -> Inputs:
        bits = getattr(inputs, name).copy()
        bits[index] = round_to_bits(np.array([value], np.float32), dtype)[0]
        return replace(inputs, **{name: bits})

    return change


def _scaled(q: float, k: float, v: float) -> Callable[[Inputs, str], Inputs]:
    """Inputs times powers of two, given for float16 as logarithms; bfloat16 gets eight times the exponent."""

    def change(inputs: Inputs, dtype: str) -> Inputs:
        factor = 8 if dtype == "bfloat16" else 1
        scaled = []
        for bits, power in ((inputs.q, q), (inputs.k, k), (inputs.v, v)):
            values = values_of(bits, dtype).astype(np.float64) * 2.0 ** (factor * power)
            with np.errstate(over="ignore"):
                scaled.append(round_to_bits(values.astype(np.float32), dtype))
        return Inputs(*scaled)

    return change


SPECIAL = {
    "plain": _scaled(0, 0, 0),
    "nan key": _set("k", (0, 0, 3, 5), np.nan),
    "inf key": _set("k", (0, 0, 3, 5), np.inf),
    "inf query": _set("q", (0, 0, 3, 5), -np.inf),
    "nan query": _set("q", (0, 0, 3), np.nan),
    "inf value": _set("v", (0, 0, 3, 5), np.inf),
    "nan value": _set("v", (0, 0, 150, 5), np.nan),
    "two infinities": lambda inputs, dtype: _set("v", (0, 0, 9, 6), -np.inf)(
        _set("v", (0, 0, 3, 6), np.inf)(inputs, dtype), dtype
    ),
    "zeros": _set("q", (0,), 0.0),
    "huge scores": _scaled(7, 7, 0),
    "overflowing scores": _scaled(12, 12, 0),
    "huge values": _scaled(0, 0, 13),
    "tiny": _scaled(-13, -13, -16),
}


class TestEmulator:
    """The emulated kernel of this device's architecture gives the device's bits."""

    @pytest.fixture
    def arch(self) -> str:
        arch = device_architecture(0)
        if arch not in VALIDATED:
            pytest.skip(f"the emulator's model was compared with {', '.join(VALIDATED)}, not with {arch}")
        return arch

    def check(self, arch: str, case: Case, inputs: Inputs | None = None) -> None:
        inputs = inputs or testing.make_inputs(case)
        device = Subject(cuattn.attention, on_device(), case).run(inputs)
        Subject(attention_on(("emulator", arch)), on_host(), case).run(inputs).assert_equals(
            device, f"{case}: emulator"
        )

    @on_both_dtypes
    @on_both_head_dims
    @on_both_masks
    def test_shapes(self, arch: str, dtype: str, head_dim: int, mask: str) -> None:
        for shape in ((1, 1), (113, 203), (799, 3), (20, 530), (3, 2049), (130, 0)):
            self.check(arch, Case(*shape, mask, dtype, head_dim, 1, 2, 1))
        self.check(arch, Case(1023, 1024, mask, dtype, head_dim, family="peaked 8"))
        self.check(arch, Case(130, 700, mask, dtype, head_dim, 2, 2, 2, family="peaked 16"))

    @on_both_dtypes
    @on_both_masks
    @pytest.mark.parametrize("scale", [0.0, -0.1, 1e-30, 5e-324, 1e30, 1e300, -1e300])
    def test_scales(self, arch: str, dtype: str, mask: str, scale: float) -> None:
        self.check(arch, Case(33, 600, mask, dtype, 64, scale=scale))

    @on_both_dtypes
    @on_both_masks
    @on_both_head_dims
    @pytest.mark.parametrize("name", SPECIAL)
    def test_special_values(self, arch: str, dtype: str, head_dim: int, mask: str, name: str) -> None:
        case = Case(40, 200, mask, dtype, head_dim)
        self.check(arch, case, SPECIAL[name](testing.make_inputs(case), dtype))

    @on_both_dtypes
    @pytest.mark.parametrize("large", [1.0, 1024.0, "largest"])
    def test_large_values_under_weights_of_zero(self, arch: str, dtype: str, large: float | str) -> None:
        """How a product with an exact zero takes part in the alignment of a sum."""
        case = Case(40, 200, "causal", dtype, 64)
        inputs = testing.make_inputs(case)
        small = round_to_bits(np.array([1e-3], np.float32), dtype)
        v = np.where(inputs.v & 0x8000, small | 0x8000, small)
        v[:, :, 170:] = round_to_bits(np.array([LARGEST[dtype] if large == "largest" else large], np.float32), dtype)
        self.check(arch, case, replace(inputs, v=v))
