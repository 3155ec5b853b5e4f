"""The machine code of the kernel for few rows on Hopper: what it is made of, and that registers suffice."""

import random
from itertools import product
from pathlib import Path

import pytest
from changed import change
from sass import Program

from cuattn import jit
from cuattn.config import HEAD_DIMS, MASKS, DecodeConfig

CONFIG = DecodeConfig(128, 128, "causal", "bfloat16", "sm_90a", 1)
#: Instructions that there must be: copies, products, operands, the wait for earlier launches, meetings of clusters.
MADE_OF = ("UTMALDG", "HMMA", "LDSM", "ACQBULK", "UCGABAR")


def wrong_with(config: DecodeConfig) -> list[str]:
    """What is wrong with a kernel's code; nothing for a good one."""
    resources, program = jit.resources(config), Program.of(jit.cubin_path(config))
    errors = [f"no {name}" for name in MADE_OF if not program.find(rf"^{name}")]
    if resources.spills:
        errors.append(f"memory for registers: {resources}")
    return errors


def row_blocks(head_dim: int) -> tuple[int, ...]:
    return (1, 2) if head_dim <= 128 else (1,)


@pytest.mark.parametrize("first", HEAD_DIMS[::8])
def test_every_head_dim(first: int) -> None:
    for head_dim in range(first, first + 64, 8):
        draw = random.Random(head_dim)
        dtype, blocks = draw.choice(("float16", "bfloat16")), draw.choice(row_blocks(head_dim))
        config = DecodeConfig(
            head_dim, head_dim, draw.choice(MASKS), dtype, "sm_90a", blocks, draw.choice((False, True))
        )
        assert wrong_with(config) == [], config


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_the_head_dims_of_most_models(head_dim: int, mask: str) -> None:
    for blocks, paged in product(row_blocks(head_dim), (False, True)):
        assert wrong_with(DecodeConfig(head_dim, head_dim, mask, "bfloat16", "sm_90a", blocks, paged)) == []


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (64, 256), (256, 64), (128, 72)])
def test_head_dims_of_their_own_for_values(head_dim: int, value_dim: int) -> None:
    assert wrong_with(DecodeConfig(head_dim, value_dim, "causal", "float16", "sm_90a", 1)) == []


def test_controls(sources: Path) -> None:
    kernel = sources / "decode_sm90.cuh"
    change(kernel, "__launch_bounds__(threads, 1)", "__launch_bounds__(threads, 4)")
    assert any("memory for registers" in error for error in wrong_with(CONFIG))
    change(kernel, "    ptx::meet_cluster();\n", "")
    assert "no UCGABAR" in wrong_with(CONFIG)
