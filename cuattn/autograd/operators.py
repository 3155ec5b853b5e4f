"""The four operators: what they compute, their shapes, their gradients, and what becomes of mapped dimensions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from cuattn import backend, calls
from cuattn.checks import LETTERS, check_rank
from cuattn.problem import PACKED

_ALIGNMENT = 16


# What the operators compute: of plain tensors, on the active backend.


def _attention(
    q: Any, k: Any, v: Any, padding: Any, lengths: Any, mask: str, scale: float | None, layout: str, splits: int | None
) -> Any:
    return calls.attention(q, k, v, mask, scale, padding, layout, splits, lengths, None, True)


def _varlen(
    q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, mask: str, scale: float | None, splits: int | None
) -> Any:
    return calls.attention_varlen(q, k, v, starts_q, starts_k, mask, None, None, scale, splits, None, True)


def _attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    padding: Any,
    lengths: Any,
    mask: str,
    scale: float | None,
    layout: str,
) -> Any:
    arrays = readable(dout), q, k, v, out, lse, _contiguous(dlse)
    return calls.attention_backward(*arrays, mask, scale, padding, layout, lengths)


def _varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    starts_q: Any,
    starts_k: Any,
    mask: str,
    scale: float | None,
) -> Any:
    arrays = readable(dout), q, k, v, out, lse, _contiguous(dlse)
    return calls.attention_varlen_backward(*arrays, starts_q, starts_k, mask, None, None, scale)


def readable(x: Any) -> Any:
    """A tensor as kernels read it, of any strides and any part of a larger array, such as autograd hands over."""
    aligned = _has_no_pointer(x) or x.data_ptr() % _ALIGNMENT == 0
    return x if aligned and _has_readable_strides(x) else x.clone(memory_format=torch.contiguous_format)


def _has_no_pointer(x: Any) -> bool:
    return torch.compiler.is_compiling() or not are_plain((x,)) or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _has_readable_strides(x: Any) -> bool:
    """A contiguous last dimension, rows at multiples of 16 bytes."""
    *rows, columns = zip(x.shape, x.stride(), strict=True)
    size = x.element_size()
    return all(n == 1 or stride * size % _ALIGNMENT == 0 for n, stride in rows) and (columns[0] == 1 or columns[1] == 1)


def _contiguous(x: Any) -> Any:
    return None if x is None else x.contiguous()


# Shapes, for tensors without data.


def _fake_results(layout: str, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    for name, x in zip("qkv", (q, k, v), strict=True):
        check_rank(name, tuple(x.shape), LETTERS[layout])
    *batch, tokens, heads, _ = q.shape
    if layout == "bhsd":
        tokens, heads = heads, tokens
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((*batch, heads, tokens), dtype=torch.float32)


def _fake_attention(
    q: Any, k: Any, v: Any, padding: Any, lengths: Any, mask: str, scale: Any, layout: str, _: Any
) -> Any:
    return _fake_results(layout, q, k, v)


def _fake_varlen(q: Any, k: Any, v: Any, *others: Any) -> Any:
    return _fake_results(PACKED, q, k, v)


def _fake_gradients(dout: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Gradients.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    """For a backward pass: the arrays and the results, the options, and the backend, which may be another then."""
    *arrays, mask, scale = inputs[:7]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arrays, *output)
    ctx.options = (mask, scale, *inputs[7:-1])
    ctx.backend = backend.active()


def _pull_back(operator: Callable[..., Any], ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    *arrays, out, lse = ctx.saved_tensors
    q, k, v, *numbers = arrays
    constants = (None,) * (len(numbers) + len(ctx.options) + 1)
    if dout is None and dlse is None:
        return (None, None, None, *constants)
    if dout is None:
        dout = torch.zeros_like(out)
    inputs = dout, q, k, v, out, lse, dlse, *numbers, *ctx.options
    if torch.compiler.is_compiling():  # for whichever backend is active when it runs
        return (*operator(*inputs), *constants)
    with backend.use_backend(ctx.backend.name, ctx.backend.arch):
        return (*operator(*inputs), *constants)


def refuse_forward_mode(function: str, *others: Any) -> NoReturn:
    raise NotImplementedError(f"{function}: forward-mode derivatives are not supported, only a backward pass")


# torch.func.vmap.


def _vmap(operator: Callable[..., Any], arrays: int, info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
    """The mapped dimension becomes part of the batch, the first dimension of each of the ``arrays`` first inputs."""
    size = info.batch_size
    batch = inputs[0].shape[1 if axes[0] == 0 else 0]
    folded = (_fold(x, axis, size) for x, axis in zip(inputs[:arrays], axes[:arrays], strict=True))
    results = operator(*folded, *inputs[arrays:])
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0,) * len(results)


def _fold(x: Any, axis: int | None, size: int) -> Any:
    if x is None:
        return None
    x = (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)
    return x if x.dim() == 4 and _has_readable_strides(x) else x.contiguous()


def _refuse_vmap(function: str, *others: Any) -> NoReturn:
    raise NotImplementedError(f"{function}: torch.func.vmap is not supported, expected sequences packed in one call")


def are_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether tensors are memory, and no mode such as FakeTensorMode wants to see what is done with them."""
    for x in inputs:
        if x is None:
            continue
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_meta:
                return False
        elif isinstance(x, Tensor):
            return False
    return int(torch._C._len_torch_dispatch_stack()) == 0


