"""A sample of the real kernels compiles and keeps its data in registers.

All of them are some ten thousand: `cuattn precompile` compiles them. Sampled are the kernel for many rows, that for few
rows, the one that merges and those of the backward pass, each with a mask, with lengths and with pages that a seeded
generator draws for the shape:
on sm_90a for every head dim, in bfloat16 and in float32; on one architecture of each kind for the head dims of most
models, in 16 bits, and some in float32. Those around attention are there for each of these architectures.
"""

import random
from collections.abc import Iterable, Iterator

import pytest

from cuattn import jit
from cuattn.config import (
    HEAD_DIMS,
    MASKS,
    CombineConfig,
    KernelConfig,
    KeysConfig,
    QueriesConfig,
    RowsConfig,
    few_rows,
    helper_configs,
    many_rows,
)

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
#: (head dim, that of values).
SHAPES = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
FLOAT32_SHAPES = ((64, 64), (128, 128), (256, 256))
#: (ragged, paged), as calls ask for them.
LENGTHS = ((False, False), (True, False), (True, True))


def kernels(shape: tuple[int, int], dtype: str, arch: str) -> Iterator[KernelConfig]:
    draw = random.Random(f"{shape} {dtype} {arch}")
    ragged, paged = draw.choice(LENGTHS)
    yield many_rows(*shape, draw.choice(MASKS), dtype, arch, ragged, paged)
    yield few_rows(*shape, draw.choice(MASKS), dtype, arch, draw.choice((False, True)))
    yield CombineConfig(shape[1], dtype, arch)
    yield RowsConfig(shape[1], draw.choice(MASKS), dtype, arch)
    yield KeysConfig(*shape, dtype, arch)
    yield QueriesConfig(*shape, dtype, arch, draw.choice((False, True)))


def assert_nothing_spills(configs: Iterable[KernelConfig]) -> None:
    used = {config.name: jit.resources(config) for config in configs}
    assert used
    assert {name: resources for name, resources in used.items() if resources.spills} == {}


@pytest.mark.parametrize("first", HEAD_DIMS[::8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_head_dim(dtype: str, first: int) -> None:
    dims = [head_dim for head_dim in HEAD_DIMS if first <= head_dim < first + 64]
    assert_nothing_spills(config for dim in dims for config in kernels((dim, dim), dtype, "sm_90a"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    choices = [(shape, dtype) for shape, dtype in zip(SHAPES, ("float16", "bfloat16") * 3, strict=True)]
    choices += [(shape, "float32") for shape in FLOAT32_SHAPES]
    assert_nothing_spills(config for shape, dtype in choices for config in kernels(shape, dtype, arch))
    assert_nothing_spills(helper_configs(arch))
