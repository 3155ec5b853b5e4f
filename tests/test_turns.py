"""How many blocks share the tiles of many rows: all tiles are computed, and the blocks end together."""

import numpy as np
import pytest

from cuattn.turns import UNKNOWN, block_count

PROCESSORS = 132
#: (tiles of all heads, of one, causal)
PROBLEMS = [
    *((2048, tiles, causal) for tiles in (4, 16, 128) for causal in (False, True)),
    *((4096, 256, True), (1600, 100, True), (2752, 86, True), (2816, 11, True), (300, 300, True)),
]


def longest(items: int, tiles: int, causal: bool, blocks: int) -> float:
    """Key tiles of the block that has most, over the average of all multiprocessors; in turns, forth and back."""
    costs = np.zeros(blocks)
    given = np.zeros(items, int)
    for first in range(0, items, blocks):
        turn = np.arange(first, first + blocks)
        turn = turn[::-1] if first // blocks % 2 else turn
        costs += np.where(turn < items, tiles - turn % tiles if causal else tiles, 0)
        given[turn[turn < items]] += 1
    assert (given == 1).all()
    total = items // tiles * (tiles * (tiles + 1) / 2 if causal else tiles**2)
    return float(costs.max()) / (total / PROCESSORS)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_blocks_that_stay_end_together(problem: tuple[int, int, bool]) -> None:
    items = problem[0]
    blocks = block_count(*problem, PROCESSORS)
    assert blocks == items or blocks <= PROCESSORS
    if blocks < items:
        assert longest(*problem, blocks) < 1.1
        turns = -(-items // blocks)
        assert turns * PROCESSORS >= items, "as few turns as all multiprocessors would need"


def test_control_of_the_balance() -> None:
    """With as many blocks as multiprocessors long rows meet long ones."""
    assert longest(2048, 128, True, PROCESSORS) > 1.3


def test_few_tiles_have_a_block_each() -> None:
    assert block_count(PROCESSORS, 4, True, PROCESSORS) == PROCESSORS
    assert block_count(5, 1, False, PROCESSORS) == 5


def test_what_is_not_known_here_is_spread_finely() -> None:
    assert block_count(10**6, 100, True, PROCESSORS, known=False) == UNKNOWN * PROCESSORS
    assert block_count(200, 100, True, PROCESSORS, known=False) == 200


def test_the_largest_grid_is_planned_at_once() -> None:
    """Not an array of two billion tiles."""
    assert block_count(2**31 - 1, 4096, True, PROCESSORS) in (PROCESSORS, 128, 2**31 - 1)
    blocks = block_count(1 << 18, 128, True, PROCESSORS)
    assert blocks <= PROCESSORS
    assert longest(1 << 18, 128, True, blocks) < 1.1
