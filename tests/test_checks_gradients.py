"""Wrong arguments of gradients: refused before anything is allocated or launched, by name, got and expected."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from interop_arrays import Foreign
from refusals import assert_says, refused, short_id, zeros

import cuattn
from cuattn.checks import arrays, gradients
from cuattn.interop import Device, Tensor, import_tensor

OUT, LSE = (1, 4, 5, 32), (1, 4, 5)
PACKED_OUT, PACKED_LSE = (5, 4, 32), (4, 5)
STARTS = np.array([0, 2, 5], np.int32)


def dense(**changed: Any) -> dict[str, Any]:
    """Four query heads, two of keys; five rows, seven keys; values of 32 columns."""
    given = {"dout": zeros(*OUT), "q": zeros(1, 4, 5, 64), "k": zeros(1, 2, 7, 64), "v": zeros(1, 2, 7, 32)}
    return given | {"out": zeros(*OUT), "lse": zeros(*LSE, dtype=np.float32)} | changed


def packed(**changed: Any) -> dict[str, Any]:
    given = {"dout": zeros(*PACKED_OUT), "q": zeros(5, 4, 64), "k": zeros(7, 2, 64), "v": zeros(7, 2, 32)}
    given |= {"out": zeros(*PACKED_OUT), "lse": zeros(*PACKED_LSE, dtype=np.float32)}
    return given | {"cu_seqlens_q": STARTS, "cu_seqlens_k": np.array([0, 3, 7], np.int32)} | changed


def refusal(**changed: Any) -> Exception:
    return refused(cuattn.attention_backward, **dense(**changed))


def refusal_packed(**changed: Any) -> Exception:
    return refused(cuattn.attention_varlen_backward, **packed(**changed))


def shifted(shape: tuple[int, ...], elements: int) -> np.ndarray:
    """Memory that starts ``elements`` elements behind a multiple of 64 bytes."""
    memory = np.zeros(int(np.prod(shape)) + 64, np.float16)
    start = -memory.ctypes.data % 64 // 2 + elements
    return memory[start : start + int(np.prod(shape))].reshape(shape)


def test_what_is_given_here_is_right() -> None:
    assert [x.shape for x in cuattn.attention_backward(**dense())] == [dense()[name].shape for name in "qkv"]
    assert [x.shape for x in cuattn.attention_varlen_backward(**packed())] == [packed()[name].shape for name in "qkv"]


#: (array, exception, got, expected) in the place of dout or out.
WRONG = [
    (zeros(1, 4, 5, 64), ValueError, "shape (1, 4, 5, 64)", f"{OUT}"),
    (zeros(1, 5, 4, 32), ValueError, "shape (1, 5, 4, 32)", f"{OUT}"),
    (zeros(2, 4, 5, 32), ValueError, "shape (2, 4, 5, 32)", f"{OUT}"),
    (zeros(4, 5, 32), ValueError, "shape (4, 5, 32)", "4 dimensions (B, H, L, D)"),
    (zeros(*OUT, dtype=np.float32), TypeError, "dtype float32", "q's float16"),
    (zeros(*OUT, dtype=ml_dtypes.bfloat16), TypeError, "dtype bfloat16", "q's float16"),
    (zeros(*OUT, dtype=np.float64), TypeError, "dtype float64", "float16, bfloat16 or float32"),
    (torch.zeros(OUT, dtype=torch.float16), TypeError, "a torch array", "an array of q's library"),
    (jnp.zeros(OUT, jnp.float16), TypeError, "a dlpack array", "an array of q's library"),
    (Foreign(zeros(*OUT)), TypeError, "a dlpack array", "an array of q's library"),
    (None, TypeError, "NoneType", "a torch, CuPy or NumPy array"),
    ([0.0], TypeError, "list", "a torch, CuPy or NumPy array"),
    (zeros(1, 4, 5, 64)[..., ::2], ValueError, "stride 2 in the last dimension", "1 (contiguous)"),
    (shifted(OUT, 4), ValueError, "memory at a multiple of 8 bytes", "16"),
    (zeros(1, 4, 5, 36)[..., :32], ValueError, "a stride of 180 elements in the heads dimension", "a multiple of 8"),
]
#: In the place of lse or dlse.
WRONG_LSE = [
    (zeros(1, 4, 6, dtype=np.float32), ValueError, "shape (1, 4, 6)", f"{LSE}"),
    (zeros(1, 5, 4, dtype=np.float32), ValueError, "shape (1, 5, 4)", f"{LSE}"),
    (zeros(4, 5, dtype=np.float32), ValueError, "shape (4, 5)", f"{LSE}"),
    (zeros(*LSE), TypeError, "dtype float16", "float32"),
    (zeros(*LSE, dtype=np.float64), TypeError, "dtype float64", "float32"),
    (torch.zeros(LSE), TypeError, "a torch array", "an array of q's library"),
    (zeros(1, 4, 10, dtype=np.float32)[..., ::2], ValueError, "strides (40, 10, 2)", "(20, 5, 1) (contiguous)"),
    (zeros(1, 5, 4, dtype=np.float32).swapaxes(1, 2), ValueError, "strides (20, 1, 4)", "(20, 5, 1) (contiguous)"),
    ([0.0], TypeError, "list", "a torch, CuPy or NumPy array"),
]


@pytest.mark.parametrize("name", ["dout", "out"])
@pytest.mark.parametrize(("array", "kind", "got", "expected"), WRONG, ids=short_id)
def test_like_the_output(name: str, array: Any, kind: type[Exception], got: str, expected: str) -> None:
    assert_says(refusal(**{name: array}), kind, name, got, expected)


@pytest.mark.parametrize("name", ["lse", "dlse"])
@pytest.mark.parametrize(("array", "kind", "got", "expected"), WRONG_LSE, ids=short_id)
def test_like_the_lse(name: str, array: Any, kind: type[Exception], got: str, expected: str) -> None:
    assert_says(refusal(**{name: array}), kind, name, got, expected)


def test_an_lse_is_needed() -> None:
    assert_says(refusal(lse=None), TypeError, "lse", "NoneType", "a torch, CuPy or NumPy array")


@pytest.mark.parametrize("name", ["dout", "out"])
def test_shapes_in_the_callers_layout(name: str) -> None:
    swapped = {x: array.swapaxes(1, 2).copy() for x, array in dense().items() if array.ndim == 4}
    error = refusal(**swapped | {name: zeros(*OUT)}, layout="bshd")
    assert_says(error, ValueError, name, f"shape {OUT}", "(1, 5, 4, 32)")
    error = refusal_packed(**{name: zeros(4, 5, 32)})
    assert_says(error, ValueError, name, "shape (4, 5, 32)", f"{PACKED_OUT}")
    error = refusal_packed(**{name: zeros(1, *PACKED_OUT)})
    assert_says(error, ValueError, name, f"shape {(1, *PACKED_OUT)}", "3 dimensions (T, H, D)")


@pytest.mark.parametrize("name", ["lse", "dlse"])
def test_the_lse_of_packed_sequences(name: str) -> None:
    error = refusal_packed(**{name: zeros(5, 4, dtype=np.float32)})
    assert_says(error, ValueError, name, "shape (5, 4)", f"{PACKED_LSE}")
    error = refusal_packed(**{name: zeros(1, *PACKED_LSE, dtype=np.float32)})
    assert_says(error, ValueError, name, "shape (1, 4, 5)", f"{PACKED_LSE}")


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(array: Any, argument: str) -> Tensor:
        tensor = import_tensor(array, argument)
        return dataclasses.replace(tensor, device=Device("cuda", 0)) if argument == name else tensor

    for module in (arrays, gradients):
        monkeypatch.setattr(module, "import_tensor", moved)
    assert_says(refusal(dlse=zeros(*LSE, dtype=np.float32)), ValueError, name, "device cuda:0", "q's cpu")


def test_cpu_arrays_on_the_cuda_backend() -> None:
    with cuattn.use_backend("cuda"):
        for error in (refusal(), refusal_packed()):
            assert_says(error, ValueError, "q", "device cpu", "a cuda device for the backend 'cuda'")


@pytest.mark.parametrize(
    ("changed", "kind", "argument", "got", "expected"),
    [
        ({"q": zeros(1, 3, 5, 64)}, ValueError, "q", "3 heads", "a multiple of the 2 heads of k and v"),
        ({"q": zeros(4, 5, 64)}, ValueError, "q", "shape (4, 5, 64)", "4 dimensions (B, H, L, D)"),
        ({"k": zeros(1, 2, 7, 32)}, ValueError, "k", "head dim 32", "q's 64"),
        ({"k": zeros(3, 2, 7, 64), "v": zeros(3, 2, 7, 32)}, ValueError, "k", "batch size 3", "q's 1"),
        ({"v": zeros(1, 2, 6, 32)}, ValueError, "v", "(batch, heads, length) (1, 2, 6)", "k's (1, 2, 7)"),
        ({"v": zeros(1, 2, 7, 33)}, ValueError, "v", "head dim 33", "a multiple of 8 from 8 to 256"),
        ({"v": zeros(1, 2, 7, 32, dtype=np.float32)}, TypeError, "v", "dtype float32", "q's float16"),
        ({"mask": "Causal"}, ValueError, "mask", "'Causal'", "one of 'full', 'causal'"),
        ({"mask": True}, TypeError, "mask", "bool", "one of 'full', 'causal'"),
        ({"scale": np.nan}, ValueError, "scale", "nan", "None or a finite float"),
        ({"scale": "1"}, TypeError, "scale", "str", "None or a finite float"),
        ({"layout": "sbhd"}, ValueError, "layout", "'sbhd'", "one of 'bhsd', 'bshd'"),
        ({"key_padding_mask": zeros(1, 7)}, TypeError, "key_padding_mask", "dtype float16", "bool"),
        ({"key_padding_mask": zeros(1, 5, dtype=bool)}, ValueError, "key_padding_mask", "shape (1, 5)", "(1, 7)"),
        ({"kv_lengths": np.array([8], np.int32)}, ValueError, "kv_lengths", "[8]", "numbers from 0 to k's length 7"),
        ({"kv_lengths": np.array([7, 7], np.int32)}, ValueError, "kv_lengths", "shape (2,)", "(batch,) (1,)"),
        ({"kv_lengths": np.array([7])}, TypeError, "kv_lengths", "dtype int64", "int32"),
        (
            {"key_padding_mask": np.ones((1, 7), bool), "kv_lengths": np.array([7], np.int32)},
            ValueError,
            "key_padding_mask",
            "a mask beside kv_lengths",
            "one of the two",
        ),
    ],
    ids=short_id,
)
def test_what_attention_refuses(
    changed: dict[str, Any], kind: type[Exception], argument: str, got: str, expected: str
) -> None:
    assert_says(refusal(**changed), kind, argument, got, expected)


@pytest.mark.parametrize(
    ("changed", "kind", "argument", "got", "expected"),
    [
        ({"q": zeros(1, 4, 5, 64)}, ValueError, "q", "shape (1, 4, 5, 64)", "3 dimensions (T, H, D)"),
        ({"cu_seqlens_q": np.array([0, 2, 4], np.int32)}, ValueError, "cu_seqlens_q", "[0, 2, 4]", "the 5 tokens"),
        ({"cu_seqlens_k": np.array([0, 8, 7], np.int32)}, ValueError, "cu_seqlens_k", "[0, 8, 7]", "the 7 tokens"),
        ({"cu_seqlens_k": np.array([0, 7], np.int32)}, ValueError, "cu_seqlens_k", "shape (2,)", "cu_seqlens_q's (3,)"),
        ({"cu_seqlens_q": np.array([0, 2, 5])}, TypeError, "cu_seqlens_q", "dtype int64", "int32"),
        ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q", "list", "a torch, CuPy or NumPy array"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q", "-1", "None or an int of at least 0"),
        ({"max_seqlen_k": 2.0}, TypeError, "max_seqlen_k", "float", "None or an int of at least 0"),
        ({"mask": "window"}, ValueError, "mask", "'window'", "one of 'full', 'causal'"),
        ({"scale": np.inf}, ValueError, "scale", "inf", "None or a finite float"),
    ],
    ids=short_id,
)
def test_what_packed_attention_refuses(
    changed: dict[str, Any], kind: type[Exception], argument: str, got: str, expected: str
) -> None:
    assert_says(refusal_packed(**changed), kind, argument, got, expected)


def test_strides_of_single_elements_do_not_matter() -> None:
    odd = np.lib.stride_tricks.as_strided
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 64)).astype(np.float16)
    view, lse = odd(x, x.shape, (6, 10, 14, 2)), odd(zeros(1, 1, 1, dtype=np.float32), (1, 1, 1), (4, 8, 12))
    results = cuattn.attention_backward(view, view, view, view, view, lse, dlse=lse)
    for got, expected in zip(results, cuattn.attention_backward(x, x, x, x, x, lse.copy(), dlse=None), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_there_are_no_other_arguments() -> None:
    for name in ("num_splits", "return_lse", "grad"):
        with pytest.raises(TypeError, match=name):
            cuattn.attention_backward(**dense(**{name: None}))
