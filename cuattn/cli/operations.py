"""Operations of others, named on the command line as module:function."""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from cuattn.testing import from_flash, from_sdpa, with_autograd
from cuattn.testing.subject import Operation

#: Forms of attention functions: what makes an operation of them, and how they are called.
CONVENTIONS: dict[str, tuple[Callable[[Any], Operation], str]] = {
    "cuattn": (lambda function: function, "(q, k, v, mask, *, scale, return_lse)"),
    "sdpa": (from_sdpa, "(q, k, v, *, attn_mask, is_causal, scale)"),
    "flash": (from_flash, "(q, k, v, *, softmax_scale, causal)"),
}
#: Arguments that a function of each form must take, and of a gradient operation.
_CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "cuattn": (4, ("scale",)),
    "sdpa": (3, ("is_causal",)),
    "flash": (3, ("softmax_scale", "causal")),
    "backward": (7, ("scale",)),
}
BACKWARD = "(dout, q, k, v, out, lse, mask, *, scale)"
#: In the place of module:function for gradients: torch's autograd of the operation.
AUTOGRAD = "autograd"


def load_attention(name: str, convention: str) -> Operation:
    """The operation that ``--op`` names. Raises ValueError if there is none of that form."""
    make, form = CONVENTIONS[convention]
    function = _load("--op", name)
    others = [other for other in CONVENTIONS if other != convention]
    hint = f"{form}; --convention {' or '.join(others)} is for other forms"
    # torch's function cannot be asked for its arguments
    _expect("--op", name, function, convention, hint, unknown_is_good=convention == "sdpa")
    return make(function)


def load_gradients(name: str, op: Operation) -> Operation:
    """The gradients of ``op`` that ``--backward`` names. Raises ValueError like `load_attention`."""
    if name == AUTOGRAD:
        return with_autograd(op)
    function = _load("--backward", name)
    _expect("--backward", name, function, "backward", BACKWARD)
    return function


def _load(option: str, name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"{option}: got {name!r}, expected module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever a module does when it is loaded
        raise ValueError(f"{option}: got {name!r}; importing {module}: {type(error).__name__}: {error}") from error
    try:
        function = reduce(getattr, path.split("."), loaded)
    except AttributeError as error:
        raise ValueError(f"{option}: got {name!r}; {error}") from error
    if not callable(function):
        raise ValueError(f"{option}: got {name!r}, a {type(function).__name__}, expected a function")
    return function


def _expect(
    option: str, name: str, function: Callable[..., Any], form: str, expected: str, unknown_is_good: bool = False
) -> None:
    """Raises ValueError for a function that cannot be called in that way."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        if unknown_is_good:
            return
        raise ValueError(f"{option}: got {name!r}, whose arguments Python cannot read, expected {expected}") from None
    positional, keywords = _CALLS[form]
    message = f"{option}: got {name!r} with {signature}, expected {expected}"
    try:
        bound = signature.bind(*range(positional), **dict.fromkeys(keywords)).arguments
    except TypeError:
        raise ValueError(message) from None
    last = [parameter for parameter, place in bound.items() if place == positional - 1]
    if form in ("cuattn", "backward") and last not in ([], ["mask"]):  # a flag would take "full" for true
        raise ValueError(message)
