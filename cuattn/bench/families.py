"""The portable kernels beside those made for one GPU: on a Hopper GPU there are both."""

import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from cuattn import env

#: The provider's name in CSV files.
PORTABLE = "cuattn portable"
#: The target of the portable kernels, by that of the others.
_PORTABLE_TARGETS = {"sm_90a": "sm_90"}


def portable(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The function on the portable kernels, by the provider's name; nothing where they run anyway."""
    target = portable_target()
    return {PORTABLE: on_target(function, target)} if target else {}


def portable_target() -> str | None:
    """What CUATTN_ARCH must name for the portable kernels to run; None where they run anyway, or no GPU is."""
    import torch

    from cuattn.launch import device_architecture

    if not torch.cuda.is_available():
        return None
    return _PORTABLE_TARGETS.get(device_architecture(torch.cuda.current_device()))


def on_target(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    """The function, with kernels compiled for another target of the same GPU."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with mock.patch.dict(os.environ, {env.ARCH: target}):
            return function(*args, **options)

    return call
