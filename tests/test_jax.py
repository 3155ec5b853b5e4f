"""`cuattn.jax`: the bits of `cuattn.attention` and of its gradients, called directly, compiled, mapped."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cuattn
from cuattn import dispatch
from cuattn import jax as module
from cuattn.errors import MissingDependencyError
from cuattn.interop.numpy_ import numpy_dtype
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal
from cuattn.testing.arrays import round_to_bits

attention = cuattn.jax.attention
Arrays = tuple[Any, ...]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3, "num_splits": 3},
    "kv_lengths": {"kv_lengths": np.array([4, 0], np.int32)},
    "key_padding_mask": {"key_padding_mask": np.arange(14).reshape(2, 7) % 3 > 0},
}
WAYS: dict[str, Callable[..., Any]] = {"direct": lambda f: f, "jit": jax.jit}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    numbers = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, np.float32)
    return jnp.asarray(round_to_bits(numbers, dtype).view(numpy_dtype(dtype)))


def inputs(batch: int = 2, dtype: str = "float32", layout: str = "bhsd") -> Arrays:
    shapes = (4, 5, 16), (2, 7, 16), (2, 7, 24)
    if layout == "bshd":
        shapes = tuple((length, heads, columns) for heads, length, columns in shapes)
    return tuple(normal(batch, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


def on_host(arrays: Any) -> Arrays:
    return tuple(np.asarray(x) for x in arrays)


def results_of(qkv: Arrays, mask: str, **options: Any) -> Arrays:
    return cuattn.attention(*on_host(qkv), mask, return_lse=True, **options)


def gradients_of(qkv: Arrays, mask: str, dout: Any, dlse: Any, **options: Any) -> Arrays:
    options.pop("num_splits", None)
    arrays = *on_host(qkv), *results_of(qkv, mask, **options)
    return cuattn.attention_backward(np.asarray(dout), *arrays, mask, dlse=np.asarray(dlse), **options)


def upstream(results: Arrays) -> Arrays:
    return tuple(normal(*x.shape, dtype=str(x.dtype), seed=10 + i) for i, x in enumerate(results))


def assert_all_equal(actual: Any, wanted: Any) -> None:
    for got, want in zip(actual, wanted, strict=True):
        assert isinstance(got, jax.Array)
        assert_bitwise_equal(got, want)


def pulled_back(function: Callable[..., Any], qkv: Arrays, given: Arrays) -> Arrays:
    return jax.vjp(function, *qkv)[1](given)


def both(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attention(q, k, v, "causal", return_lse=True, **options)


# Bits


@every_way
@every_dtype
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_results_and_gradients(options: dict[str, Any], layout: str, dtype: str, way: Callable[..., Any]) -> None:
    qkv = inputs(dtype=dtype, layout=layout)
    options = options | {"layout": layout}
    function = way(lambda *qkv: both(*qkv, **options))
    wanted = results_of(qkv, "causal", **options)
    assert_all_equal(function(*qkv), wanted)
    given = upstream(wanted)
    assert_all_equal(pulled_back(function, qkv, given), gradients_of(qkv, "causal", *given, **options))


def test_one_result_and_one_gradient() -> None:
    q, k, v = inputs()
    out, lse = results_of((q, k, v), "full")
    assert_all_equal([attention(q, k, v), attention(np.asarray(q), k, v, None)], [out, out])
    dout, dlse = upstream((out, lse))
    of_out, of_lse = (gradients_of((q, k, v), "full", *g) for g in ((dout, 0 * dlse), (0 * dout, dlse)))
    assert_all_equal([jax.grad(lambda k: (attention(q, k, v) * dout).sum())(k)], of_out[1:2])
    assert_all_equal([jax.grad(lambda k: (attention(q, k, v, return_lse=True)[1] * dlse).sum())(k)], of_lse[1:2])
    with pytest.raises(BitwiseMismatch):
        assert_all_equal([k], of_out[1:2])


@pytest.mark.parametrize("name", ["kv_lengths", "key_padding_mask"])
def test_numbers_may_be_traced(name: str) -> None:
    qkv, numbers = inputs(), OPTIONS[name][name]
    loss = jax.jit(jax.grad(lambda qkv, numbers: both(*qkv, **{name: numbers})[0].sum()))
    dout, dlse = np.ones((2, 4, 5, 24), np.float32), np.zeros((2, 4, 5), np.float32)
    wanted = gradients_of(qkv, "causal", dout, dlse, **{name: numbers})
    assert_all_equal(loss(qkv, jnp.asarray(numbers)), wanted)
    other = gradients_of(qkv, "causal", dout, dlse, **{name: np.ones_like(numbers)})
    assert_all_equal(loss(qkv, jnp.ones_like(numbers)), other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequences_gradients_do_not_depend_on_the_batch(dtype: str) -> None:
    qkv = inputs(3, dtype)
    given = upstream(results_of(qkv, "causal"))
    gradients = jax.jit(lambda qkv, given: pulled_back(both, qkv, given))

    def relative(q: Any, k: Any, v: Any) -> Any:
        """Mathematically the same, but relative to the largest query of the batch."""
        largest = jax.lax.stop_gradient(abs(q).max())
        return both(q / largest, k * largest, v)

    def assert_independent(gradients: Callable[..., Any]) -> None:
        together = gradients(qkv, given)
        alone = gradients(*(tuple(x[1:2] for x in arrays) for arrays in (qkv, given)))
        assert_all_equal(alone, [x[1:2] for x in together])

    assert_independent(gradients)
    with pytest.raises(BitwiseMismatch):
        assert_independent(lambda qkv, given: pulled_back(relative, qkv, given))


def test_large_arrays_pass_through_the_callback() -> None:
    q = normal(4, 2, 300, 64)
    assert_all_equal([jax.jit(lambda q: attention(q + 0, q, q))(q)], results_of((q, q, q), "full")[:1])


# vmap


def stacked(*arrays: Any, axis: int = 0) -> Arrays:
    return tuple(jnp.stack([x, -x, 2 * x], axis) for x in arrays)


@every_way
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_has_the_bits_of_single_calls(axis: int, way: Callable[..., Any]) -> None:
    q, k, v = inputs()
    lengths = jnp.asarray([[7, 2], [0, 1], [3, 5]], jnp.int32)
    mapped = jax.vmap(lambda q, k, v, n: both(q, k, v, kv_lengths=n), in_axes=(axis, None, 0, 0))
    queries, values = stacked(q, axis=axis)[0], stacked(v)[0]
    calls = [both(f * q, k, f * v, kv_lengths=n) for f, n in zip((1, -1, 2), lengths, strict=True)]
    assert_all_equal(way(mapped)(queries, k, values, lengths), map(np.stack, zip(*calls, strict=True)))


@every_way
def test_gradients_of_mapped_functions(way: Callable[..., Any]) -> None:
    qkv = stacked(*inputs())
    given = upstream(jax.vmap(both)(*qkv))

    def single(q: Any, k: Any, v: Any, dout: Any, dlse: Any) -> Any:
        out, lse = both(q, k, v)
        return (out * dout).sum() + (lse * dlse).sum()

    of_mapped = way(jax.grad(lambda *arrays: jax.vmap(single)(*arrays).sum(), (0, 1, 2)))
    mapped = way(jax.vmap(jax.grad(single, (0, 1, 2))))
    wanted = [gradients_of([x[i] for x in qkv], "causal", *(x[i] for x in given)) for i in range(3)]
    for gradients in (of_mapped, mapped):
        assert_all_equal(gradients(*qkv, *given), map(np.stack, zip(*wanted, strict=True)))


def test_vmap_of_vmap_and_of_nothing() -> None:
    nested = stacked(*stacked(*inputs()))
    out, lse = jax.vmap(jax.vmap(both))(*nested)
    for place in np.ndindex(3, 3):
        assert_all_equal((out[place], lse[place]), both(*(x[place] for x in nested)))
    out, lse = jax.vmap(both)(*(x[0, :0] for x in nested))
    assert (out.shape, lse.shape) == ((0, 2, 4, 5, 24), (0, 2, 4, 5))


# What JAX knows, and what is refused


def test_nothing_is_kept_but_inputs_and_results() -> None:
    qkv = inputs()
    kept = jax.tree.leaves(jax.vjp(lambda *qkv: both(*qkv), *qkv)[1])
    assert sorted(x.shape for x in kept) == sorted(x.shape for x in (*qkv, *both(*qkv)))


def test_a_compiled_function_keeps_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(dispatch, "execute", lambda *args: seen.append(cuattn.backend.active().name))
    function = jax.jit(lambda q: attention(q, q, q))
    with cuattn.use_backend("reference"):
        function(inputs()[0]).block_until_ready()
    function(inputs()[0]).block_until_ready()
    attention(*inputs())
    assert seen == ["reference", "reference", "auto"]


@every_way
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mask": "triangle"}, ValueError, "mask: got 'triangle', expected"),
        ({"layout": "sbhd"}, ValueError, "layout: got 'sbhd', expected"),
        ({"scale": float("nan")}, ValueError, "scale: got nan, expected"),
        ({"num_splits": 0}, ValueError, "num_splits: got 0, expected"),
        ({"q": np.zeros((4, 5, 16), np.float32)}, ValueError, "q: got shape (4, 5, 16), expected 4 dimensions"),
        ({"k": np.zeros((2, 2, 7, 24), np.float32)}, ValueError, "k: got head dim 24, expected q's 16"),
        ({"k": np.zeros((2, 2, 7, 16), np.float16)}, TypeError, "k: got dtype float16, expected q's float32"),
        ({"v": [1.0]}, TypeError, "v: got list, expected a JAX array"),
        ({"kv_lengths": np.zeros(3, np.int32)}, ValueError, "kv_lengths: got shape (3,), expected (batch,) (2,)"),
        ({"key_padding_mask": np.zeros((2, 7), np.int8)}, TypeError, "key_padding_mask: got dtype int8, expected bool"),
    ],
)
def test_wrong_arguments(
    changes: dict[str, Any], kind: type[Exception], message: str, way: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(dispatch, "execute", lambda *args: pytest.fail("computed something"))
    arguments = dict(zip("qkv", inputs(), strict=True)) | changes
    arrays = {
        name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], np.ndarray | jax.Array)
    }
    with pytest.raises(kind) as caught:
        way(lambda arrays: attention(**arrays, **arguments))(arrays)
    assert str(caught.value).startswith(message)


def test_wrong_numbers() -> None:
    q, k, v = inputs()
    lengths = np.array([1, 8], np.int32)
    with pytest.raises(ValueError, match=r"^kv_lengths: got \[1, 8\], expected numbers from 0 to k's length 7"):
        attention(q, k, v, kv_lengths=lengths)
    with pytest.raises(Exception, match=r"kv_lengths: got \[1, 8\], expected numbers from 0 to k's length 7"):
        jax.jit(lambda n: attention(q, k, v, kv_lengths=n))(lengths).block_until_ready()


@every_way
def test_double_backward_is_refused(way: Callable[..., Any]) -> None:
    q, k, v = inputs()
    once = jax.grad(lambda q: attention(q, k, v).sum())
    with pytest.raises(NotImplementedError, match=r"^cuattn.jax.attention: double backward is not supported"):
        way(jax.grad(lambda q: once(q).sum()))(q)
    for function in (once, lambda q: attention(q, k, v)):
        with pytest.raises((TypeError, NotImplementedError), match=r"forward-mode|double backward"):
            way(lambda q, f=function: jax.jvp(f, (q,), (q,)))(q)


def test_other_platforms_are_refused_in_compiled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    with pytest.raises(Exception, match="got arrays on another platform than the CPU in a function that JAX compiles"):
        jax.jit(lambda q: attention(q, q, q))(inputs()[0]).block_until_ready()


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(MissingDependencyError, match=r"^cuattn.jax needs JAX .*: pip install jax$"):
        module.import_jax()
    program = "import sys, cuattn; cuattn.jax; print(sorted({'jax', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.gpu
def test_gpu_arrays() -> None:
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"needs JAX with CUDA: {error}")
    qkv = tuple(jax.device_put(x, device) for x in inputs(dtype="bfloat16"))
    results = cuattn.attention(*qkv, "causal", return_lse=True)
    assert_all_equal(both(*qkv), results)
    given = tuple(jax.device_put(x, device) for x in upstream(results))
    dout, dlse = given
    wanted = cuattn.attention_backward(dout, *qkv, *results, "causal", dlse=dlse)
    assert_all_equal(pulled_back(both, qkv, given), wanted)
    with pytest.raises(Exception, match="got arrays on another platform than the CPU in a function that JAX compiles"):
        jax.block_until_ready(jax.jit(both)(*qkv))
