"""Bad input of `attention_partials`, `combine` and `chunk_starts`: refused before anything is allocated or launched."""

from typing import Any

import numpy as np
import pytest
import torch
from refusals import assert_says, refused, short_id, zeros

import cuattn


def parts(chunks: int = 2, columns: int = 32, dtype: Any = np.float32) -> cuattn.Partials:
    return cuattn.Partials(
        zeros(chunks, 1, 2, 5, columns, dtype=dtype), *(zeros(chunks, 1, 2, 5, dtype=dtype) for _ in range(2))
    )


class TestPartials:
    @pytest.mark.parametrize(
        ("options", "kind", "argument", "got", "expected"),
        [
            ({"first_key": 100}, ValueError, "first_key", "100", "the start of a chunk"),
            ({"first_key": 2560}, ValueError, "first_key", "2560", "the start of a chunk"),
            ({"first_key": -512}, ValueError, "first_key", "-512", "an int of at least 0"),
            ({"first_key": 512.0}, TypeError, "first_key", "float", "an int of at least 0"),
            ({"first_key": None}, TypeError, "first_key", "NoneType", "an int of at least 0"),
            ({"total_keys": 699}, ValueError, "total_keys", "699", "a number from the end of k 700 to"),
            ({"first_key": 512, "total_keys": 700}, ValueError, "total_keys", "700", "the end of k 1212 to"),
            ({"total_keys": 2**31}, ValueError, "total_keys", str(2**31), "2147479552"),
            ({"total_keys": True}, TypeError, "total_keys", "bool", "an int of at least 0"),
            (
                {"total_keys": 701},
                ValueError,
                "k",
                "keys up to 700",
                "the start of a chunk (cuattn.chunk_starts) or 701",
            ),
            ({"mask": "window"}, ValueError, "mask", "'window'", "one of 'full', 'causal'"),
            ({"layout": "thd"}, ValueError, "layout", "'thd'", "one of 'bhsd', 'bshd'"),
            ({"scale": "1"}, TypeError, "scale", "str", "None or a finite float"),
            ({"v": zeros(1, 2, 9, 64)}, ValueError, "v", "(1, 2, 9)", "k's (1, 2, 700)"),
        ],
        ids=short_id,
    )
    def test_arguments(
        self, options: dict[str, Any], kind: type[Exception], argument: str, got: str, expected: str
    ) -> None:
        k = zeros(1, 2, 700, 64)
        arguments = {"q": zeros(1, 2, 5, 64), "k": k, "v": k} | options
        assert_says(refused(cuattn.attention_partials, **arguments), kind, argument, got, expected)

    def test_a_backend_for_other_devices(self) -> None:
        q = zeros(1, 2, 5, 64)
        with cuattn.use_backend("cuda"):
            error = refused(cuattn.attention_partials, q, q, q)
        assert_says(error, ValueError, "q", "device cpu", "a cuda device for the backend 'cuda'")

    def test_nothing(self) -> None:
        """No rows, no keys."""
        q, k = zeros(1, 2, 5, 64), zeros(1, 2, 0, 32)
        none = cuattn.attention_partials(zeros(1, 2, 0, 64), q, q)
        assert [x.shape for x in none] == [(1, 1, 2, 0, 64), (1, 1, 2, 0), (1, 1, 2, 0)]
        none = cuattn.attention_partials(q, zeros(1, 2, 0, 64), k, first_key=512)
        assert [x.shape for x in none] == [(0, 1, 2, 5, 32), (0, 1, 2, 5), (0, 1, 2, 5)]
        out, lse = cuattn.combine(none, dtype="float16", return_lse=True)
        assert (out.shape, out.dtype) == ((1, 2, 5, 32), np.float16)
        assert not out.view(np.uint16).any()
        assert (lse == -np.inf).all()


