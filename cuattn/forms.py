"""What the arrays of a call are like, for comparison with those of earlier calls.

Where torch has it, one step compares all tensors: `TensorGuards`, by which compiled functions know their inputs. It is
no public part of torch, and so tried before it is relied on; without it attributes are compared one by one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

#: Whether tensors have the form of those that the check was made for.
Check = Callable[..., bool]


def survey(torch: Any, arrays: tuple[Any, ...]) -> tuple[list[int | None], list[Any]] | None:
    """Where each of the arrays lies, None for None, and the tensors among them; None if one is no plain tensor.

    Raises RuntimeError for a tensor without memory.
    """
    plain = torch.Tensor
    pointers: list[int | None] = []
    tensors = []
    for x in arrays:
        if x is None:
            pointers.append(None)
        elif type(x) is plain and not x.is_nested:  # nested ones have no strides: a check ends the process for them
            pointers.append(x.data_ptr())
            tensors.append(x)
        else:
            return None
    return pointers, tensors


def outline(pointers: Sequence[int | None]) -> tuple[int | None, ...]:
    """What addresses alone tell: how each is aligned to 16 bytes, and the first one that it equals; None for None."""
    return tuple(None if x is None else 16 * pointers.index(x) + x % 16 for x in pointers)


def each_once(tensors: list[Any]) -> list[Any]:
    """The tensors without repetition, as a check wants them; none if others start where one does."""
    first: dict[int, Any] = {}
    for x in tensors:
        if first.setdefault(x.data_ptr(), x) is not x:
            return []
    return list(first.values())


def forms(arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that a check compares; None for a tensor that memory alone does not describe.

    Complex tensors, the only ones that can be conjugated, are refused by every call, and so never remembered.
    """
    if any(x is not None and x.is_neg() for x in arrays):
        return None
    try:
        return tuple(x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in arrays)
    except RuntimeError:  # of a tensor without strides
        return None


def check_of(torch: Any, tensors: list[Any]) -> Check | None:
    """A check for the form of tensors, of which it keeps none; None where torch has no such check.

    Bits of a tensor, that it is negated among them, can be hidden from it by the state of a thread. So each time it
    looks at a negated tensor, too, which then no longer has the form that it had.
    """
    if not tensors:
        return None
    try:
        plain, negated = _witnesses(torch)
        guards = torch._C._dynamo.guards.TensorGuards(
            negated, *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        works = guards.check(negated, *tensors) and not guards.check(plain, *tensors)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return functools.partial(guards.check, negated) if works else None


@functools.cache
def _witnesses(torch: Any) -> tuple[Any, Any]:
    """Two tensors that differ in that one is negated."""
    plain = torch.zeros((), device="cpu")
    return plain, torch._neg_view(plain)
