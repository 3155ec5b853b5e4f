"""What is right: answers in float64 on the device, and the rules by which results are measured at all."""

from collections.abc import Callable, Mapping
from typing import Any

from cuattn.bench.peers import Attempt
from cuattn.testing import LIMITS

#: Scores that the answers below hold at a time, in elements.
_SCORES = 1 << 27
#: A peer's relative error may be so many times that of the unfused one: less than any other mask or scale would make.
_WRONG = 16


def gold_and_unfused(q: Any, k: Any, v: Any, mask: str) -> tuple[Any, Any, Any]:
    """(out and LSE in float64, out of the unfused peer in q's dtype) for q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and v
    (B, Hkv, Lk, Dv).

    The unfused peer is what a framework does without a fused kernel: scores and softmax in fp32, weights rounded to the
    dtype. The scores are computed in slices of the query rows. TF32 must be off, as it is by default in torch.
    """
    import torch

    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    scale = head_dim**-0.5
    gold = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float64, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    unfused = torch.empty_like(gold, dtype=q.dtype)
    step = max(1, _SCORES // (heads * keys))
    column = torch.arange(keys, device=q.device)
    for item in range(batch):
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            visible = torch.full((part.stop - first,), keys, device=q.device)
            if mask == "causal":
                visible = torch.arange(first, part.stop, device=q.device) + keys - rows + 1
            hidden = column >= visible.repeat(group)[:, None]
            # (Hkv, the rows of all heads that share a key head, D), and back
            grouped = q[item, :, part].unflatten(0, (kv_heads, group)).flatten(1, 2)
            ungrouped = (heads, part.stop - first)
            for dtype in (torch.float64, torch.float32):
                query, key, value = grouped.to(dtype), k[item].to(dtype), v[item].to(dtype)
                scores = (scale * (query @ key.mT)).masked_fill_(hidden, -torch.inf)
                if dtype == torch.float64:
                    lse[item, :, part] = scores.logsumexp(-1).reshape(ungrouped)
                    gold[item, :, part] = (scores.softmax(-1) @ value).reshape(*ungrouped, -1)
                else:
                    weights = scores.softmax(-1).to(q.dtype).to(dtype)
                    unfused[item, :, part] = (weights @ value).to(q.dtype).reshape(*ungrouped, -1)
                del scores
    return gold, lse, unfused


def gold_and_unfused_gradients(dout: Any, q: Any, k: Any, v: Any, mask: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The gradients of q, k and v by torch's autograd: in float64, and of the unfused peer in q's dtype.

    The unfused peer as in `gold_and_unfused`; the gradients of its scores are rounded to the dtype as well. There are
    as many key heads as query heads, and as many keys as rows. The rows are computed in slices.
    """
    import torch

    rows = q.shape[2]
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * rows))
    place = torch.arange(rows, device=q.device)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        query, key, value = leaves
        for first in range(0, rows, step):
            part = slice(first, first + step)
            scores = q.shape[3] ** -0.5 * (query[:, :, part] @ key.mT)
            if mask == "causal":
                scores = scores.masked_fill(place > place[part, None], -torch.inf)
            weights = scores.softmax(-1)
            if dtype == torch.float32:
                scores.register_hook(lambda gradient: gradient.to(q.dtype).to(gradient.dtype))
                weights = weights + (weights.to(q.dtype).to(dtype) - weights).detach()
            (weights @ value).backward(dout[:, :, part].to(dtype))
        results.append(leaves)
    gold, unfused = results
    return tuple(x.grad for x in gold), tuple(x.grad.to(q.dtype) for x in unfused)


def relative_error(out: Any, gold: Any) -> float:
    """``|out - gold| / |gold|`` in the Euclidean norm; NaN if there is one in ``out``."""
    return float((out.double() - gold).norm() / gold.norm())


def largest_error(out: Any, gold: Any) -> float:
    return float((out.double() - gold).abs().max())


def why_wrong(results: Mapping[str, Any], gold: Any, unfused: Any) -> dict[str, str]:
    """Of peers' results, those that are so far from ``gold`` that they are another problem's, with the reason."""
    dtype = str(unfused.dtype).removeprefix("torch.")
    allowed = _WRONG * max(relative_error(unfused, gold), LIMITS[dtype].floor)
    errors = {name: relative_error(result, gold) for name, result in results.items()}
    return {
        name: f"wrong: relative L2 error {error:.3g}, allowed {allowed:.3g}"
        for name, error in errors.items()
        if not error <= allowed
    }


def references(tried: Attempt, part: Callable[[Any], Any], gold: Any, unfused: Any) -> dict[str, Any]:
    """What cuattn's answer is judged by: this part of the peers' results and the unfused one. Refuses wrong results."""
    parts = {name: part(result) for name, result in tried.results.items()}
    tried.refuse(why_wrong(parts, gold, unfused))
    return {**{name: parts[name] for name in tried.results}, "unfused": unfused}


def why_inaccurate(out: Any, gold: Any, references: Mapping[str, Any], dtype: str) -> str | None:
    """None if ``out`` is about as accurate as the worst of the ``references``, by the rules of cuattn.testing."""
    worst = max(relative_error(reference, gold) for reference in references.values())
    limits = LIMITS[dtype]
    error, allowed = relative_error(out, gold), limits.ratio * max(worst, limits.floor)
    if not error <= allowed:
        return f"relative L2 error {error:.3g}, allowed {allowed:.3g}"
    unit = limits.epsilon * float(gold.abs().max())
    element = largest_error(out, gold)
    allowed = limits.element * max(largest_error(reference, gold) for reference in references.values()) + unit
    return None if element <= allowed else f"an element is off by {element:.3g}, allowed {allowed:.3g}"


def why_not_invariant(attention: Callable[..., Any], q: Any, k: Any, v: Any, mask: str, out: Any) -> str | None:
    """None if parts of the problem computed alone have the bits that they have in ``out``, the result of the whole.

    The problem has as many key heads as query heads.
    """
    middle = q.shape[2] // 2
    whole = slice(None)
    cuts: dict[str, tuple[slice, slice, slice]] = {
        "the last sequence": (slice(-1, None), whole, whole),
        "the first head": (whole, slice(0, 1), whole),
        "the second half of the rows": (slice(-1, None), whole, slice(middle, None)),
        "the last row": (slice(-1, None), slice(-1, None), slice(-1, None)),
        "the whole problem again": (whole, whole, whole),
    }
    for name, (items, heads, rows) in cuts.items():
        alone = attention(q[items, heads, rows], k[items, heads], v[items, heads], mask)
        if not same_bits(alone, out[items, heads, rows]):
            return f"other bits for {name}"
    return None


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors of one dtype have the same shape and bits."""
    import torch

    word = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return bool(torch.equal(a.contiguous().view(word), b.contiguous().view(word)))
