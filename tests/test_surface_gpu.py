"""Every way to ask for attention on a CUDA device: larger, against the emulator, in graphs, under load, gone wrong."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packed import assert_both_equal, bits_of
from surface import PAGE_SIZES, WAYS, Surface, covering, fed, spoiled
from test_surface import ASKED, surface
from test_varlen_gpu import torch_library
from test_invariance_gpu import VALIDATED

import cuattn
from cuattn.devices import device_architecture
from cuattn.testing import BitwiseMismatch, TorchLibrary, assert_bitwise_equal, controls

pytestmark = pytest.mark.gpu

KERNELS = (
    ("bfloat16", (128, 128), "causal"),
    ("float16", (64, 64), "full"),
    ("float32", (96, 96), "causal"),
    ("bfloat16", (256, 256), "causal"),
    ("float16", (192, 128), "full"),
)
KEYS = {1: (9000, 0, 513, 77), 3: (20000, 4, 0, 640), 64: (4100, 0, 1311), 257: (2600, 0, 131)}
LARGE, SMALL = 2**31 - 1, -(2**31)


def sample() -> Iterator[Any]:
    heads = {"heads": ((4, 2), (8, 1), (3, 3))}
    for levels in covering(ASKED | heads | {"kernel": KERNELS}):
        dtype, dims, mask = levels.pop("kernel")
        case = surface(**levels, lengths=KEYS, dtype=dtype, dims=dims, mask=mask)
        yield pytest.param(case, id=str(case))


class TestAlone:
    @pytest.mark.parametrize("case", list(sample()))
    def test_each_sequence(self, case: Surface) -> None:
        case.check(torch_library())

    @pytest.mark.parametrize("way", WAYS)
    def test_control(self, way: str) -> None:
        """Chunks that move with the place in the batch."""
        library = torch_library()
        case = Surface(way, (3, 3, 3), (200, 60, 600))
        results, _ = case.run(library)
        bad = [
            s.alone(controls.non_invariant(cuattn.attention, lambda _, n=n: n), library, case.dtype, case.mask)
            for n, s in enumerate(case.sequences)
        ]
        if way == "mask all":
            case.assert_same(bad, results)
            return
        with pytest.raises(BitwiseMismatch):
            case.assert_same(bad, results)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    torch_library()
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
