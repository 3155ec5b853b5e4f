"""What a kernel of the wrong kind may see of a call, and the numbers that the bits of negative controls move with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import is_contiguous, raw_bits, values_of


@dataclass(frozen=True)
class Call:
    """One sequence of one call: q (B, Hq, Lq, D), k and v (B, Hkv, Lk, D) whole, packed (Tq, Hq, D), (Tk, Hkv, D), or
    the cache, and all that a bad kernel may see.
    """

    q: Any
    k: Any
    v: Any
    mask: str
    layout: str
    position: int  # in the batch
    run: int  # how often the operation was called before
    first_key: int = 0  # of the sequence, in the packed keys or the pages
    num_splits: int | None = None
    shards: int | None = None


#: A number made of what a `Call` holds.
Seen = Callable[[Call], int]


def host_values(array: Any) -> NDArray[np.float32]:
    return values_of(*raw_bits(array)).astype(np.float32)


def _contains_nan(array: Any) -> bool:
    return bool(np.isnan(host_values(array)).any())


def nothing(call: Call) -> int:
    return 0


def batch_size(call: Call) -> int:
    return int(call.q.shape[0])


def position(call: Call) -> int:
    return call.position


def garbage(call: Call) -> int:
    return _contains_nan(call.q) or _contains_nan(call.k)


def rows(call: Call) -> int:
    return int(call.q.shape[2])


def mask(call: Call) -> int:
    return call.mask == "causal"


def heads(call: Call) -> int:
    return int(call.q.shape[1])


def key_heads(call: Call) -> int:
    return int(call.k.shape[1])


def strides(call: Call) -> int:
    return is_contiguous(call.q) and is_contiguous(call.k)


def layout(call: Call) -> int:
    return call.layout == "bshd"


def runs(call: Call) -> int:
    return call.run


def splits(call: Call) -> int:
    return call.num_splits or 0


def shards(call: Call) -> int:
    return call.shards or 0


def padding(call: Call) -> int:
    """The number of keys that there is memory for."""
    return int(call.k.shape[2])


def first_key(call: Call) -> int:
    """The place of a sequence's first key among the packed ones, or in the pages."""
    return call.first_key


def last_key(call: Call) -> int:
    """Whether all numbers of the last key are the same."""
    return float(np.ptp(host_values(call.k[:, :, -1:]))) == 0.0
