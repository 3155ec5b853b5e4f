"""`cuattn.jax.attention`: attention that JAX differentiates, compiles and maps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuattn import backend, calls
from cuattn.checks import check_attention
from cuattn.errors import MissingDependencyError
from cuattn.problem import Problem


class _Options(NamedTuple):
    """What is known when JAX traces; ``backend`` is the one that is active then."""

    mask: str | None
    scale: float | None
    layout: str
    num_splits: int | None
    backend: backend.Backend


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: str | None = "full",
    *,
    scale: float | None = None,
    key_padding_mask: Any = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    num_splits: int | None = None,
    kv_lengths: Any = None,
) -> Any:
    """`cuattn.attention` of JAX arrays, with gradients for q, k and v.

    Arguments and results are those of `cuattn.attention`; in a compiled function all but the arrays are constants, and
    so is the backend: the one that is active when JAX traces. Gradients are those of `cuattn.attention_backward`, from
    the output and from the LSE. Kept for them: the arrays given, the output, the LSE. They cannot be differentiated
    again.

    Called directly, or by jax.grad, this works in JAX's own memory, on a CPU or a GPU. In jax.jit and jax.vmap it is a
    callback to the host (jax.pure_callback) and needs JAX's CPU platform; on another one the function raises. vmap
    makes the mapped dimension part of the batch, so that the bits are those of single calls.

    Guarantee and errors as in `cuattn.attention`; MissingDependencyError without JAX. All but the numbers in
    ``kv_lengths`` is checked when JAX traces.
    """
    jax = import_jax()
    options = _Options(mask, scale, layout, num_splits, backend.active())
    arrays = (q, k, v, key_padding_mask, kv_lengths)
    _checked(options, arrays)
    out, lse = _differentiable()(options, *jax.tree.map(jax.numpy.asarray, arrays))
    return (out, lse) if return_lse else out


def import_jax() -> Any:
    """The module jax. Raises MissingDependencyError, with the reason, if it does not import."""
    try:
        import jax
    except ImportError as error:
        raise MissingDependencyError(f"cuattn.jax needs JAX ({error}): pip install jax") from error
    return jax


def _checked(options: _Options, arrays: tuple[Any, ...]) -> Problem:
    """Checks shapes, dtypes and options by stand-ins of one row, which need no memory."""
    jax = import_jax()

    def stand_in(name: str, x: Any) -> Any:
        if x is None and name not in ("q", "k", "v"):
            return None
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a JAX array")
        return np.broadcast_to(np.zeros(x.shape[-1:], x.dtype), x.shape)

    q, k, v, padding, lengths = map(stand_in, ("q", "k", "v", "key_padding_mask", "kv_lengths"), arrays)
    mask, scale, layout, num_splits, _ = options
    return check_attention(q, k, v, mask, scale, padding, layout, num_splits, lengths)


@functools.cache
def _differentiable() -> Callable[..., Any]:
    """The function of options and arrays that JAX differentiates, giving the output and the LSE."""
    jax = import_jax()

    def results(options: _Options, *arrays: Any) -> Any:
        problem = _checked(options, arrays)
        shapes = [(problem.out_shape, arrays[0].dtype), (problem.lse_shape, np.float32)]
        return _called(_results, options, shapes, arrays)

    def gradients(options: _Options, *arrays: Any) -> Any:
        return _called(_gradients, options, [(x.shape, x.dtype) for x in arrays[:3]], arrays)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "cuattn.jax.attention: double backward is not supported, its gradients cannot be differentiated again"
        )

    once = jax.custom_jvp(gradients, nondiff_argnums=(0,))
    once.defjvp(refuse)
    function = jax.custom_vjp(results, nondiff_argnums=(0,))

    def forward(options: _Options, *arrays: Any) -> Any:
        made = function(options, *arrays)
        return made, (arrays, made)

    def backward(options: _Options, saved: Any, cotangents: Any) -> Any:
        arrays, made = saved
        return (*once(options, *arrays, *made, *cotangents), None, None)

    function.defvjp(forward, backward)
    return function  # type: ignore[no-any-return]


def _called(
    function: Callable[..., Any], options: _Options, shapes: list[tuple[Any, Any]], arrays: tuple[Any, ...]
) -> Any:
    """``function(options, *arrays)`` at once, or, of arrays that JAX traces, as a callback."""
    jax = import_jax()
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        return function(options, *arrays)
    expected = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)

    def callback(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: jax.pure_callback(of, expected, *arrays, vmap_method="broadcast_all")

    on_host = callback(functools.partial(_on_host, function, options, [0 if x is None else x.ndim for x in arrays]))
    return jax.lax.platform_dependent(*arrays, cpu=on_host, default=callback(_refuse_platform))


def _results(options: _Options, q: Any, k: Any, v: Any, padding: Any, lengths: Any) -> Any:
    mask, scale, layout, num_splits, chosen = options
    with backend.use_backend(chosen.name, chosen.arch):
        return calls.attention(q, k, v, mask, scale, padding, layout, num_splits, lengths, None, True)


def _gradients(
    options: _Options, q: Any, k: Any, v: Any, padding: Any, lengths: Any, out: Any, lse: Any, dout: Any, dlse: Any
) -> Any:
    mask, scale, layout, _, chosen = options
    with backend.use_backend(chosen.name, chosen.arch):
        return calls.attention_backward(dout, q, k, v, out, lse, dlse, mask, scale, padding, layout, lengths)


def _on_host(function: Callable[..., Any], options: _Options, ranks: list[int], *arrays: Any) -> Any:
    """``function`` of NumPy arrays; dimensions in front of a rank are mapped ones, of the same sizes in all arrays."""
    q = arrays[0]
    batch = q.shape[: q.ndim - ranks[0] + 1]

    def folded(x: Any, rank: int) -> Any:
        if x is None:
            return None
        return np.ascontiguousarray(x).reshape(math.prod(batch), *x.shape[x.ndim - rank + 1 :])

    results = function(options, *map(folded, arrays, ranks))
    return tuple(x.reshape(*batch, *x.shape[1:]) for x in results)


def _refuse_platform(*arrays: Any) -> Any:
    raise NotImplementedError(
        "cuattn.jax.attention: got arrays on another platform than the CPU in a function that JAX compiles or maps, "
        "expected arrays on the CPU, or a call outside of jax.jit and jax.vmap"
    )
