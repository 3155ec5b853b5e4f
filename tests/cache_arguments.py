"""Right arguments of `attention_kvcache` and `append_kv`, for tests that make one of them wrong."""

from typing import Any

import numpy as np
from refusals import refused, zeros

import cuattn


def numbers(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def table(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def dense() -> dict[str, Any]:
    """Two sequences with two new keys each, caches of 9."""
    return {
        "q": zeros(2, 2, 4, 64),
        "k_cache": zeros(2, 9, 2, 64),
        "v_cache": zeros(2, 9, 2, 32),
        "cache_lengths": numbers(7, 0),
        "k_new": zeros(2, 2, 2, 64),
        "v_new": zeros(2, 2, 2, 32),
    }


def paged() -> dict[str, Any]:
    """The same in pages of 3."""
    pages = {"k_cache": zeros(8, 3, 2, 64), "v_cache": zeros(8, 3, 2, 32)}
    return dense() | pages | {"block_table": table([7, 1, 2], [3, 4, 5])}


def packed() -> dict[str, Any]:
    """One and three new keys."""
    rows = {"q": zeros(4, 4, 64), "k_new": zeros(4, 2, 64), "v_new": zeros(4, 2, 32)}
    return paged() | rows | {"cu_seqlens_q": numbers(0, 1, 4)}


def keys_alone(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `append_kv` among those of `attention_kvcache`."""
    return {("cu_seqlens" if n == "cu_seqlens_q" else n): x for n, x in arguments.items() if n != "q"}


def refusal(arguments: dict[str, Any], **changed: Any) -> Exception:
    """The exception of `attention_kvcache` with arguments changed."""
    return refused(cuattn.attention_kvcache, **arguments | changed)


def refusal_of_both(arguments: dict[str, Any], **changed: Any) -> Exception:
    """The exception of both functions, which must say the same."""
    arguments = arguments | changed
    error = refused(cuattn.attention_kvcache, **arguments)
    other = refused(cuattn.append_kv, **keys_alone(arguments))
    assert type(other) is type(error)
    assert str(other).replace("k_new's", "q's") == str(error).replace("cu_seqlens_q", "cu_seqlens")
    return error
