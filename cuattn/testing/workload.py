"""A fixed workload: attention of Qwen3-8B's shape over four packed prompts, its inputs the same bits everywhere.

Nothing here depends on how a version of NumPy makes random numbers: NumPy guarantees the raw words of Philox, and all
that follows is exact arithmetic of integers and one rounding.
"""

import hashlib
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import Bits, Library, int32_array, raw_bits, round_to_bits, values_of
from cuattn.testing.cases import WORKLOAD
from cuattn.testing.subject import Operation

#: The arrays of random numbers, each with its place in the seed: packed tokens, heads, head dim.
_HEADS = {"q": WORKLOAD.heads, "k": WORKLOAD.kv_heads, "v": WORKLOAD.kv_heads, "dout": WORKLOAD.heads}
#: Uniform numbers of 32 bits that a normal number is the sum of: their variances add up to 1.
_UNIFORM = 12


def workload_inputs(dtype: str = WORKLOAD.dtype) -> dict[str, Bits]:
    """Raw bits of q and dout (59, 32, 128), k and v (59, 8, 128), and the int32 cumulative lengths cu_seqlens (5,).

    The same numbers in every dtype, rounded to it.
    """
    lengths = WORKLOAD.lengths or ()
    made: dict[str, Bits] = {}
    for place, (name, heads) in enumerate(_HEADS.items()):
        numbers = normal_numbers((sum(lengths), heads, WORKLOAD.head_dim), (WORKLOAD.seed, place))
        made[name] = round_to_bits(numbers, dtype)
    made["cu_seqlens"] = np.array(list(accumulate(lengths, initial=0)), np.int32).view(np.uint32)
    return made


def normal_numbers(shape: tuple[int, ...], key: tuple[int, int]) -> NDArray[np.float32]:
    """Numbers of mean 0, standard deviation 1 and about the normal distribution, none beyond 6.

    The sum of 12 uniform integers of 32 bits, the halves of 6 words of Philox, less its mean, over 2**32.
    """
    count = prod(shape)
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(_UNIFORM // 2 * count).reshape(-1, count)
    sums = (words >> np.uint64(32)).sum(axis=0) + (words & np.uint64(2**32 - 1)).sum(axis=0)
    centred = sums.astype(np.int64) - _UNIFORM * (2**32 - 1) // 2
    exact = centred.reshape(shape) * 2.0**-32
    return np.asarray(exact, np.float32)


def run_workload(
    inputs: Mapping[str, Bits], dtype: str, library: Library, op: Operation, backward: Operation
) -> dict[str, Bits]:
    """Raw bits of out (59, 32, 128), the fp32 lse (32, 59), and the gradients dq, dk and dv of ``(out * dout).sum()``.

    op: ``op(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, return_lse=True)``, as of `cuattn.attention_varlen`; backward:
    ``backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, mask)``.
    """
    q, k, v, dout = (library.array(inputs[name], dtype) for name in _HEADS)
    starts = int32_array(library, inputs["cu_seqlens"].view(np.int32))
    out, lse = op(q, k, v, starts, starts, WORKLOAD.mask, return_lse=True)
    gradients = backward(dout, q, k, v, out, lse, starts, starts, WORKLOAD.mask)
    return {
        name: raw_bits(array)[0]
        for name, array in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)
    }


def type_in_file(name: str, dtype: str) -> str:
    """The dtype of an array of the workload of that dtype."""
    return {"cu_seqlens": "int32", "lse": "float32"}.get(name, dtype)


def stored(name: str, bits: Bits, dtype: str) -> NDArray[Any]:
    """An array as it is written to a file: in its own type, bfloat16 as its bits, uint16."""
    own = type_in_file(name, dtype)
    return bits if own == "bfloat16" else values_of(bits, own)


def sha256(bits: Bits) -> str:
    """Of the little-endian bytes in C order."""
    return hashlib.sha256(bits.astype(bits.dtype.newbyteorder("<")).tobytes()).hexdigest()
