"""`cuattn.attention_varlen` on a CPU: packed sequences have the bits of each alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import REFERENCE, SM_80, attention_on, backend_params, on_every_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import Packed, assert_both_equal, bits_of, on_every_cpu, starts_of

from cuattn import env, testing
from cuattn.testing import BitwiseMismatch, NumpyLibrary, TorchLibrary, assert_bitwise_equal, controls, seen
from cuattn.testing.arrays import poison
from cuattn.testing.subject import Operation

NUMPY, TORCH = NumpyLibrary(), TorchLibrary()
UNEVEN = Packed([70, 1, 0, 5, 131, 2], [70, 9, 4, 5, 100, 600], heads=2, kv_heads=1)
#: Lengths (rows, keys) of sequences with something missing.
EMPTY = {
    "no rows": ([5, 0, 3], [5, 7, 3]),
    "no keys": ([5, 4, 3], [5, 0, 3]),
    "neither": ([5, 0, 3], [5, 0, 3]),
    "first": ([0, 5, 3], [0, 5, 3]),
    "first, with keys": ([0, 5, 3], [140, 5, 3]),
    "last": ([5, 3, 0], [5, 3, 0]),
    "last, with rows": ([5, 3, 70], [5, 3, 0]),
    "several in a row": ([0, 0, 5, 0, 0, 0, 0, 66, 0, 0], [0, 3, 5, 0, 0, 9, 0, 70, 0, 0]),
    "nothing but rows": ([3, 0, 2], [0, 0, 0]),
    "nothing but keys": ([0, 0], [3, 4]),
    "nothing at all": ([0, 0, 0], [0, 0, 0]),
    "no sequence": ([], []),
}


class TestAlone:
    """Every row has the bits of its sequence alone."""

    @on_every_cpu
    @pytest.mark.parametrize("mask", ["causal", "full"])
    @pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 64), ("bfloat16", 128)])
    def test_uneven_lengths(self, attention: Operation, dtype: str, head_dim: int, mask: str) -> None:
        replace(UNEVEN, mask=mask, dtype=dtype, head_dim=head_dim).check(attention, TORCH)

    @on_every_backend
    @pytest.mark.parametrize("name", EMPTY)
    def test_empty_sequences(self, attention: Operation, name: str) -> None:
        for mask in ("causal", "full"):
            Packed(*EMPTY[name], mask).check(attention)

    @on_every_backend
    def test_one_token_sequences(self, attention: Operation) -> None:
        for mask in ("causal", "full"):
            Packed([1] * 70, [1] * 70, mask).check(attention)
            Packed([1] * 9, [130, 1, 2, 128, 1, 127, 3, 1, 5], mask).check(attention)

    @on_every_backend
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_tile_edges(self, attention: Operation, mask: str) -> None:
        """Sequences that end, and start, on both sides of a tile of rows and of keys."""
        lengths = [63, 1, 64, 65, 127, 1, 128, 129]
        Packed(lengths, [*lengths[1:], 511], mask, heads=1).check(attention)

    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    def test_chunk_edges(self, attention: Operation) -> None:
        """Chunks start at each sequence's own first key."""
        Packed([3, 3, 3], [511, 2049, 513], "causal", "bfloat16", heads=1).check(attention)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
    @on_every_backend
    def test_heads(self, attention: Operation, heads: int, kv_heads: int) -> None:
        Packed([17, 0, 30], [40, 2, 30], heads=heads, kv_heads=kv_heads).check(attention)

    @pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
    @on_every_backend
    def test_scales(self, attention: Operation, scale: float) -> None:
        Packed([17, 0, 30], [40, 2, 30], scale=scale).check(attention)

    @pytest.mark.parametrize("attention", backend_params(SM_80))
    def test_thousands_of_sequences(self, attention: Operation) -> None:
        """More than the 32 * 32 that two rounds of a search among 32 lanes tell apart."""
        random = np.random.default_rng(0)
        lengths = random.choice([0, 1, 2, 3], 1600, p=[0.5, 0.3, 0.1, 0.1])
        lengths[[17, 1033]] = 70, 150
        Packed(lengths.tolist(), random.permutation(lengths).tolist(), heads=1).check(attention)

    @on_every_backend
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_workload_of_four_prompts(self, attention: Operation, mask: str) -> None:
        """59 tokens of lengths 11, 16, 13 and 19, permuted, in prefill chunks, and as a dense batch of one."""
        lengths, order = [11, 16, 13, 19], [2, 0, 3, 1]
        case = Packed(lengths, lengths, mask, "bfloat16", 128, heads=32, kv_heads=8)
        assert sum(lengths) == 59
        library = TORCH
        out, lse = case.together(attention, library)
        assert_both_equal((out, lse), case.alone(attention, library), case.dtype, "alone")

        starts, arrays = starts_of(lengths), case.bits
        tokens = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in order])
        permuted = replace(case, queries=[lengths[s] for s in order], keys=[lengths[s] for s in order])
        moved = permuted.together(attention, library, [library.array(x[tokens], case.dtype) for x in arrays])
        assert_both_equal(moved, (out[tokens], lse[:, tokens]), case.dtype, "permuted")

        if mask == "causal":  # chunks of 7: the last sequence's rows come in 7, 7, 5
            rows = [min(7, n - first) for n in lengths for first in range(0, n, 7)]
            ends = [(s, min(first + 7, n)) for s, n in enumerate(lengths) for first in range(0, n, 7)]
            assert rows[-3:] == [7, 7, 5]
            seen = np.concatenate([np.arange(starts[s], starts[s] + end) for s, end in ends])
            chunks = replace(case, queries=rows, keys=[end for _, end in ends])
            q, k, v = arrays
            pieces = [library.array(x, case.dtype) for x in (q, k[seen], v[seen])]
            assert_both_equal(chunks.together(attention, library, pieces), (out, lse), case.dtype, "chunks of 7")

    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    @settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_lengths(self, attention: Operation, data: st.DataObject) -> None:
        length = st.sampled_from([0, 1, 2]) | st.integers(0, 140)
        spans = data.draw(st.lists(st.tuples(length, length), max_size=8))
        Packed(
            [rows for rows, _ in spans],
            [keys for _, keys in spans],
            data.draw(st.sampled_from(["causal", "full"])),
            data.draw(st.sampled_from(["float16", "bfloat16"])),
            heads=2,
            kv_heads=data.draw(st.sampled_from([1, 2])),
            seed=data.draw(st.integers(0, 9)),
        ).check(attention, TORCH)

    def test_architectures_of_one_model_agree(self) -> None:
        """sm_80 and sm_86 have tiles of rows of their own."""
        case = replace(UNEVEN, dtype="bfloat16", head_dim=128)
        results = [case.together(attention_on(("emulator", arch)), TORCH) for arch in ("sm_80", "sm_86")]
        assert_both_equal(*results, case.dtype)


