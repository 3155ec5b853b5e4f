"""Context parallelism: the keys of a sequence spread over the processes of a torch.distributed group.

The chunks of the contract (docs/numerics.md, section 3) are computed where their keys are, exchanged, and merged in the
order in which one process merges them. So the bits are those of `cuattn.attention`, for any number of processes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cuattn.checks import Partials, check_count, check_layout
from cuattn.partials import attention_partials, chunk_starts, combine

Bounds = Sequence[tuple[int, int]]


def shard_bounds(total_keys: int, world_size: int) -> list[tuple[int, int]]:
    """``[start, end)`` of the keys of each rank: contiguous, cut between chunks, as even as chunks allow.

    Where there are fewer chunks than ranks some ranks have no keys, ``start == end``. Raises ValueError or TypeError
    for wrong numbers.
    """
    places = [*chunk_starts(total_keys), total_keys]
    size = check_count("world_size", world_size, 1)
    cuts = [min(places, key=lambda place: abs(place * size - rank * total_keys)) for rank in range(size)]
    return list(pairwise([*cuts, total_keys]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str | None = "full",
    *,
    bounds: Bounds | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    group: Any = None,
) -> Any:
    """`cuattn.attention` of queries that every rank has over keys of which every rank has a part. All ranks call it.

    q: (B, Hq, Lq, D), the same on all ranks. k, v: (B, Hkv, n, D) and (B, Hkv, n, Dv), the keys ``bounds[rank]`` of
        each sequence, which may be none. With ``layout="bshd"`` (B, L, H, D). Dtypes as in `cuattn.attention`, on the
        device that the group's backend works on: CPU (gloo) or CUDA (NCCL).
    mask: "causal" is aligned bottom-right, to the end of the whole sequence.
    bounds: `shard_bounds`, or others cut at `cuattn.chunk_starts`, the same on all ranks. None: the ranks tell each
        other how many keys they have, for which the call waits for the device.
    scale, return_lse, layout: as in `cuattn.attention`, the same on all ranks.
    group: a process group, the default one by default.

    Returns the output (B, Hq, Lq, Dv) in the layout of q, or ``(output, lse)`` with the LSE float32 (B, Hq, Lq): the
    same bits on all ranks. Every rank merges an equal share of the rows; it sends each other rank only its chunks of
    that rank's rows, 4 (Dv + 2) bytes per row and chunk, and its merged rows to all.

    Guarantee: the bits of one process' `cuattn.attention` over all keys, for any number of ranks and any bounds, on
    devices of one architecture.

    Raises ValueError on every rank where keys are not cut between chunks, ValueError or TypeError for other wrong
    arguments, and NotImplementedError if gradients are asked for: there is no backward pass over several ranks. A rank
    that alone raises leaves the others waiting until the group's timeout.
    """
    check_layout(layout)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            "cuattn.integrations.context_parallel.attention: gradients are not supported, expected torch.no_grad() or "
            "tensors that do not require them"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    keys = k.shape[2 if layout == "bhsd" else 1]
    bounds = _checked(_gathered_bounds(keys, q, group) if bounds is None else bounds, size)
    first, end = bounds[rank]
    if keys != end - first:
        raise ValueError(f"k: got {keys} keys, expected those of bounds[{rank}], {end - first}")

    total = bounds[-1][1]
    partials = attention_partials(q, k, v, mask, first_key=first, total_keys=total, scale=scale, layout=layout)
    shape = partials.out.shape[1:]
    rows = shape[:-1].numel()
    share = -(-rows // size)
    counts = [max(0, min(share, rows - share * i)) for i in range(size)]
    merged = combine(_exchanged(partials, bounds, counts, rank, group), dtype=q.dtype, return_lse=return_lse)
    results = [_gathered(x.flatten(0, 2), share, rows, group) for x in (merged if return_lse else (merged,))]
    out = results[0].unflatten(0, shape[:-1])
    if layout == "bshd":
        out = out.transpose(1, 2).contiguous()
    return (out, results[1].unflatten(0, shape[:-1])) if return_lse else out


def _gathered_bounds(keys: int, q: Tensor, group: Any) -> Bounds:
    mine = torch.tensor([keys], device=q.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    ends = torch.cat(counts).cumsum(0).tolist()
    return list(pairwise([0, *ends]))


def _checked(bounds: Bounds, size: int) -> Bounds:
    if len(bounds) != size:
        raise ValueError(f"bounds: got {len(bounds)} pairs, expected one for each of {size} ranks")
    total = bounds[-1][1]
    places = {*chunk_starts(total), total}
    expected = 0
    for rank, (first, end) in enumerate(bounds):
        if first != expected or end < first:
            raise ValueError(f"bounds[{rank}]: got {(first, end)}, expected keys from {expected} on")
        if end not in places:
            raise ValueError(
                f"bounds[{rank}]: got keys up to {end} of {total}, expected the start of a chunk "
                "(cuattn.chunk_starts), as shard_bounds gives"
            )
        expected = end
    return bounds


def _exchanged(partials: Partials, bounds: Bounds, counts: list[int], rank: int, group: Any) -> list[Partials]:
    """The chunks of this rank's rows, from every rank: partials (chunks, 1, 1, rows, Dv)."""
    width = partials.out.shape[-1]
    chunks = [len(chunk_starts(end)) - len(chunk_starts(first)) for first, end in bounds]
    columns = (partials.out, partials.reference[..., None], partials.sum[..., None])
    sent = torch.cat(columns, -1).flatten(1, 3).transpose(0, 1).contiguous()  # rows, chunks, Dv + 2
    sizes = [counts[rank] * n * (width + 2) for n in chunks]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(
        received, sent.flatten(), sizes, [n * chunks[rank] * (width + 2) for n in counts], group=group
    )
    parts = []
    for part, n in zip(received.split(sizes), chunks, strict=True):
        by_chunk = part.view(counts[rank], n, width + 2).transpose(0, 1)[:, None, None]
        fields = (by_chunk[..., :width], by_chunk[..., width], by_chunk[..., width + 1])
        parts.append(Partials(*(field.clone(memory_format=torch.contiguous_format) for field in fields)))
    return parts


def _gathered(mine: Tensor, share: int, rows: int, group: Any) -> Tensor:
    """The rows of all ranks, of which all but the last ones have ``share``."""
    sent = mine.new_zeros((share, *mine.shape[1:]))
    sent[: mine.shape[0]] = mine
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather([x.view(torch.uint8) for x in received], sent.view(torch.uint8), group=group)
    return torch.cat(received)[:rows]
