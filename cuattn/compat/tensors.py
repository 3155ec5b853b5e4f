"""What the drop-in functions share: tensors of any form made fit for cuattn, and arguments that it has no use for."""

from collections.abc import Callable
from typing import Any

COLUMNS = 8  # head dims are multiples of it


def require(accepted: bool, name: str, got: object, expected: str) -> None:
    """NotImplementedError unless ``accepted``."""
    if not accepted:
        raise NotImplementedError(f"{name}: got {got}, expected {expected}")


def require_absent(**arguments: object) -> None:
    """NotImplementedError for the first argument that is not None."""
    for name, got in arguments.items():
        require(got is None, name, type(got).__name__, "None")


def check_tensors(**arguments: object) -> None:
    import torch

    for name, got in arguments.items():
        if not isinstance(got, torch.Tensor):
            raise TypeError(f"{name}: got {type(got).__name__}, expected a torch tensor")


def readable(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, or copies of them in memory that kernels read; None where one is None."""
    import cuattn.autograd.operators as operators

    return tuple(x if x is None else operators.readable(x) for x in tensors)


def attend(
    function: Callable[..., Any],
    q: Any,
    k: Any,
    v: Any,
    *others: Any,
    scale: float | None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """``function`` of q, k and v in memory of any form and of any head dims up to the largest.

    Zeros behind the columns of a head change no score; behind those of a value they give columns that are cut off.
    """
    head_dim, columns = q.shape[-1], v.shape[-1]
    if head_dim % COLUMNS:
        q, k = _with_zeros(q, -head_dim % COLUMNS), _with_zeros(k, -head_dim % COLUMNS)
        scale = head_dim**-0.5 if scale is None else scale
    if columns % COLUMNS:
        v = _with_zeros(v, -columns % COLUMNS)
    result = function(*readable(q, k, v), *others, scale=scale, return_lse=return_lse, **options)
    if columns % COLUMNS == 0:
        return result
    return (result[0][..., :columns], result[1]) if return_lse else result[..., :columns]


def _with_zeros(x: Any, columns: int) -> Any:
    import torch

    return torch.nn.functional.pad(x, (0, columns))
