"""Bad input of `attention_kvcache` and `append_kv`: refused before anything is allocated, launched or written."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cache_arguments import dense, keys_alone, packed, paged, refusal, refusal_of_both
from refusals import assert_says, refused, short_id, zeros

import cuattn


@pytest.mark.parametrize("arguments", [dense, paged, packed])
def test_the_arguments_that_tests_change_are_right(arguments: Any) -> None:
    out, lse = cuattn.attention_kvcache(**arguments(), return_lse=True)
    assert out.shape == (*arguments()["q"].shape[:-1], 32)
    assert lse.shape == ((4, 4) if arguments is packed else (2, 4, 2))
    cuattn.append_kv(**keys_alone(arguments()))


class TestCaches:
    @pytest.mark.parametrize(
        ("name", "array", "kind", "got", "expected"),
        [
            ("k_cache", zeros(2, 9, 2, 64, dtype=np.float32), TypeError, "dtype float32", "q's float16"),
            ("v_cache", zeros(2, 9, 2, 32, dtype=np.int16), TypeError, "dtype int16", "float16, bfloat16 or float32"),
            ("k_cache", zeros(9, 2, 64), ValueError, "shape (9, 2, 64)", "4 dimensions (B, L, H, D)"),
            ("v_cache", zeros(2, 9, 2, 33), ValueError, "head dim 33", "a multiple of 8 from 8 to 256"),
            ("v_cache", zeros(2, 8, 2, 32), ValueError, "(batch, heads, length) (2, 2, 8)", "k_cache's (2, 2, 9)"),
            ("v_cache", zeros(2, 9, 1, 32), ValueError, "(batch, heads, length) (2, 1, 9)", "k_cache's (2, 2, 9)"),
            ("k_cache", torch.zeros(2, 9, 2, 64).half(), TypeError, "a torch array", "an array of q's library"),
            ("k_cache", None, TypeError, "NoneType", "a torch, CuPy or NumPy array"),
            ("v_cache", zeros(2, 9, 2, 64)[..., ::2], ValueError, "stride 2 in the last dimension", "1 (contiguous)"),
            ("v_cache", zeros(2, 9, 2, 36)[..., :32], ValueError, "36 elements in the heads dimension", "8 (16 bytes)"),
        ],
        ids=short_id,
    )
    def test_arrays(self, name: str, array: Any, kind: type[Exception], got: str, expected: str) -> None:
        assert_says(refusal_of_both(dense(), **{name: array}), kind, name, got, expected)

    def test_head_dims_and_heads_of_the_query(self) -> None:
        error = refusal(dense(), q=zeros(2, 2, 4, 72))
        assert_says(error, ValueError, "k_cache", "head dim 64", "q's 72")
        error = refusal(dense(), q=zeros(2, 2, 3, 64))
        assert_says(error, ValueError, "q", "3 heads", "a multiple of the 2 heads of k_cache and v_cache")

    def test_batch(self) -> None:
        wrong = {"k_cache": zeros(3, 9, 2, 64), "v_cache": zeros(3, 9, 2, 32)}
        assert_says(refusal_of_both(dense(), **wrong), ValueError, "k_cache", "batch size 3", "2")

    def test_pages(self) -> None:
        error = refusal_of_both(paged(), k_cache=zeros(3, 2, 64))
        assert_says(error, ValueError, "k_cache", "shape (3, 2, 64)", "4 dimensions (pages, page size, H, D)")
        empty = {"k_cache": zeros(8, 0, 2, 64), "v_cache": zeros(8, 0, 2, 32)}
        assert_says(refusal_of_both(paged(), **empty), ValueError, "k_cache", "page size 0", "at least 1")

    def test_capacity_beyond_32_bits(self) -> None:
        page = torch.zeros(1, 1, 1, 64).half().expand(1, 2**20, 1, 64)
        arguments = {
            "q": torch.zeros(1, 1, 1, 64).half(),
            "k_cache": page,
            "v_cache": page,
            "cache_lengths": torch.zeros(1, dtype=torch.int32),
            "block_table": torch.zeros(1, 2048, dtype=torch.int32),
        }
        got = "2048 pages of 1048576 keys"
        assert_says(refusal(arguments), ValueError, "block_table", got, "at most 2147479552 keys")

    def test_layout(self) -> None:
        assert_says(refusal_of_both(dense(), layout="sbhd"), ValueError, "layout", "'sbhd'", "one of 'bhsd', 'bshd'")
        assert_says(refusal_of_both(packed(), layout="bhsd"), ValueError, "layout", "beside cu_seqlens_q", "'bshd'")


class TestNewKeys:
    @pytest.mark.parametrize(("missing", "given"), [("k_new", "v_new"), ("v_new", "k_new")])
    def test_one_without_the_other(self, missing: str, given: str) -> None:
        error = refusal(dense(), **{missing: None})
        assert_says(error, ValueError, missing, f"None beside {given}", "both or none")

    @pytest.mark.parametrize("name", ["k_new", "v_new"])
    def test_shapes(self, name: str) -> None:
        columns = dense()[name].shape[-1]
        expected = f"(2, 2, 2, {columns})"
        for shape in ((1, 2, 2, columns), (2, 3, 2, columns), (2, 2, 1, columns), (2, 2, 2, 40)):
            error = refusal(dense(), **{name: zeros(*shape)})
            assert_says(error, ValueError, name, f"shape {shape}", expected)
        error = refusal(packed(), **{name: zeros(5, 2, columns)})
        assert_says(error, ValueError, name, f"shape (5, 2, {columns})", f"(4, 2, {columns})")

    def test_shapes_of_keys_alone(self) -> None:
        for name, shape in (("k_new", (2, 2, 1, 64)), ("v_new", (2, 3, 2, 32)), ("v_new", (2, 2, 2, 64))):
            error = refused(cuattn.append_kv, **keys_alone(dense()) | {name: zeros(*shape)})
            assert_says(error, ValueError, name, f"shape {shape}", "(2, 2, 2, ")

    @pytest.mark.parametrize(
        ("array", "kind", "got", "expected"),
        [
            (zeros(2, 2, 2, 32, dtype=np.float32), TypeError, "dtype float32", "q's float16"),
            (zeros(4, 2, 32), ValueError, "shape (4, 2, 32)", "4 dimensions (B, L, H, D)"),
            (zeros(2, 2, 2, 64)[..., ::2], ValueError, "stride 2 in the last dimension", "1 (contiguous)"),
            (zeros(2, 2, 2, 36)[..., :32], ValueError, "36 elements in the heads dimension", "8 (16 bytes)"),
            (torch.zeros(2, 2, 2, 32).half(), TypeError, "a torch array", "an array of q's library"),
        ],
        ids=short_id,
    )
    def test_arrays(self, array: Any, kind: type[Exception], got: str, expected: str) -> None:
        assert_says(refusal_of_both(dense(), v_new=array), kind, "v_new", got, expected)

    def test_a_backend_for_other_devices(self) -> None:
        with cuattn.use_backend("cuda"):
            error = refused(cuattn.append_kv, **keys_alone(dense()))
        assert_says(error, ValueError, "k_new", "device cpu", "a cuda device for the backend 'cuda'")


class TestWriting:
    """Caches that cannot take new keys; without new keys they need not."""

    @pytest.mark.parametrize("name", ["k_cache", "v_cache"])
    def test_read_only(self, name: str) -> None:
        arguments = dense()
        arguments[name].flags.writeable = False
        assert_says(refusal_of_both(arguments), ValueError, name, "read-only memory", "memory to write to")
        cuattn.attention_kvcache(**arguments | {"k_new": None, "v_new": None})

    def test_immutable_arrays(self) -> None:
        arguments = {name: jnp.asarray(array) for name, array in dense().items()}
        assert_says(refusal(arguments), ValueError, "k_cache", "read-only memory", "memory to write to")

    @pytest.mark.parametrize("name", ["k_cache", "v_cache"])
    def test_gradients(self, name: str) -> None:
        arguments = {n: torch.from_numpy(array) for n, array in dense().items()}
        arguments[name].requires_grad_()
        got, expected = "a tensor that requires grad", "one that does not, or torch.no_grad()"
        assert_says(refusal_of_both(arguments), ValueError, name, got, expected)
        versions = arguments[name]._version
        with torch.no_grad():
            cuattn.attention_kvcache(**arguments)
            assert arguments[name]._version > versions
            versions = arguments[name]._version
            cuattn.append_kv(**keys_alone(arguments))
        assert arguments[name]._version > versions

    @pytest.mark.parametrize("name", ["k_cache", "v_cache"])
    def test_elements_that_share_memory(self, name: str) -> None:
        arguments = {n: torch.from_numpy(array) for n, array in dense().items()}
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
        assert_says(refusal_of_both(arguments), ValueError, name, "", "memory of its own for every element")

    def test_one_memory_for_keys_and_values(self) -> None:
        cache = zeros(2, 9, 2, 64)
        error = refusal_of_both(dense() | {"v_new": zeros(2, 2, 2, 64)}, k_cache=cache, v_cache=cache)
        assert_says(error, ValueError, "v_cache", "the memory of k_cache", "memory of its own")

    @pytest.mark.parametrize("name", ["k_new", "q"])
    def test_new_keys_inside_the_cache(self, name: str) -> None:
        arguments = dense() | {"q": zeros(2, 2, 2, 64)}
        arguments[name] = arguments["k_cache"][:, 5:7]
        assert_says(refusal(arguments), ValueError, "k_cache", f"the memory of {name}", "memory of its own")

    @pytest.mark.parametrize("name", ["k_cache", "v_cache", "k_new", "v_new", "q"])
    def test_out(self, name: str) -> None:
        arguments = dense() | {"v_cache": zeros(2, 9, 2, 64), "v_new": zeros(2, 2, 2, 64), "q": zeros(2, 2, 2, 64)}
        got = f"the memory of {name}"
        assert_says(refusal(arguments, out=arguments[name][:, :2]), ValueError, "out", got, "memory of its own")

    def test_out_of_another_shape(self) -> None:
        assert_says(refusal(dense(), out=zeros(2, 2, 4, 64)), ValueError, "out", "(2, 2, 4, 64)", "(2, 2, 4, 32)")
        assert_says(refusal(packed(), out=zeros(2, 2, 4, 32)), ValueError, "out", "(2, 2, 4, 32)", "(4, 4, 32)")

    def test_keys_and_values_side_by_side(self) -> None:
        """Pages of one array, keys beside values: they share no element."""
        both = zeros(8, 2, 3, 2, 64)
        arguments = paged() | {"k_cache": both[:, 0], "v_cache": both[:, 1], "v_new": zeros(2, 2, 2, 64)}
        arguments["k_new"][...], arguments["v_new"][...] = 1, 2
        cuattn.append_kv(**keys_alone(arguments))
        assert (both.sum(axis=(0, 2, 3, 4)) == [4 * 2 * 64, 2 * 4 * 2 * 64]).all()

    def test_no_query_heads(self) -> None:
        """The new keys are written all the same."""
        arguments = dense() | {"q": zeros(2, 2, 0, 64)}
        arguments["k_new"][...], arguments["v_new"][...] = 1, 2
        assert cuattn.attention_kvcache(**arguments).shape == (2, 2, 0, 32)
        assert (arguments["k_cache"].sum(axis=(1, 2, 3)) == 2 * 2 * 64).all()
        assert (arguments["v_cache"].sum(axis=(1, 2, 3)) == 2 * 2 * 2 * 32).all()


class TestSpans:
    """Keys whose places are looked up lie less than 32 GiB apart: seen from strides alone, no such memory is needed."""

    @staticmethod
    def far_apart(tokens: int) -> np.ndarray:
        """(tokens, 1, 1, 8) float16 whose tokens claim to be 16 GiB apart; never read."""
        memory = np.zeros(8, np.float16)
        return np.lib.stride_tricks.as_strided(memory, (tokens, 1, 1, 8), (2**34, 16, 16, 2))

    def test_pages_too_far_apart(self) -> None:
        cache, table = self.far_apart(3), np.zeros((1, 3), np.int32)
        q = np.zeros((1, 1, 1, 8), np.float16)
        with pytest.raises(ValueError, match=r"k_cache: got keys up to 34359738368 bytes apart, expected less than"):
            cuattn.attention_kvcache(q, cache, cache, np.zeros(1, np.int32), block_table=table)

    def test_masked_keys_too_far_apart(self) -> None:
        keys = self.far_apart(3).swapaxes(0, 1).swapaxes(1, 2)  # (1, 1, 3, 8)
        q = np.zeros((1, 1, 1, 8), np.float16)
        with pytest.raises(ValueError, match=r"k: got keys up to 34359738368 bytes apart, expected less than"):
            cuattn.attention(q, keys, keys, key_padding_mask=np.zeros((1, 3), np.bool_))

    def test_near_enough(self) -> None:
        cache, table = self.far_apart(2), np.zeros((1, 1), np.int32)
        q = np.zeros((1, 1, 1, 8), np.float16)
        out = cuattn.attention_kvcache(q, cache, cache, np.zeros(1, np.int32), block_table=table)
        assert not out.any()
