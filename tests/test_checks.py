"""Bad input: refused before anything is allocated or launched, by an error that names argument, got and expected."""

import dataclasses
import math
import re
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from backends import REFERENCE, attention_on, on_every_backend
from interop_arrays import Foreign
from refusals import assert_says, forbid_work, zeros

import cuattn
from cuattn import checks
from cuattn.checks import arrays, outputs
from cuattn.interop import Device, Tensor, import_tensor
from cuattn.launches import Target
from cuattn.schedule import plan_forward, plan_partials
from cuattn.testing.subject import Operation

CUDA = Device("cuda", 0)
FLOATS = "float16, bfloat16 or float32"


def shifted(elements: int, dtype: Any = np.float16) -> np.ndarray:
    """(1, 2, 5, 64), its memory ``elements`` elements behind a multiple of 64 bytes."""
    memory = np.zeros(1024, dtype)
    start = -memory.ctypes.data % 64 // memory.itemsize + elements
    return memory[start : start + 640].reshape(1, 2, 5, 64)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls attention and returns its exception; fails if anything is allocated or launched."""

    forbid_work(monkeypatch)

    def call(q: Any = None, k: Any = None, v: Any = None, *args: Any, **options: Any) -> Exception:
        q = zeros(1, 2, 5, 64) if q is None else q
        k = zeros(1, 2, 7, 64) if k is None else k
        v = np.array(k) if v is None and isinstance(k, np.ndarray) else k if v is None else v
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
            cuattn.attention(q, k, v, *args, **options)
        return caught.value

    return call


class TestArrays:
    @pytest.mark.parametrize("dtype", ["float64", "int64", "int8", "uint16", "bool", ">f2", "complex64"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_dtype(self, refusal: Any, name: str, dtype: str) -> None:
        wrong = {name: zeros(1, 2, 5, 64, dtype=dtype)}
        assert_says(refusal(**wrong), TypeError, name, f"dtype {dtype}", FLOATS)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
    def test_torch_dtype(self, refusal: Any, dtype: torch.dtype) -> None:
        q = torch.zeros(1, 2, 5, 64, dtype=dtype)
        got = str(dtype).removeprefix("torch.")
        assert_says(refusal(q, q), TypeError, "q", f"dtype {got}", FLOATS)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("name", ["k", "v"])
    def test_mixed_dtypes(self, refusal: Any, name: str, dtype: str) -> None:
        wrong = {name: zeros(1, 2, 7, 64, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}
        assert_says(refusal(**{"v": zeros(1, 2, 7, 64)} | wrong), TypeError, name, f"dtype {dtype}", "q's float16")

    @pytest.mark.parametrize("name", ["k", "v"])
    @pytest.mark.parametrize(("make", "library"), [(torch.zeros, "torch"), (jnp.zeros, "dlpack")])
    def test_mixed_libraries(self, refusal: Any, name: str, make: Any, library: str) -> None:
        wrong = {name: make((1, 2, 7, 64), dtype=torch.float16 if library == "torch" else jnp.float16)}
        error = refusal(**{"v": zeros(1, 2, 7, 64)} | wrong)
        assert_says(error, TypeError, name, f"a {library} array", "an array of q's library")

    @pytest.mark.parametrize("name", ["k", "v"])
    def test_mixed_devices(self, refusal: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def moved(array: Any, argument: str) -> Tensor:
            tensor = import_tensor(array, argument)
            return dataclasses.replace(tensor, device=CUDA) if argument == name else tensor

        monkeypatch.setattr(arrays, "import_tensor", moved)
        assert_says(refusal(), ValueError, name, "device cuda:0", "q's cpu")

    @pytest.mark.parametrize("shape", [(), (64,), (5, 64), (2, 5, 64), (1, 1, 2, 5, 64)])
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_rank(self, refusal: Any, name: str, layout: str, shape: tuple[int, ...]) -> None:
        error = refusal(**{name: zeros(*shape)}, layout=layout)
        if name == "k" and len(shape) != 4:
            error = refusal(k=zeros(*shape), v=zeros(1, 2, 7, 64), layout=layout)
        letters = {"bhsd": "(B, H, L, D)", "bshd": "(B, L, H, D)"}[layout]
        assert_says(error, ValueError, name, f"shape {shape}", f"4 dimensions {letters}")

    def test_rank_of_packed_arrays(self) -> None:
        q, starts = zeros(1, 2, 5, 64), np.array([0, 5], np.int32)
        with pytest.raises(ValueError, match=r"^q: got shape \(1, 2, 5, 64\), expected 3 dimensions \(T, H, D\)$"):
            cuattn.attention_varlen(q, q, q, starts, starts)

    @pytest.mark.parametrize("thing", [None, 3.0, "q", [[[[1.0]]]], object(), SimpleNamespace(shape=(1, 1, 1, 64))])
    def test_no_array(self, refusal: Any, thing: Any) -> None:
        with pytest.raises(TypeError, match=rf"k: got {type(thing).__name__}, expected a torch, CuPy or NumPy array"):
            cuattn.attention(zeros(1, 2, 5, 64), thing, zeros(1, 2, 7, 64))

    def test_memory_of_no_cpu_or_gpu(self, refusal: Any) -> None:
        sparse = torch.zeros(1, 2, 5, 64, dtype=torch.float16).to_sparse()
        assert_says(
            refusal(sparse, sparse), TypeError, "q", "a tensor of layout torch.sparse_coo", "CPU or CUDA memory"
        )

    def test_gpu_arrays_on_a_cpu_backend(self, refusal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            arrays, "import_tensor", lambda a, name: dataclasses.replace(import_tensor(a, name), device=CUDA)
        )
        for backend in ("reference", "emulator"):
            with cuattn.use_backend(backend):
                assert_says(refusal(), ValueError, "q", "device cuda:0", f"a cpu device for the backend {backend!r}")

    def test_cpu_arrays_on_the_cuda_backend(self, refusal: Any) -> None:
        with cuattn.use_backend("cuda"):
            assert_says(refusal(), ValueError, "q", "device cpu", "a cuda device for the backend 'cuda'")


class TestShapes:
    @pytest.mark.parametrize("head_dim", [0, 1, 4, 63, 65, 100, 132, 255, 264, 512])
    def test_head_dims(self, refusal: Any, head_dim: int) -> None:
        error = refusal(zeros(1, 2, 5, head_dim), zeros(1, 2, 7, head_dim))
        assert_says(error, ValueError, "q", f"head dim {head_dim}", "a multiple of 8 from 8 to 256")
        error = refusal(v=zeros(1, 2, 7, head_dim))
        assert_says(error, ValueError, "v", f"head dim {head_dim}", "a multiple of 8 from 8 to 256")

    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 4), (3, 2), (4, 3), (1, 0)])
    def test_heads_that_do_not_divide(self, refusal: Any, heads: int, kv_heads: int) -> None:
        error = refusal(zeros(1, heads, 5, 64), zeros(1, kv_heads, 7, 64))
        assert_says(error, ValueError, "q", f"{heads} heads", f"a multiple of the {kv_heads} heads of k and v")

    def test_heads_are_found_by_the_layout(self, refusal: Any) -> None:
        error = refusal(zeros(1, 5, 3, 64), zeros(1, 7, 2, 64), layout="bshd")
        assert_says(error, ValueError, "q", "3 heads", "a multiple of the 2 heads of k and v")

    @pytest.mark.parametrize("shape", [(2, 2, 7, 64), (1, 1, 7, 64), (1, 2, 6, 64), (3, 2, 7, 128)])
    def test_keys_and_values_of_other_shapes(self, refusal: Any, shape: tuple[int, ...]) -> None:
        error = refusal(v=zeros(*shape))
        assert_says(error, ValueError, "v", f"(batch, heads, length) {shape[:3]}", "k's (1, 2, 7)")

    def test_batch_and_head_dim_of_the_keys(self, refusal: Any) -> None:
        assert_says(refusal(k=zeros(3, 2, 7, 64)), ValueError, "k", "batch size 3", "q's 1")
        assert_says(refusal(k=zeros(1, 2, 7, 128)), ValueError, "k", "head dim 128", "q's 64")

    @pytest.mark.parametrize("name", ["q", "k"])
    def test_lengths_beyond_32_bits(self, refusal: Any, name: str) -> None:
        long = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(1, 1, 2**31, 64)
        short = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
        error = refusal(long, short) if name == "q" else refusal(short, long)
        assert_says(error, ValueError, name, f"shape {tuple(long.shape)}", "dimensions of at most 2147479552")

    def test_more_blocks_than_a_launch_has(self) -> None:
        q = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(2**16, 2**15, 200, 64)
        problem = checks.check_attention(q, q, q, "full", None, None, "bhsd", None)
        lse = dataclasses.replace(problem.query, shape=problem.query.shape[:3])
        with pytest.raises(ValueError, match=r"^q: got \d{10} tiles of \d+ rows, expected at most 2147483647$"):
            plan_forward(problem, problem.query, lse, Target("sm_80", 108), lambda *_: pytest.fail("allocated"))

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
    def test_more_tiles_of_keys_than_blocks_count(self, arch: str) -> None:
        q, k = (torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(2**10, 2**6, n, 64) for n in (1, 2**23))
        problem = checks.check_attention(q, k, k, "full", None, None, "bhsd", None)
        lse = dataclasses.replace(problem.query, shape=problem.query.shape[:3])
        target, allocate = Target(arch, 108), lambda *_: pytest.fail("allocated")
        error = r"^q: got \d{10} tiles of \d+ rows and 128 keys, expected at most 2147483647 for few rows"
        with pytest.raises(ValueError, match=error):
            plan_forward(problem, problem.query, lse, target, allocate)
        with pytest.raises(ValueError, match=error):
            plan_partials(problem, {"sum": lse}, 0, 2**23, target)


class TestOptions:
    @pytest.mark.parametrize("mask", ["Causal", "", "window", "padding"])
    def test_unknown_mask(self, refusal: Any, mask: str) -> None:
        assert_says(refusal(mask=mask), ValueError, "mask", repr(mask), "one of 'full', 'causal'")

    @pytest.mark.parametrize("mask", [True, 1, zeros(5, 7), ["causal"]])
    def test_mask_that_is_no_name(self, refusal: Any, mask: Any) -> None:
        assert_says(refusal(mask=mask), TypeError, "mask", type(mask).__name__, "one of 'full', 'causal'")

    def test_layout(self, refusal: Any) -> None:
        assert_says(refusal(layout="sbhd"), ValueError, "layout", "'sbhd'", "one of 'bhsd', 'bshd'")
        assert_says(refusal(layout=None), TypeError, "layout", "NoneType", "one of 'bhsd', 'bshd'")

    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, np.float32("inf"), 10**400, Fraction(10**400)])
    def test_scale_that_is_not_finite(self, refusal: Any, scale: Any) -> None:
        error = refusal(scale=scale)
        assert type(error) is ValueError
        assert re.fullmatch(r"scale: got .+, expected None or a finite float", str(error))

    @pytest.mark.parametrize("scale", ["0.5", "x", True, 1j, [0.5], zeros(1), torch.tensor(0.5)])
    def test_scale_that_is_no_number(self, refusal: Any, scale: Any) -> None:
        """A tensor is refused: reading it would wait for its device."""
        assert_says(refusal(scale=scale), TypeError, "scale", type(scale).__name__, "None or a finite float")

    @pytest.mark.parametrize("num_splits", [0, -1, np.int64(0)])
    def test_num_splits_below_one(self, refusal: Any, num_splits: Any) -> None:
        error = refusal(num_splits=num_splits)
        assert_says(error, ValueError, "num_splits", str(num_splits), "None or an int of at least 1")

    @pytest.mark.parametrize("num_splits", [1.5, 2.0, np.float32(2), True, False, "2", (2,), torch.tensor(2)])
    def test_num_splits_that_is_no_int(self, refusal: Any, num_splits: Any) -> None:
        error = refusal(num_splits=num_splits)
        assert_says(error, TypeError, "num_splits", type(num_splits).__name__, "None or an int of at least 1")

    def test_counts_may_be_of_any_integer_type(self) -> None:
        q, starts = zeros(5, 2, 64), np.array([0, 5], np.int32)
        three = np.int64(3)
        attention = attention_on(REFERENCE)
        assert attention(q[None], q[None], q[None], num_splits=three).shape == (1, 5, 2, 64)
        packed = cuattn.attention_varlen(q, q, q, starts, starts, max_seqlen_q=three, num_splits=three)
        assert packed.shape == q.shape

    @pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
    @pytest.mark.parametrize(("bound", "kind"), [(-1, ValueError), (5.0, TypeError), (True, TypeError)])
    def test_largest_lengths(self, name: str, bound: Any, kind: type[Exception]) -> None:
        q, starts = zeros(5, 2, 64), np.array([0, 5], np.int32)
        with pytest.raises(kind, match=rf"^{name}: got .+, expected None or an int of at least 0$"):
            cuattn.attention_varlen(q, q, q, starts, starts, **{name: bound})

    @pytest.mark.parametrize(
        ("mask", "kind", "got", "expected"),
        [
            (zeros(1, 7, dtype=np.uint8), TypeError, "dtype uint8", "bool"),
            (zeros(1, 7, dtype=np.float32), TypeError, "dtype float32", "bool"),
            (zeros(7, dtype=bool), ValueError, "shape (7,)", "(batch, k's length) (1, 7)"),
            (zeros(1, 5, dtype=bool), ValueError, "shape (1, 5)", "(batch, k's length) (1, 7)"),
            (zeros(1, 2, 5, 7, dtype=bool), ValueError, "shape (1, 2, 5, 7)", "(batch, k's length) (1, 7)"),
            (torch.ones(1, 7, dtype=torch.bool), TypeError, "a torch array", "an array of q's library"),
            ([[True] * 7], TypeError, "list", "a torch, CuPy or NumPy array"),
        ],
        ids=str,
    )
    def test_key_padding_mask(self, refusal: Any, mask: Any, kind: type[Exception], got: str, expected: str) -> None:
        assert_says(refusal(key_padding_mask=mask), kind, "key_padding_mask", got, expected)

    def test_key_padding_mask_beside_lengths(self, refusal: Any) -> None:
        error = refusal(key_padding_mask=np.ones((1, 7), bool), kv_lengths=np.array([7], np.int32))
        assert_says(error, ValueError, "key_padding_mask", "a mask beside kv_lengths", "one of the two")


class TestMemory:
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_last_dimension(self, refusal: Any, name: str) -> None:
        wrong = {name: zeros(1, 2, 7, 128)[..., ::2]}
        assert_says(refusal(**wrong), ValueError, name, "stride 2 in the last dimension", "1 (contiguous)")
        wrong = {name: zeros(1, 2, 7, 64)[..., ::-1]}
        assert_says(refusal(**wrong), ValueError, name, "stride -1 in the last dimension", "1 (contiguous)")
        wrong = {name: np.broadcast_to(zeros(1, 2, 7, 1), (1, 2, 7, 64))}
        assert_says(
            refusal(**{"v": zeros(1, 2, 7, 64)} | wrong),
            ValueError,
            name,
            "stride 0 in the last dimension",
            "1 (contiguous)",
        )

    @pytest.mark.parametrize("elements", [1, 2, 4])
    def test_pointer(self, refusal: Any, elements: int) -> None:
        got = f"memory at a multiple of {2 * elements} bytes"
        assert_says(refusal(shifted(elements)), ValueError, "q", got, "16")
        assert_says(refusal(out=shifted(elements)), ValueError, "out", got, "16")

    @pytest.mark.parametrize(
        ("shape", "columns", "axis"), [((1, 1, 5), 68, "tokens"), ((1, 5, 1), 65, "heads"), ((5, 1, 1), 66, "batch")]
    )
    def test_strides(self, refusal: Any, shape: tuple[int, ...], columns: int, axis: str) -> None:
        view, k = zeros(*shape, columns)[..., :64], zeros(shape[0], shape[1], 7, 64)
        got, expected = f"a stride of {columns} elements in the {axis} dimension", "a multiple of 8 (16 bytes)"
        assert_says(refusal(view, k), ValueError, "q", got, expected)
        assert_says(refusal(view, k, v=view), ValueError, "v", f"{view.shape[:3]}", f"k's {k.shape[:3]}")
        assert_says(refusal(k.copy(), view), ValueError, "k", got, expected)
        assert_says(refusal(zeros(*view.shape), k, out=view), ValueError, "out", got, expected)

    @on_every_backend
    def test_strides_of_single_elements_do_not_matter(self, attention: Operation) -> None:
        """Also what frameworks leave there: any number at all."""
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 1, 64)).astype(np.float16)
        odd = np.lib.stride_tricks.as_strided
        views = [odd(x, (1, 1, 1, 64), (6, 10, 14, 2)) for x in (q, k, v)]
        np.testing.assert_array_equal(attention(*views), attention(q, k, v))
        out = odd(np.full_like(q, np.nan), (1, 1, 1, 64), (6, 10, 14, 2))
        assert attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, attention(q, k, v))


class TestOut:
    @pytest.mark.parametrize(
        ("out", "kind", "got", "expected"),
        [
            (zeros(1, 2, 7, 64), ValueError, "shape (1, 2, 7, 64)", "(1, 2, 5, 64)"),
            (zeros(2, 5, 64), ValueError, "shape (2, 5, 64)", "(1, 2, 5, 64)"),
            (zeros(1, 2, 5, 32), ValueError, "shape (1, 2, 5, 32)", "(1, 2, 5, 64)"),
            (zeros(1, 2, 5, 64, dtype=np.float32), TypeError, "dtype float32", "float16"),
            (zeros(1, 2, 5, 64, dtype=ml_dtypes.bfloat16), TypeError, "dtype bfloat16", "float16"),
            (torch.zeros(1, 2, 5, 64, dtype=torch.float16), TypeError, "a torch array", "an array of q's library"),
            (Foreign(zeros(1, 2, 5, 64)), TypeError, "a dlpack array", "an array of q's library"),
            (np.broadcast_to(zeros(1, 1, 5, 64), (1, 2, 5, 64)), ValueError, "read-only memory", "memory to write to"),
            (zeros(1, 2, 5, 128)[..., ::2], ValueError, "stride 2 in the last dimension", "1 (contiguous)"),
            (zeros(1, 2, 5, 68)[..., :64], ValueError, "a stride of 340 elements in the heads dimension", "8"),
        ],
    )
    def test_other_than_the_result(self, refusal: Any, out: Any, kind: Any, got: str, expected: str) -> None:
        assert_says(refusal(out=out), kind, "out", got, expected)

    def test_no_array(self, refusal: Any) -> None:
        error = refusal(out=[0.0])
        assert str(error).startswith("out: got list, expected a torch, CuPy or NumPy array")

    def test_shape_in_the_callers_layout(self, refusal: Any) -> None:
        error = refusal(zeros(1, 5, 2, 64), zeros(1, 7, 2, 64), out=zeros(1, 2, 5, 64), layout="bshd")
        assert_says(error, ValueError, "out", "shape (1, 2, 5, 64)", "(1, 5, 2, 64)")

    def test_device(self, refusal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def moved(array: Any, argument: str) -> Tensor:
            tensor = import_tensor(array, argument)
            return dataclasses.replace(tensor, device=CUDA) if argument == "out" else tensor

        monkeypatch.setattr(outputs, "import_tensor", moved)
        assert_says(refusal(out=zeros(1, 2, 5, 64)), ValueError, "out", "device cuda:0", "cpu")

    def test_immutable_arrays(self, refusal: Any) -> None:
        q = jnp.zeros((1, 2, 5, 64), jnp.float16)
        error = refusal(q, q, out=jnp.zeros((1, 2, 5, 64), jnp.float16))
        assert_says(error, ValueError, "out", "read-only memory", "memory to write to")

    @pytest.mark.parametrize("strides", [(640, 0, 64, 1), (640, 320, 0, 1), (640, 320, 8, 1), (640, 64, 64, 1)])
    def test_elements_that_share_memory(self, refusal: Any, strides: tuple[int, ...]) -> None:
        memory = torch.zeros(640, dtype=torch.float16)
        q, k = torch.zeros(1, 2, 5, 64).half(), torch.zeros(1, 2, 7, 64).half()
        error = refusal(q, k, out=memory.as_strided((1, 2, 5, 64), strides))
        assert_says(error, ValueError, "out", "", "memory of its own for every element")

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    @pytest.mark.parametrize("rows", [0, 1, -1])
    def test_memory_of_an_input(self, refusal: Any, name: str, rows: int) -> None:
        """The same memory, and some rows before or behind it."""
        memory = zeros(1, 1, 9, 64)
        arrays = {x: zeros(1, 1, 7, 64) for x in "qkv"} | {name: memory[:, :, 1:8]}
        error = refusal(**arrays, out=memory[:, :, 1 + rows : 8 + rows])
        assert_says(error, ValueError, "out", f"the memory of {name}", "memory of its own")

    def test_between_the_rows_of_an_input(self) -> None:
        """Views of one array that share no element."""
        attention = attention_on(REFERENCE)
        memory = np.random.default_rng(0).standard_normal((1, 1, 6, 2, 64)).astype(np.float16)
        q, out = memory[:, :, :, 0], memory[:, :, :, 1]
        expected = attention(q.copy(), q.copy(), q.copy())
        assert attention(q, q, q, out=out) is out
        np.testing.assert_array_equal(out, expected)


class TestNothing:
    """No rows, no keys, no heads, no batch."""

    @on_every_backend
    @pytest.mark.parametrize("shape", [(0, 2, 5, 64), (3, 0, 5, 64), (3, 2, 0, 64)], ids=["batch", "heads", "rows"])
    @pytest.mark.parametrize("mask", ["full", "causal"])
    def test_no_rows(self, attention: Operation, shape: tuple[int, ...], mask: str) -> None:
        k = zeros(shape[0], shape[1], 7, 64)
        out, lse = attention(zeros(*shape), k, k.copy(), mask, return_lse=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (shape, np.float16, shape[:3], np.float32)
        given = zeros(*shape)
        assert attention(zeros(*shape), k, k.copy(), mask, out=given) is given

    @on_every_backend
    @pytest.mark.parametrize("mask", ["full", "causal"])
    def test_no_keys(self, attention: Operation, mask: str) -> None:
        out = np.full((3, 2, 5, 64), np.nan, np.float16)
        _, lse = attention(zeros(3, 2, 5, 64), zeros(3, 1, 0, 64), zeros(3, 1, 0, 64), mask, return_lse=True, out=out)
        assert not out.view(np.uint16).any()
        assert (lse == -np.inf).all()

    @on_every_backend
    def test_torch(self, attention: Operation) -> None:
        q, k = torch.zeros(2, 3, 0, 64, dtype=torch.bfloat16), torch.zeros(2, 3, 4, 64, dtype=torch.bfloat16)
        out, lse = attention(q, k, k, return_lse=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 3, 0), torch.float32)
        out, lse = attention(k, q, q, return_lse=True, out=torch.full_like(k, torch.nan))
        assert not out.any()
        assert (lse == -torch.inf).all()