class TestCombine:
    @pytest.mark.parametrize(
        ("partials", "kind", "argument", "got", "expected"),
        [
            ([], ValueError, "partials", "none", "at least one Partials"),
            (None, TypeError, "partials", "NoneType", "one Partials or a sequence of them"),
            (tuple(parts()), TypeError, "partials", "a sequence of ndarray", "one Partials or a sequence of them"),
            ([parts(), None], TypeError, "partials", "NoneType, Partials", "one Partials or a sequence of them"),
            (parts()._replace(out=None), TypeError, "partials[0].out", "NoneType", "a torch, CuPy or NumPy array"),
            (parts(dtype=np.float16), TypeError, "partials[0].out", "dtype float16", "float32"),
            ([parts(), parts(dtype=np.float64)], TypeError, "partials[1].out", "dtype float64", "float32"),
            (parts(columns=33), ValueError, "partials[0].out", "head dim 33", "a multiple of 8 from 8 to 256"),
            ([parts(), parts(columns=64)], ValueError, "partials[1].out", "(1, 2, 5, 64)", "(1, 2, 5, 32)"),
            (
                parts()._replace(out=zeros(1, 2, 5, 32, dtype=np.float32)),
                ValueError,
                "partials[0].out",
                "shape (1, 2, 5, 32)",
                "5 dimensions (chunks, B, Hq, Lq, Dv)",
            ),
            (parts()._replace(sum=parts(3).sum), ValueError, "partials[0].sum", "(3, 1, 2, 5)", "(2, 1, 2, 5)"),
            (
                parts()._replace(reference=parts(4).sum[::2]),
                ValueError,
                "partials[0].reference",
                "strides (20, 10, 5, 1)",
                "(10, 10, 5, 1) (contiguous)",
            ),
            (
                parts()._replace(sum=torch.zeros(2, 1, 2, 5)),
                TypeError,
                "partials[0].sum",
                "a torch array",
                "an array of partials[0].out's library",
            ),
        ],
    )
    def test_partials(self, partials: Any, kind: type[Exception], argument: str, got: str, expected: str) -> None:
        assert_says(refused(cuattn.combine, partials, dtype="float16"), kind, argument, got, expected)

    def test_memory_off_16_bytes(self) -> None:
        memory = np.zeros(1000, np.float32)
        start = -memory.ctypes.data % 64 // 4 + 1
        wrong = parts()._replace(out=memory[start : start + 640].reshape(2, 1, 2, 5, 32))
        error = refused(cuattn.combine, wrong, dtype="float16")
        assert_says(error, ValueError, "partials[0].out", "memory at a multiple of 4 bytes", "16")

    @pytest.mark.parametrize("dtype", ["float64", "half", np.int16, torch.float64, np.dtype(">f2"), None])
    def test_dtype(self, dtype: Any) -> None:
        error = refused(cuattn.combine, parts(), dtype=dtype)
        assert_says(error, ValueError, "dtype", "", "one of 'float16', 'bfloat16', 'float32'")

    @pytest.mark.parametrize(
        "dtype", ["float16", np.float16, np.dtype("float16"), torch.float16, np.zeros(1, np.float16).dtype], ids=repr
    )
    def test_names_of_one_dtype(self, dtype: Any) -> None:
        assert cuattn.combine(parts(), dtype=dtype).dtype == np.float16

    def test_layout(self) -> None:
        error = refused(cuattn.combine, parts(), dtype="float16", layout="thd")
        assert_says(error, ValueError, "layout", "'thd'", "one of 'bhsd', 'bshd'")

    def test_out(self) -> None:
        def error(out: Any, partials: Any = None, dtype: str = "float16", layout: str = "bhsd") -> Exception:
            return refused(cuattn.combine, partials or parts(), dtype=dtype, layout=layout, out=out)

        assert_says(error(zeros(1, 2, 5, 64)), ValueError, "out", "(1, 2, 5, 64)", "(1, 2, 5, 32)")
        assert_says(error(zeros(1, 2, 5, 32), layout="bshd"), ValueError, "out", "(1, 2, 5, 32)", "(1, 5, 2, 32)")
        assert_says(error(zeros(1, 2, 5, 32, dtype=np.float32)), TypeError, "out", "dtype float32", "float16")
        one = parts(1)
        wrong = error(one.out[0], [parts(), one], "float32")
        assert_says(wrong, ValueError, "out", "the memory of partials[1].out", "memory of its own")


class TestChunkStarts:
    def test_numbers(self) -> None:
        assert cuattn.chunk_starts(0) == []
        assert cuattn.chunk_starts(1) == cuattn.chunk_starts(512) == [0]
        assert cuattn.chunk_starts(np.int64(4097)) == [0, 512, 1024, 1536, 2048, 3072, 4096]

    @pytest.mark.parametrize(("keys", "kind"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
    def test_no_number(self, keys: Any, kind: type[Exception]) -> None:
        got = "-1" if kind is ValueError else type(keys).__name__
        assert_says(refused(cuattn.chunk_starts, keys), kind, "keys", got, "an int of at least 0")


class TestParts:
    """Parts of the keys, merged, are the whole, bit for bit."""

    @pytest.mark.parametrize("mask", ["full", "causal"])
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_any_cut(self, mask: str, layout: str) -> None:
        random = np.random.default_rng(0)
        q, k, v = (random.standard_normal((2, 2, n, 64)).astype(np.float32) for n in (9, 2000, 2000))
        expected = cuattn.attention(q, k, v, mask, return_lse=True)
        shards = [
            cuattn.attention_partials(
                *(x.swapaxes(1, 2) if layout == "bshd" else x for x in (q, k[:, :, a:b], v[:, :, a:b])),
                mask,
                first_key=a,
                total_keys=2000,
                layout=layout,
            )
            for a, b in ((0, 512), (512, 512), (512, 2000))
        ]
        out = np.empty((2, 9, 2, 64), np.float32)
        result, lse = cuattn.combine(shards, dtype=q.dtype, layout="bshd", return_lse=True, out=out)
        assert result is out
        assert out.swapaxes(1, 2).tobytes() == expected[0].tobytes()
        assert lse.tobytes() == expected[1].tobytes()
        wrong = cuattn.combine(shards[::-1], dtype=q.dtype)  # another order of the fold
        assert wrong.tobytes() != expected[0].tobytes()