class Operator:
    """``cuattn::name`` of torch.library, and the same as an autograd.Function.

    The Function serves torch.func, which knows no gradients of the former, and plain tensors, for which it is quicker.
    Whatever looks at operators, torch.compile above all, sees the former. ``gradient``: the operator that computes the
    gradients; None for such an operator.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: "Operator | None" = None,
    ) -> None:
        arrays = schema.partition("->")[0].count("Tensor")

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            if gradient is not None:
                _save(ctx, inputs, output)

        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            if gradient is not None:
                return _pull_back(gradient, ctx, *gradients)
            raise NotImplementedError(
                f"cuattn.{name}: double backward is not supported, gradients cannot be differentiated again"
            )

        def vmap(operator: Callable[..., Any]) -> Callable[..., Any]:
            if "layout" in schema:
                return partial(_vmap, operator, arrays)
            return partial(_refuse_vmap, f"cuattn.{name}")

        definition = torch.library.custom_op(f"cuattn::{name}", compute, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        definition.register_autograd(backward, setup_context=save)
        self._compute, self._overload = compute, getattr(torch.ops.cuattn, name).default
        definition.register_vmap(vmap(self._overload))
        rules: dict[str, Callable[..., Any]] = {
            "forward": self._without_gradients,
            "setup_context": save,
            "backward": backward,
            "jvp": partial(refuse_forward_mode, f"cuattn.{name}"),
            "vmap": vmap(self),
        }
        methods = {rule: staticmethod(function) for rule, function in rules.items()}
        self._function: Any = type(f"cuattn_{name}", (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._overload(*inputs)
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Functionalize:
            return self._overload(*inputs)
        if transform is not None or (torch.is_grad_enabled() and are_plain(inputs)):
            return self._function.apply(*inputs)
        return self._without_gradients(*inputs)

    def _without_gradients(self, *inputs: Any) -> Any:
        plain = are_plain(inputs) and all(torch._C._has_storage(x) for x in inputs if isinstance(x, Tensor))
        return self._compute(*inputs) if plain else self._overload(*inputs)


_QKV = "Tensor q, Tensor k, Tensor v"
_UPSTREAM = f"Tensor dout, {_QKV}, Tensor out, Tensor lse, Tensor? dlse"
_DENSE = "Tensor? key_padding_mask, Tensor? kv_lengths, str mask, float? scale, str layout"
_PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, str mask, float? scale"
_RESULTS, _GRADIENTS = "(Tensor out, Tensor lse)", "(Tensor dq, Tensor dk, Tensor dv)"

ATTENTION_BACKWARD = Operator(
    "attention_backward", f"({_UPSTREAM}, {_DENSE}) -> {_GRADIENTS}", _attention_backward, _fake_gradients
)
VARLEN_BACKWARD = Operator(
    "attention_varlen_backward", f"({_UPSTREAM}, {_PACKED}) -> {_GRADIENTS}", _varlen_backward, _fake_gradients
)
ATTENTION = Operator(
    "attention", f"({_QKV}, {_DENSE}, int? num_splits) -> {_RESULTS}", _attention, _fake_attention, ATTENTION_BACKWARD
)
VARLEN = Operator(
    "attention_varlen", f"({_QKV}, {_PACKED}, int? num_splits) -> {_RESULTS}", _varlen, _fake_varlen, VARLEN_BACKWARD
)
