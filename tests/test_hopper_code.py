"""The machine code of the kernel for Hopper: what it is made of, and that it keeps to its plan of registers."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from changed import change
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
#: Exponentials without which the maxima of both rows are not there.
EARLY = 2
CONFIG = ForwardSm90Config(128, 128, "causal", "bfloat16", "sm_90a")


def kinds(head_dim: int) -> tuple[tuple[bool, ...], ...]:
    return KINDS if head_dim <= LARGEST_OF_FEW_ROWS else KINDS[:-1]


def wrong_with(config: ForwardSm90Config) -> list[str]:
    """What is wrong with a kernel's code; nothing for a good one."""
    resources, program = jit.resources(config), Program.of(jit.cubin_path(config))
    errors = []
    if resources.spills:
        errors.append(f"spills: {resources}")
    if resources.serialized:
        errors.append("products are serialized")
    errors += [] if program.find(r"^HGMMA\b") else ["no HGMMA"]
    # keys in one piece come by the copy engine, unless there are no registers for both ways
    boxes = not config.paged or config.consumers < 3
    if bool(program.find(r"^UTMALDG\b")) != boxes:
        errors.append("no UTMALDG" if boxes else "the copy engine fetches keys that it cannot find")
    plan = {"DEALLOC": config.producer_registers, "ALLOC": config.consumer_registers}
    for kind, allowed in plan.items() if config.consumers > 1 else ():  # else a thread has all that it can have
        (start,) = program.find(rf"^USETMAXREG\.(TRY_)?{kind}")
        number = int(re.findall(r"0x[0-9a-f]+", program.instructions[start].text)[-1], 16)
        if number != allowed:
            errors.append(f"{kind}: got {number} registers, expected {allowed}")
        if (used := program.registers(start)) > allowed:
            errors.append(f"{kind}: {used} registers are used of {allowed}")
    # a step's maxima and first exponentials come between the waits for scores and for outputs, beside the products
    scores, outputs = program.find(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x1"), program.find(r"^WARPGROUP\.DEPBAR")
    if len(scores) != 1:
        return [*errors, f"got {len(scores)} waits that leave a group under way, expected 1"]
    (first,), end = scores, next(i for i in outputs if i > scores[0])
    beside = sum(first < i < end for i in program.find(r"^MUFU\.EX2"))
    if beside < EARLY:
        errors.append(f"{beside} exponentials run beside the products, expected {EARLY}")
    return errors


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
