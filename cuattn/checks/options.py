"""Arguments that are no arrays."""

import math
import numbers

from cuattn import config, env
from cuattn.problem import LAYOUTS


def check_choice(name: str, got: object, choices: tuple[str, ...]) -> None:
    if not isinstance(got, str):
        raise TypeError(f"{name}: got {type(got).__name__}, expected one of {', '.join(map(repr, choices))}")
    if got not in choices:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}")


def check_layout(layout: str) -> None:
    check_choice("layout", layout, LAYOUTS)


def check_mask(mask: str | None) -> str:
    """The mask's name; None is "full"."""
    mask = "full" if mask is None else mask
    check_choice("mask", mask, config.MASKS)
    return mask


def check_count(name: str, got: object, least: int) -> int:
    return _check_int(name, got, least, f"an int of at least {least}")


def check_optional_count(name: str, got: object, least: int) -> int | None:
    return None if got is None else _check_int(name, got, least, f"None or an int of at least {least}")


def _check_int(name: str, got: object, least: int, expected: str) -> int:
    if isinstance(got, bool) or not isinstance(got, numbers.Integral):
        raise TypeError(f"{name}: got {type(got).__name__}, expected {expected}")
    if got < least:
        raise ValueError(f"{name}: got {got}, expected {expected}")
    return int(got)


def check_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    # no tensors: reading one would wait for its device
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: got {type(scale).__name__}, expected None or a finite float")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale: got {value}, expected None or a finite float")
    return value


def is_checked(check: object = None) -> bool:
    """Whether numbers that lie on a GPU are read and checked: the argument ``check``, else CUATTN_CHECK."""
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check: got {type(check).__name__}, expected None or a bool")
    return env.check() if check is None else check
