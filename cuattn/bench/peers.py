"""The peers that cuattn is measured beside: the backends of torch SDPA, FlexAttention, flash-attn and FlashInfer."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cuattn.bench import libraries

Call = Callable[[], Any]

#: The provider that is no peer, and always measured.
OWN = "cuattn"

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


@dataclass(frozen=True)
class Peer:
    """Another implementation of attention.

    prepare(q, k, v, mask): for q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) and "full" or "causal", aligned
    bottom-right, a call that returns (B, Hq, Lq, Dv). decode(**arguments): for those of `cuattn.attention_kvcache` with
    one new token, a call that returns (B, Hq, 1, Dv). Either raises an exception that says why it cannot. setting: a
    context that preparations and calls need.
    """

    prepare: Callable[..., Call]
    decode: Callable[..., Call]
    setting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def attention(self, q: Any, k: Any, v: Any, mask: str) -> Any:
        return self.prepare(q, k, v, mask)()


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


def sdpa(q: Any, k: Any, v: Any, mask: str) -> Call:
    """`Peer.prepare` of torch SDPA. Its own causal mask is aligned top-left, which is the same for square problems."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if mask == "causal" and q.shape[2] == k.shape[2]:
        options["is_causal"] = True
    elif mask == "causal":
        options["attn_mask"] = causal_lower_right(q.shape[2], k.shape[2])
    return partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)


PEERS: dict[str, Peer] = {
    **{name: Peer(sdpa, libraries.over_cache(sdpa), partial(only, name)) for name in SDPA},
    DETERMINISTIC: Peer(sdpa, libraries.over_cache(sdpa), deterministic_flash),
    "flex": Peer(libraries.flex, libraries.over_cache(libraries.flex), libraries.compiling),
    "flash_attn": Peer(libraries.flash_attn, libraries.flash_attn_decode),
    "flashinfer": Peer(libraries.flashinfer, libraries.flashinfer_decode),
}
#: Those that differ in a forward pass.
FORWARD = tuple(name for name in PEERS if name != DETERMINISTIC)


def setting_of(provider: str) -> contextlib.AbstractContextManager[None]:
    """A peer's setting; nothing for another provider's name."""
    return PEERS[provider].setting() if provider in PEERS else contextlib.nullcontext()


@dataclass
class Attempt:
    """What peers made of a problem: calls, one for each set of inputs, and the first one's result; or the reason."""

    calls: dict[str, Sequence[Call]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Takes out peers that had a result."""
        for name in reasons:
            del self.calls[name], self.results[name]
        self.reasons |= reasons


def attempt(names: Iterable[str], calls_of: Callable[[Peer], Sequence[Call]]) -> Attempt:
    """Each peer's calls, made in its setting, of which the first is tried."""
    tried = Attempt()
    for name in names:
        made = _attempt(name, calls_of)
        if isinstance(made, str):
            tried.reasons[name] = made
        else:
            tried.calls[name], tried.results[name] = made
    return tried


def _attempt(name: str, calls_of: Callable[[Peer], Sequence[Call]]) -> tuple[Sequence[Call], Any] | str:
    """A peer's calls and the first one's result, or why there is none: torch says it in warnings."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with setting_of(name):
                calls = calls_of(PEERS[name])
                result = calls[0]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # whatever a peer runs into, the others go on
            details = [str(warning.message).partition(" (Triggered internally")[0] for warning in said]
            return " ".join(dict.fromkeys([first_line(error), *details]))
    return calls, result


def first_line(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"
