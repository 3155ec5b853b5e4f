"""Calls on the emulated Hopper GPU, in the order of threads that a test asks for, and what they launched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from backends import SM_90A
from planted_problems import ManyRows
from problems import normal

import cuattn
from cuattn import dispatch, emulator
from cuattn.config import DecodeConfig, ForwardSm90Config
from cuattn.launches import Launch
from cuattn.testing import TorchLibrary, assert_bitwise_equal

TORCH = TorchLibrary()
#: The portable kernels, with the tensor cores of sm_90a.
SM_90 = ("emulator", "sm_90")


def in_order(call: Callable[[], Any], schedule: str, seed: int) -> Any:
    """What a call returns whose threads run in that order."""
    whole = emulator.run
    try:
        dispatch.emulator.run = lambda launches: whole(launches, schedule, seed)
        return call()
    finally:
        dispatch.emulator.run = whole


def configs_of(launches: list[Launch]) -> list[ForwardSm90Config | DecodeConfig]:
    return [one.config for one in launches if isinstance(one.config, ForwardSm90Config | DecodeConfig)]


def arrays(
    *shape: int, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (64, 64), dtype: str = "bfloat16"
) -> list[torch.Tensor]:
    """q, k, v of (batch, rows, keys)."""
    batch, rows, keys = shape
    shapes = ((batch, heads[0], rows, dims[0]), *((batch, heads[1], keys, dim) for dim in dims))
    return [TORCH.array(normal(one, dtype, 7 * i + keys), dtype) for i, one in enumerate(shapes)]


def both_families(*tensors: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Output and LSE by the portable kernels, and by those for Hopper."""
    results = []
    for backend in (SM_90, SM_90A):
        with cuattn.use_backend(*backend):
            results.append(cuattn.attention(*tensors, return_lse=True, **options))
    return results[0], results[1]


def assert_same(first: Any, second: Any) -> None:
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)


class Bug(NamedTuple):
    """A change of the kernel for many rows, for `changed.assert_found`."""

    file: str
    old: str
    new: str
    error: str | None  # what the emulator says; None where the output has other bits
    problem: Any = ManyRows(len_q=150, len_k=700, head_dim=128, arch="sm_90a")
