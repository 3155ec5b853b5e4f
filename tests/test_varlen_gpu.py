"""Packed and right-padded batches on a CUDA device: bits, the emulator, graphs, streams, wrong numbers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from backends import attention_on
from packed import Packed, RightPadded, assert_both_equal, bits_of, both_forms, garbage
from test_invariance_gpu import VALIDATED, on_device, on_host

import cuattn
from cuattn import testing
from cuattn.devices import device_architecture
from cuattn.testing import (
    BitwiseMismatch,
    Case,
    CupyLibrary,
    Library,
    TorchLibrary,
    assert_bitwise_equal,
    controls,
    seen,
)
from cuattn.testing.arrays import int32_array, raw_bits

pytestmark = pytest.mark.gpu

UNEVEN = Packed([70, 1, 0, 5, 1031, 2, 300], [70, 9, 4, 5, 1000, 2600, 0], dtype="bfloat16", heads=4, kv_heads=2)
PADDED = RightPadded(
    Case(150, 700, "causal", "bfloat16", 128, batch=6, heads=4, kv_heads=2), (700, 0, 1, 512, 513, 650)
)
on_both_masks = pytest.mark.parametrize("mask", ["causal", "full"])
on_both_head_dims = pytest.mark.parametrize("head_dim", [64, 128])
on_both_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@pytest.fixture(params=["torch", "cupy"])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "cupy":
        return CupyLibrary()
    return torch_library()


def torch_library() -> Library:
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: this one is {torch.__version__}")
    return TorchLibrary(device="cuda:0")


class TestAlone:
    @on_both_masks
    @on_both_head_dims
    @on_both_dtypes
    def test_uneven_lengths(self, library: Library, dtype: str, head_dim: int, mask: str) -> None:
        replace(UNEVEN, dtype=dtype, head_dim=head_dim, mask=mask).check(both_forms, library)

    @on_both_masks
    def test_ten_thousand_sequences(self, library: Library, mask: str) -> None:
        """Most of them short or empty, some of hundreds of tokens."""
        random = np.random.default_rng(0)
        lengths = [np.minimum(random.geometric(0.1, 10_000) - 1, 300) for _ in range(2)]
        for some in lengths:
            some[random.integers(0, 10_000, 20)] = random.integers(200, 1500, 20)
        Packed(*(x.tolist() for x in lengths), mask, heads=2, kv_heads=1).check(both_forms, library)

    def test_one_long_sequence_among_short_ones(self, library: Library) -> None:
        Packed([1, 9000, 0, 3], [20_000, 9000, 5, 3], dtype="bfloat16", head_dim=128).check(both_forms, library)

    @on_both_masks
    def test_workload_of_four_prompts(self, library: Library, mask: str) -> None:
        lengths = [11, 16, 13, 19]
        Packed(lengths, lengths, mask, "bfloat16", 128, heads=32, kv_heads=8).check(both_forms, library)

    @on_both_masks
    @pytest.mark.parametrize("kind", ["NaN", "infinities", "huge"])
    def test_right_padding(self, library: Library, mask: str, kind: str) -> None:
        batch = replace(PADDED, case=replace(PADDED.case, mask=mask))
        bits = batch.bits(garbage(kind, "bfloat16"))
        expected = batch.alone(cuattn.attention, library)
        for layout in ("bhsd", "bshd"):
            assert_both_equal(batch.together(cuattn.attention, library, bits, layout), expected, "bfloat16", layout)

    def test_controls(self, library: Library) -> None:
        """Cuts that depend on the packing or the padding are found out."""
        case = Packed([40, 40, 40], [40, 45, 80])
        with pytest.raises(BitwiseMismatch):
            case.check(controls.depends_on(seen.first_key)(both_forms), library)
        bad = controls.depends_on(seen.padding)(cuattn.attention)
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(PADDED.together(bad, library, PADDED.bits()), PADDED.alone(bad, library), "bfloat16")

    def test_many_runs(self) -> None:
        """A race shows as a rare difference."""
        library = on_device()
        arrays = UNEVEN.arrays(library)
        expected = UNEVEN.together(both_forms, library, arrays)
        for run in range(100):
            assert_both_equal(UNEVEN.together(both_forms, library, arrays), expected, UNEVEN.dtype, f"run {run}")


class TestEmulator:
    """The emulated kernel of this device's architecture gives the device's bits."""

    @pytest.fixture
    def emulated(self) -> Any:
        arch = device_architecture(0)
        if arch not in VALIDATED:
            pytest.skip(f"the emulator's model was compared with {', '.join(VALIDATED)}, not with {arch}")
        return attention_on(("emulator", arch))

    @on_both_masks
    @on_both_head_dims
    @on_both_dtypes
    def test_packed(self, emulated: Any, dtype: str, head_dim: int, mask: str) -> None:
        case = Packed([70, 1, 0, 5, 200], [70, 9, 4, 5, 600], mask, dtype, head_dim)
        assert_both_equal(case.together(emulated, on_host()), case.together(both_forms, on_device()), dtype)

    @on_both_masks
    def test_right_padding(self, emulated: Any, mask: str) -> None:
        batch = replace(PADDED, case=replace(PADDED.case, mask=mask))
        bits = batch.bits(garbage("NaN", "bfloat16"))
        on_cpu, on_gpu = batch.together(emulated, on_host(), bits), batch.together(both_forms, on_device(), bits)
        assert_both_equal(on_cpu, on_gpu, "bfloat16")


class TestStreams:
    """Lengths are read when the kernel runs, by the kernel alone."""

    #: Of UNEVEN's totals.
    OTHERS = ([0, 400, 0, 0, 9, 1000, 0], [500, 400, 0, 1, 9, 2700, 78])

    def packed_call(self, library: Library) -> tuple[Callable[[], Any], list[Any]]:
        """A call, and the arrays of lengths that it reads."""
        arrays, lengths = UNEVEN.arrays(library), UNEVEN.lengths(library)
        call = partial(cuattn.attention_varlen, *arrays, **lengths, mask="causal", return_lse=True)
        return call, list(lengths.values())

    def padded_call(self, library: Library) -> tuple[Callable[[], Any], list[Any]]:
        q, k, v = (library.array(x, "bfloat16") for x in PADDED.bits())
        lengths = int32_array(library, PADDED.lengths)
        return partial(cuattn.attention, q, k, v, "causal", kv_lengths=lengths, return_lse=True), [lengths]

    @pytest.mark.parametrize("kind", ["packed", "padded"])
    def test_no_synchronisation(self, kind: str) -> None:
        """Queued behind a long wait, without waiting for it; lengths that are written meanwhile count."""
        library = torch_library()
        call, lengths = self.packed_call(library) if kind == "packed" else self.padded_call(library)
        expected = bits_of(call())
        right = [x.clone() for x in lengths]
        for x in lengths:
            x.zero_()
        side, done, before = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.get_sync_debug_mode()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000_000)  # clocks: about a second
            torch.cuda.set_sync_debug_mode("error")
            try:
                for x, numbers in zip(lengths, right, strict=True):
                    x.copy_(numbers)
                result = call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
            done.record()
        assert not done.query(), "the call has waited for the stream"
        side.synchronize()
        assert_both_equal(bits_of(result), expected, "bfloat16")

    def replay(self, library: Library, call: Callable[[], Any], lengths: list[Any], others: list[Any]) -> None:
        """A captured call with its lengths, others, and the first again."""
        first = [x.clone() for x in lengths]
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = call()
        results = []
        for numbers in (first, others, first):
            for x, new in zip(lengths, numbers, strict=True):
                x.copy_(new)
            eager = bits_of(call())
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
            graph.replay()
            results.append(bits_of((out, lse)))
            assert_both_equal(results[-1], eager, "bfloat16")
        assert (results[0][0] != results[1][0]).any()
        assert_both_equal(results[0], results[2], "bfloat16")

    def test_graph_of_packed_sequences(self) -> None:
        library = torch_library()
        call, lengths = self.packed_call(library)
        other = replace(UNEVEN, queries=self.OTHERS[0], keys=self.OTHERS[1])
        assert [sum(x) for x in self.OTHERS] == [sum(UNEVEN.queries), sum(UNEVEN.keys)]
        self.replay(library, call, lengths, list(other.lengths(library).values()))

    def test_graph_of_right_padding(self) -> None:
        library = torch_library()
        call, lengths = self.padded_call(library)
        self.replay(library, call, lengths, [int32_array(library, [3, 700, 128, 0, 699, 12])])


class TestWrongNumbers:
    """They cannot be checked without waiting for the device: clamped, they do no harm."""

    LARGE, SMALL = 2**31 - 1, -(2**31)

    def test_packed(self) -> None:
        """No fault, no endless loop, no touch of the memory around the output."""
        library = torch_library()
        case = Packed([150], [150], dtype="bfloat16")
        q, k, v = case.arrays(library)
        memory = testing.poisoned_empty_like(torch.empty(3, *q.shape, dtype=q.dtype, device=q.device))
        good = [0, 50, 100, 150]
        random = np.random.default_rng(0)
        bad = [
            [0, 0, 0, 0],
            [150, 100, 50, 0],
            [-5, 3, -70, 150],
            [64, 64, -1000, 150],
            [0, self.LARGE, self.LARGE, self.LARGE],
            [self.LARGE, self.SMALL, self.LARGE, self.SMALL],
            [100, self.SMALL, 0, self.LARGE],
            *random.integers(-300, 300, (200, 4)).tolist(),
            *random.integers(self.SMALL, self.LARGE, (50, 4)).tolist(),
            *random.integers(-300, 300, (100, 70)).tolist(),
        ]
        for numbers in bad:
            for mask in ("causal", "full"):
                for starts in ((numbers, numbers), (good, numbers), (numbers, good)):
                    if len(starts[0]) == len(starts[1]):
                        cu_q, cu_k = (int32_array(library, x) for x in starts)
                        cuattn.attention_varlen(q, k, v, cu_q, cu_k, mask, out=memory[1])
        torch.cuda.synchronize()
        assert (raw_bits(memory[::2])[0] == 0xFFFF).all()
        memory.fill_(0)
        case.check(both_forms, library)

    def test_key_lengths(self) -> None:
        library = torch_library()
        q, k, v = (library.array(x, "bfloat16") for x in PADDED.bits())

        def run(*lengths: int) -> Any:
            return cuattn.attention(q, k, v, kv_lengths=int32_array(library, lengths))

        wrong = run(701, -1, self.SMALL, self.LARGE, 512, 10**9)
        assert_bitwise_equal(wrong, run(700, 0, 0, 700, 512, 700))
