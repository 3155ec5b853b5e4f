"""torch on the device: the peers that cuattn is measured beside, and the answers that it is judged by."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from cuattn.testing import LIMITS

#: Name -> member of torch.nn.attention.SDPBackend.
SDPA = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
#: torch's flash backend with `torch.use_deterministic_algorithms`: its gradients are the same in each run.
DETERMINISTIC = "flash_deterministic"
#: The fastest ones that serve a dtype.
FASTEST = {
    "float16": ("flash", "cudnn"),
    "bfloat16": ("flash", "cudnn"),
    "float32": ("efficient", "math"),
}
#: Those whose gradients are measured; the math backend holds all scores.
GRADIENTS = {
    "float16": ("flash", DETERMINISTIC, "cudnn"),
    "bfloat16": ("flash", DETERMINISTIC, "cudnn"),
    "float32": ("efficient",),
}
#: Scores that the answers below hold at a time, in elements.
_SCORES = 1 << 27


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Inside it `torch.nn.functional.scaled_dot_product_attention` uses this backend or raises RuntimeError."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, SDPA[name])):
        yield


@contextlib.contextmanager
def deterministic_flash() -> Iterator[None]:
    """`only` flash, with deterministic gradients, and without the NaN that torch then writes to all new memory."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with only("flash"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def backend_of(provider: str) -> contextlib.AbstractContextManager[None]:
    """`only` for a peer's name, nothing for another provider's."""
    if provider == DETERMINISTIC:
        return deterministic_flash()
    return only(provider) if provider in SDPA else contextlib.nullcontext()


def sdpa(q: Any, k: Any, v: Any, mask: str) -> Any:
    """torch SDPA. Its causal mask is aligned top-left, so that only square problems mean the same as cuattn's."""
    import torch

    if mask == "causal" and q.shape[2] != k.shape[2]:
        raise ValueError(f"mask: got causal with {q.shape[2]} queries and {k.shape[2]} keys, expected as many of both")
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal", **grouped)


def available(
    q: Any,
    k: Any,
    v: Any,
    mask: str,
    report: Callable[[str], None] = print,
    names: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Outputs of those peers that can compute this problem; for each other one a line to ``report`` says why.

    ``names`` are those to try, by default the fastest ones for q's dtype.
    """
    outputs, reasons = attempt(q, k, v, mask, names or FASTEST[str(q.dtype).removeprefix("torch.")])
    for name, reason in reasons.items():
        report(f"without SDPA {name}: {reason}")
    return outputs


def attempt(q: Any, k: Any, v: Any, mask: str, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(outputs of the peers that can compute this problem, for each other one the reason)."""
    return attempt_all({name: partial(sdpa, q, k, v, mask) for name in names})


def attempt_all(calls: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """(results of those peers whose call succeeds, for each other one the reason)."""
    results = {name: _attempt(name, call) for name, call in calls.items()}
    reasons = {name: first_line(error) for name, error in results.items() if isinstance(error, Exception)}
    return {name: result for name, result in results.items() if name not in reasons}, reasons


def _attempt(name: str, call: Callable[[], Any]) -> Any:
    """The peer's result, or the exception that it ran into."""
    import torch

    try:
        with backend_of(name):
            result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # whatever a peer runs into, the others go on
        return error
    return result


def first_line(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"


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


def why_inaccurate(out: Any, gold: Any, references: dict[str, Any], dtype: str) -> str | None:
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
