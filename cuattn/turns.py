"""How many blocks share the tiles of many rows: they take turns at them (kernels_cu/attn/block_work.cuh)."""

import functools

import numpy as np

#: What a block's first item costs besides its key tiles, and what each later one does, in key tiles: an estimate, on
#: which only the number of blocks depends.
FIRST, NEXT = 2.6, 0.8
#: Blocks for each multiprocessor where lengths are known on the device alone.
UNKNOWN = 8
#: Turns that are looked at: what comes later repeats them.
COUNTED = 64


@functools.lru_cache(4096)
def block_count(items: int, tiles: int, causal: bool, processors: int, known: bool = True) -> int:
    """The number of blocks, each of which takes up a multiprocessor.

    ``items`` are counted head by head, ``tiles`` of a head, the longest causal rows first. As many blocks as run at
    once start once and go on with the next queries at hand, but who has most to do is waited for; a block for each item
    fills gaps but starts anew each time. ``known``: all heads have as many rows and keys.
    """
    if items <= processors:
        return items
    if not known:
        return min(items, UNKNOWN * processors)
    counted = min(items, COUNTED * processors)
    costs = tiles - np.arange(counted) % tiles if causal else np.full(counted, tiles)
    best, least = items, float(costs.sum() + FIRST * counted) / processors + tiles / 2
    for blocks in _candidates(items, tiles, processors):
        turns = np.zeros((-(-counted // blocks), blocks))
        turns.reshape(-1)[:counted] = costs + NEXT
        turns[1::2] = turns[1::2, ::-1]
        longest = float(turns.sum(0).max()) + FIRST - NEXT
        if longest < least:
            best, least = blocks, longest
    return best


def _candidates(items: int, tiles: int, processors: int) -> list[int]:
    """As few as finish in as many turns as all multiprocessors would, for what idles leaves power to the others; and
    the largest number of which a head's tiles are a multiple or that is one of them: so that the long and the short
    rows of heads meet in a block."""
    turns = -(-items // processors)
    multiples = [n for n in range(1, processors + 1) if tiles % n == 0 or n % tiles == 0]
    return [-(-items // turns), multiples[-1]]