class TestControls:
    """Operations that look at the packing are found out by the comparison above."""

    CASE = Packed([40, 40, 40], [40, 45, 80], heads=1)

    @pytest.mark.parametrize("mask", ["causal", "full"])
    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    def test_chunks_at_packed_positions(self, attention: Operation, mask: str) -> None:
        case = replace(self.CASE, mask=mask)
        bad = controls.depends_on(seen.first_key)(attention)
        self.assert_close(case, bad, attention)
        with pytest.raises(BitwiseMismatch):
            case.check(bad)

    def test_chunks_of_the_padded_batch(self) -> None:
        """A cut that depends on the longest sequence, as in a kernel that pads."""
        attention = attention_on(REFERENCE)
        bad = controls.non_invariant(attention, lambda call: call.k.shape[0 if call.k.ndim == 3 else 2])
        self.assert_close(self.CASE, bad, attention)
        with pytest.raises(BitwiseMismatch):
            self.CASE.check(bad)

    def test_a_diagonal_of_the_packed_batch(self) -> None:
        """Aligned by the totals and not by each sequence's lengths."""

        def misaligned(q: Any, k: Any, v: Any, mask: str, **options: Any) -> Any:
            starts = options.pop("cu_seqlens_k", None)
            if starts is not None:
                starts = np.minimum(starts, options["cu_seqlens_q"])
                starts[-1] = len(k)
                options["cu_seqlens_k"] = starts
            return attention_on(REFERENCE)(q, k, v, mask, **options)

        with pytest.raises(BitwiseMismatch):
            self.CASE.check(misaligned)

    def test_a_kernel_with_chunks_at_packed_positions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel, but its chunks start at multiples of 512 packed keys, to a tile."""
        attention, case = attention_on(SM_80), Packed([3, 3], [300, 700], "full", "bfloat16", heads=1)
        case.check(attention)
        folder = tmp_path / "kernels"
        shutil.copytree(env.kernel_dir(), folder)
        forward = folder / "forward_sm80.cuh"
        text = forward.read_text()
        for old, new in (
            ("int chunk_end = config::chunk_length(0);", "int chunk_end = 512 - place.key_start / 128 % 4 * 128;"),
            ("chunk_end == config::chunk_length(0);", "chunk_end <= config::chunk_length(0);"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        forward.write_text(text)
        monkeypatch.setenv(env.KERNEL_DIR, str(folder))
        with pytest.raises(BitwiseMismatch):
            case.check(attention)

    def assert_close(self, case: Packed, bad: Operation, good: Operation) -> None:
        """The control is right within rounding."""
        out, expected = (op_out.view(np.float16) for op_out, _ in (case.together(op, NUMPY) for op in (bad, good)))
        np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=0, atol=2.0**-8)


class TestArrays:
    @on_every_backend
    def test_views_of_a_fused_tensor(self, attention: Operation) -> None:
        """q, k and v as views of (T, 3, H, D), as a projection gives them."""
        case = Packed([9, 0, 70, 1], [9, 0, 70, 1], heads=3, kv_heads=3)
        fused = torch.stack(case.arrays(TORCH), dim=1)
        views = fused.unbind(1)
        assert not views[0].is_contiguous()
        assert_both_equal(case.together(attention, TORCH, views), case.together(attention, TORCH), case.dtype)

    @on_every_backend
    def test_heads_first_and_backwards(self, attention: Operation) -> None:
        case = Packed([9, 0, 70, 1], [9, 4, 70, 1], heads=4, kv_heads=2)
        expected = case.together(attention, NUMPY)
        arrays = case.arrays(NUMPY)
        turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in arrays]
        assert_both_equal(case.together(attention, NUMPY, turned), expected, case.dtype, "(H, T, D) memory")
        backwards = [np.ascontiguousarray(x[::-1])[::-1] for x in arrays]
        assert_both_equal(case.together(attention, NUMPY, backwards), expected, case.dtype, "negative strides")

    @on_every_backend
    def test_given_output(self, attention: Operation) -> None:
        """Of any strides and full of NaN: all of it is written, and nothing beside it."""
        q, k, v = UNEVEN.arrays(TORCH)
        lengths = UNEVEN.lengths(TORCH)
        expected = attention(q, k, v, "causal", **lengths)
        tokens = q.shape[0]
        wide = testing.poisoned_empty_like(torch.zeros(tokens + 2, 4, 72).half())[1:-1, 1:3, :64]
        turned = testing.poisoned_empty_like(torch.zeros(2, tokens, 64).half()).transpose(0, 1)
        for out in (testing.poisoned_empty_like(q), wide, turned):
            result, _ = attention(q, k, v, "causal", out=out, return_lse=True, **lengths)
            assert result is out
            assert_bitwise_equal(out, expected)
        memory = wide._base
        assert memory is not None
        assert int(torch.isnan(memory).sum()) == memory.numel() - wide.numel()

    @on_every_backend
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_neighbours_of_nan(self, attention: Operation, mask: str) -> None:
        """All other sequences hold NaN, whose keys stand right beside this one's."""
        case = replace(UNEVEN, mask=mask)
        expected = case.together(attention, NUMPY)
        starts_q, starts_k = starts_of(case.queries), starts_of(case.keys)
        for s in range(len(case.queries)):
            rows, keys = slice(*starts_q[s : s + 2]), slice(*starts_k[s : s + 2])
            arrays = []
            for bits, kept in zip(case.bits, (rows, keys, keys), strict=True):
                lonely = poison(bits.shape, 2)
                lonely[kept] = bits[kept]
                arrays.append(NUMPY.array(lonely, case.dtype))
            out, lse = case.together(attention, NUMPY, arrays)
            assert_both_equal((out[rows], lse[:, rows]), (expected[0][rows], expected[1][:, rows]), case.dtype, f"{s}")

    @on_every_backend
    def test_libraries_give_the_same_bits(self, attention: Operation) -> None:
        case = replace(UNEVEN, dtype="bfloat16")
        expected = case.together(attention, NUMPY)
        assert_both_equal(case.together(attention, TORCH), expected, case.dtype, "torch")
        arrays = [jnp.asarray(x) for x in case.arrays(NUMPY)]
        lengths = {name: jnp.asarray(x) for name, x in case.lengths(NUMPY).items()}
        out, lse = attention(*arrays, "causal", return_lse=True, **lengths)
        assert isinstance(out, jax.Array)
        assert isinstance(lse, jax.Array)
        assert_both_equal(bits_of((out, lse)), expected, case.dtype, "JAX")

    @on_every_backend
    def test_return_types(self, attention: Operation) -> None:
        q, k, v = UNEVEN.arrays(TORCH)
        lengths = UNEVEN.lengths(TORCH)
        out = attention(q, k, v, **lengths)
        assert type(out) is torch.Tensor
        both = attention(q, k, v, None, return_lse=True, **lengths)
        assert type(both) is tuple
        assert (both[1].dtype, tuple(both[1].shape)) == (torch.float32, (2, len(q)))
        assert both[0].is_contiguous()
        assert both[1].is_contiguous()
        assert_bitwise_equal(both[0], out)
        hints = {"max_seqlen_q": 131, "max_seqlen_k": 600, "num_splits": 7, "scale": 64**-0.5}
        assert_bitwise_equal(attention(q.requires_grad_(), k, v, mask="full", **lengths, **hints), out)

    @on_every_backend
    def test_what_max_seqlen_says_does_not_matter(self, attention: Operation) -> None:
        q, k, v = UNEVEN.arrays(NUMPY)
        lengths = UNEVEN.lengths(NUMPY)
        expected = attention(q, k, v, **lengths)
        for bound in (0, 1, 131, 10**9):
            assert_bitwise_equal(attention(q, k, v, **lengths, max_seqlen_q=bound, max_seqlen_k=bound), expected)
