"""The machine code of the kernel for Hopper: what it is made of, and that it keeps to its plan of registers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from changed import change
from hopper_code import wrong_with
from sass import Program

from cuattn import jit
from cuattn.config import HEAD_DIMS, MASKS, ForwardSm90Config
from cuattn.config.hopper import LARGEST_OF_FEW_ROWS

#: (ragged, paged, split, few), as calls ask for them; the last one where head dims are at most 128.
KINDS = (
    (False, False, False, False),
    *((True, paged, split, False) for paged in (False, True) for split in (False, True)),
    (True, False, True, True),
)
CONFIG = ForwardSm90Config(128, 128, "causal", "bfloat16", "sm_90a")


def kinds(head_dim: int) -> tuple[tuple[bool, ...], ...]:
    return KINDS if head_dim <= LARGEST_OF_FEW_ROWS else KINDS[:-1]


@pytest.mark.parametrize("first", HEAD_DIMS[::4])
def test_every_head_dim(first: int) -> None:
    for head_dim in range(first, first + 32, 8):
        draw = random.Random(head_dim)
        kind = draw.choice(kinds(head_dim))
        dtype = draw.choice(("float16", "bfloat16"))
        config = ForwardSm90Config(head_dim, head_dim, draw.choice(MASKS), dtype, "sm_90a", *kind)
        assert wrong_with(config) == [], config


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_the_head_dims_of_most_models(head_dim: int, mask: str) -> None:
    for kind in kinds(head_dim):
        config = ForwardSm90Config(head_dim, head_dim, mask, "bfloat16", "sm_90a", *kind)
        assert wrong_with(config) == [], config


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (64, 256), (256, 64), (128, 72)])
def test_head_dims_of_their_own_for_values(head_dim: int, value_dim: int) -> None:
    for kind in kinds(max(head_dim, value_dim)):
        config = ForwardSm90Config(head_dim, value_dim, "causal", "float16", "sm_90a", *kind)
        assert wrong_with(config) == [], config


def test_controls(sources: Path) -> None:
    assert wrong_with(CONFIG) == []
    # without what holds it up, the wait for outputs comes before the maxima
    change(sources / "attn/softmax_sm90.cuh", "wgmma_wait_after<0>(score[half - 1][3], address)", "wgmma_wait<0>()")
    assert any("exponentials" in error for error in wrong_with(CONFIG))


def test_controls_of_registers() -> None:
    (start,) = Program.of(jit.cubin_path(CONFIG)).find(r"^USETMAXREG\.(TRY_)?ALLOC")
    program = Program.of(jit.cubin_path(CONFIG))
    assert program.registers(start) > 168  # more than a block of that many threads starts with
    paged = replace(CONFIG, ragged=True, paged=True)
    assert wrong_with(paged) == []
    assert Program.of(jit.cubin_path(paged)).find("^LDGSTS")
