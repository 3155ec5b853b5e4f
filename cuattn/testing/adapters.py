"""Operations joined into one, whose keywords offer packed sequences, caches and shards to the checks."""

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from cuattn.testing.subject import CACHED, CUMULATIVE, Operation

#: Where sequences of so many keys may be cut into shards, ascending, 0 included.
ShardStarts = Callable[[int], Sequence[int]]


def with_packed(op: Operation, packed: Operation) -> Operation:
    """``op`` that also takes packed sequences, by the keywords cu_seqlens_q and cu_seqlens_k: those calls are
    ``packed(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, ...)``, the mask if it is given.
    """
    return _with_packed(op, packed, 3)


def with_packed_gradients(op: Operation, packed: Operation) -> Operation:
    """The same for gradients: ``packed(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, mask, ...)``."""
    return _with_packed(op, packed, 6)


def _with_packed(op: Operation, packed: Operation, arrays: int) -> Operation:
    """``packed`` takes the cumulative lengths behind so many arrays."""

    def call(*args: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
        return packed(*args[:arrays], cu_seqlens_q, cu_seqlens_k, *args[arrays:], **options)

    return _joined(op, call, CUMULATIVE)


def with_cache(op: Operation, cached: Operation) -> Operation:
    """``op`` that also takes a cache for k and v, by the keywords cache_lengths, block_table, k_new and v_new: those
    calls are ``cached(q, k_cache, v_cache, cache_lengths, block_table=..., k_new=..., v_new=..., mask=...,
    layout="bhsd", ...)``, as of `cuattn.attention_kvcache`.
    """

    def call(q: Any, k: Any, v: Any, mask: str, cache_lengths: Any, **options: Any) -> Any:
        return cached(q, k, v, cache_lengths, mask=mask, layout="bhsd", **options)

    return _joined(op, call, CACHED)


def with_shards(op: Operation, partials: Operation, combine: Operation, starts: ShardStarts) -> Operation:
    """``op`` that also computes the keys in parts, as many as the keyword shards says, or as ``starts`` allows:
    ``partials(q, k, v, mask, first_key=..., total_keys=..., scale=...)`` of each, merged by
    ``combine(list of partials, dtype=..., return_lse=...)``, as of `cuattn.attention_partials`.
    """

    def call(q: Any, k: Any, v: Any, mask: str, shards: int, return_lse: bool = False, **options: Any) -> Any:
        total = k.shape[2]
        places = starts(total)
        cuts = sorted({places[len(places) * shard // shards] for shard in range(shards if places else 0)})
        parts = [
            partials(q, k[:, :, first:end], v[:, :, first:end], mask, first_key=first, total_keys=total, **options)
            for first, end in pairwise([*cuts, total])
        ]
        return combine(parts, dtype=q.dtype, return_lse=return_lse)

    return _joined(op, call, ("shards",))


def _joined(op: Operation, other: Operation, keywords: tuple[str, ...]) -> Operation:
    """``op`` with more keywords; calls in which the first of them is not None go to ``other``."""

    @functools.wraps(op)
    def either(*args: Any, **options: Any) -> Any:
        if options.get(keywords[0]) is not None:
            return other(*args, **options)
        return op(*args, **{name: value for name, value in options.items() if name not in keywords})

    signature = inspect.signature(op)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords]
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in keywords]
    either.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return either
