"""`kv_lengths`: a right-padded batch has the bits of each sequence with the keys it has."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from backends import REFERENCE, SM_80, attention_on, backend_params, on_every_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import RightPadded, assert_both_equal, bits_of, garbage, numbers, on_every_cpu

from cuattn import testing
from cuattn.testing import BitwiseMismatch, Case, NumpyLibrary, TorchLibrary, assert_bitwise_equal, controls, seen
from cuattn.testing.arrays import int32_array
from cuattn.testing.subject import Operation

NUMPY, TORCH = NumpyLibrary(), TorchLibrary()
CASE = Case(70, 200, "causal", "bfloat16", batch=5, heads=2, kv_heads=1)
LENGTHS = (200, 0, 1, 128, 171)


@on_every_cpu
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 64), ("bfloat16", 128)])
def test_each_alone(attention: Operation, dtype: str, head_dim: int, mask: str) -> None:
    batch = RightPadded(replace(CASE, dtype=dtype, head_dim=head_dim, mask=mask), LENGTHS)
    expected = batch.alone(attention, TORCH)
    for kind in ("NaN", "infinities", "huge"):
        bits = batch.bits(garbage(kind, dtype))
        assert_both_equal(batch.together(attention, TORCH, bits), expected, dtype, kind)


@on_every_backend
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(
    ("len_q", "len_k", "lengths"),
    [
        (1, 300, (300, 299, 129, 128, 127, 1, 0)),  # decode
        (5, 2, (2, 1, 0)),  # causal rows without keys
        (130, 130, (130, 129, 64, 63, 1)),
        (3, 1100, (1100, 1024, 513, 512, 511, 2)),  # chunk edges
        (4, 0, (0, 0)),
    ],
)
def test_shapes(attention: Operation, len_q: int, len_k: int, lengths: tuple[int, ...], mask: str) -> None:
    batch = RightPadded(Case(len_q, len_k, mask, batch=len(lengths)), lengths)
    expected = batch.alone(attention, NUMPY)
    assert_both_equal(batch.together(attention, NUMPY, batch.bits(garbage("NaN", "float16"))), expected, "float16")


@on_every_backend
def test_no_keys_at_all(attention: Operation) -> None:
    """+0 and -inf, in memory that held NaN."""
    q = testing.make_inputs(Case(9, 40, batch=2)).q.view(np.float16)
    nan = np.full((2, 1, 40, 64), np.nan, np.float16)
    for mask in ("causal", "full"):
        out = np.full_like(q, np.nan)
        _, lse = attention(q, nan, nan, mask, kv_lengths=numbers(0, 0), out=out, return_lse=True)
        assert not out.view(np.uint16).any()
        assert (lse == -np.inf).all()


@on_every_backend
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2)])
def test_heads_and_layouts(attention: Operation, heads: int, kv_heads: int, mask: str) -> None:
    batch = RightPadded(Case(20, 50, mask, batch=3, heads=heads, kv_heads=kv_heads), (50, 31, 7))
    bits = batch.bits(garbage("NaN", "float16"))
    expected = batch.alone(attention, NUMPY)
    for layout in ("bhsd", "bshd"):
        assert_both_equal(batch.together(attention, NUMPY, bits, layout), expected, "float16", layout)


@on_every_backend
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_full_lengths_change_nothing(attention: Operation, mask: str) -> None:
    inputs = testing.make_inputs(CASE)
    arrays = [TORCH.array(x, CASE.dtype) for x in (inputs.q, inputs.k, inputs.v)]
    plain = bits_of(attention(*arrays, mask, return_lse=True))
    lengths = int32_array(TORCH, [CASE.len_k] * CASE.batch)
    assert_both_equal(bits_of(attention(*arrays, mask, return_lse=True, kv_lengths=lengths)), plain, CASE.dtype)


@on_every_backend
def test_libraries_and_given_output(attention: Operation) -> None:
    batch = RightPadded(CASE, LENGTHS)
    bits = batch.bits(garbage("NaN", CASE.dtype))
    expected = batch.together(attention, NUMPY, bits)
    arrays = [jnp.asarray(NUMPY.array(x, CASE.dtype)) for x in bits]
    result = attention(*arrays, "causal", return_lse=True, kv_lengths=jnp.array(LENGTHS, jnp.int32))
    assert_both_equal(bits_of(result), expected, CASE.dtype, "JAX")
    q, k, v = (TORCH.array(x, CASE.dtype) for x in bits)
    out = testing.poisoned_empty_like(q.transpose(1, 2)).transpose(1, 2)
    both = attention(q, k, v, "causal", return_lse=True, out=out, kv_lengths=int32_array(TORCH, LENGTHS))
    assert both[0] is out
    assert_both_equal(bits_of(both), expected, CASE.dtype, "torch, out=")


@pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_lengths(attention: Operation, data: st.DataObject) -> None:
    len_k = data.draw(st.integers(0, 150))
    lengths = data.draw(st.lists(st.integers(0, len_k), min_size=1, max_size=4))
    case = Case(
        data.draw(st.integers(1, 80)),
        len_k,
        data.draw(st.sampled_from(["causal", "full"])),
        data.draw(st.sampled_from(["float16", "bfloat16"])),
        batch=len(lengths),
        seed=data.draw(st.integers(0, 9)),
    )
    batch = RightPadded(case, lengths)
    bits = batch.bits(garbage(data.draw(st.sampled_from(["NaN", "infinities", "huge"])), case.dtype))
    assert_both_equal(batch.together(attention, TORCH, bits), batch.alone(attention, TORCH), case.dtype)


class TestControls:
    """What would be wrong is found out by the comparisons above."""

    @pytest.mark.parametrize("mask", ["causal", "full"])
    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    def test_cuts_that_depend_on_the_padding(self, attention: Operation, mask: str) -> None:
        batch = RightPadded(replace(CASE, mask=mask), LENGTHS)
        bad = controls.depends_on(seen.padding)(attention)
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(batch.together(bad, TORCH, batch.bits()), batch.alone(bad, TORCH), CASE.dtype)

    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_padding_that_is_seen(self, mask: str) -> None:
        """Lengths that are off by one, and lengths that are not used."""
        attention = attention_on(REFERENCE)
        batch = RightPadded(replace(CASE, mask=mask), LENGTHS)
        expected = batch.alone(attention, TORCH)
        for wrong in ((200, 1, 1, 128, 171), (200, 0, 1, 128, 170), (200,) * 5):
            with pytest.raises(BitwiseMismatch):
                assert_both_equal(
                    replace(batch, lengths=wrong).together(attention, TORCH, batch.bits()), expected, CASE.dtype
                )

    def test_a_diagonal_that_moves(self) -> None:
        """Aligned to the keys that exist instead of to all: another function, documented as not this one."""
        attention = attention_on(REFERENCE)
        inputs = testing.make_inputs(Case(20, 50))
        q, k, v = (x.view(np.float16) for x in (inputs.q, inputs.k, inputs.v))
        moved = attention(q, k[:, :, :40], v[:, :, :40], "causal")
        with pytest.raises(BitwiseMismatch):
            assert_bitwise_equal(attention(q, k, v, "causal", kv_lengths=numbers(40)), moved)
