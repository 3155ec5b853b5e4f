"""Hugging Face transformers: ``attn_implementation="cuattn"`` after `register`."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from cuattn import api
from cuattn.errors import MissingDependencyError

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise MissingDependencyError(
        f"cuattn.integrations.transformers needs transformers ({error}): pip install 'cuattn[transformers]'"
    ) from error


def register(name: str = "cuattn") -> None:
    """Makes ``attn_implementation=name`` of transformers' models mean `cuattn.attention`.

    Both the attention function and the function that prepares its mask are registered, in transformers' own
    AttentionInterface and AttentionMaskInterface. Models that look their attention up there (Llama, Qwen3 and most
    others) then run forward, ``generate`` with dynamic and static caches, and training, on tensors of float16,
    bfloat16 or float32 on CPU or CUDA. Calling it again does no harm.

    Supported: causal and bidirectional attention, padding on the left, on the right and anywhere else by a 2-D
    ``attention_mask``, grouped-query heads without repeating keys, sequences packed in a row (``position_ids`` that
    start again, or ``cu_seq_lens_q`` and ``cu_seq_lens_k``), sliding windows while the sequence is no longer than the
    window. A query in the padding sees no key where the padding is on its left: its output is +0.

    Guarantee: that of `cuattn.attention`. A token's attention output is a function of its query and of the keys and
    values of its sequence, bit for bit, whatever the batch, the padding, the cache and the number of tokens in the
    call. The rest of the model (matrix products, norms) is torch's, and makes no such promise.

    What cannot be done raises NotImplementedError, which names it, when the model runs: sliding windows shorter than
    the sequence, 4-D masks, masks with functions of their own, attention dropout, soft-capped scores, attention sinks,
    position biases, attention weights as an output.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register` registers; its signature is transformers'.

    query: (B, Hq, Lq, D); key: (B, Hkv, Lk, D); value: (B, Hkv, Lk, Dv).
    attention_mask: what the function `attention_mask` returned.
    is_causal: by default the attribute of ``module``.

    Returns the output, (B, Lq, Hq, Dv), contiguous, and None for the attention weights.
    """
    _refuse_options(key.shape[2] if attention_mask is None else attention_mask.shape[-1], dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = "causal" if causal else "full"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if starts_q is None and attention_mask is not None and attention_mask.ndim == 1:
        starts_q = starts_k = attention_mask
    if starts_q is not None and starts_k is not None:
        if attention_mask is not None and attention_mask.ndim != 1:
            _refuse("cu_seq_lens_q together with an attention_mask")
        starts_q, starts_k = (x.to(torch.int32) for x in (starts_q, starts_k))
        packed = (*(x.flatten(0, 1) for x in (q, k, v)), starts_q, starts_k, mask)
        out = api.attention_varlen(*packed, scale=scaling)
        return out.unflatten(0, q.shape[:2]), None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            _refuse(f"a {attention_mask.ndim}-D attention mask (expected a 2-D padding mask or None)")
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
    return api.attention(q, k, v, mask, scale=scaling, key_padding_mask=attention_mask, layout="bshd"), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that `register` registers; its signature is transformers'. Nothing of size Lq x Lk is made.

    q_offset, kv_offset: the positions of the first query and of the first key.
    attention_mask: bool (B, positions), True where a token exists, or None.

    Returns None where all keys exist; or bool (B, keys), the keys that exist, of which the last is that of the last
    query (what a static cache holds behind it does not count); or, of packed sequences, int32 (sequences + 1,): where
    they start in the flattened batch.
    """
    skip = allow_is_causal_skip or allow_is_bidirectional_skip
    causal = mask_function is not bidirectional_mask_function
    if use_vmap:
        _refuse("a mask with a function of its own (or_mask_function, and_mask_function)")
    if local_size is not None:
        if kv_offset + kv_length > local_size or not skip:
            _refuse(f"a sliding window or chunk of {local_size} keys over {kv_offset + kv_length}")
        causal = allow_is_causal_skip
    elif causal and mask_function is not causal_mask_function:
        return _packed_starts(mask_function, attention_mask, batch_size, q_length, kv_length, device)

    keys, exists = kv_length, attention_mask
    if causal and isinstance(q_offset, Tensor) and q_length == 1:  # a static cache, whose length stays on the device
        seen = torch.arange(kv_length, device=device) <= q_offset - kv_offset
        exists = seen.expand(batch_size, -1) if exists is None else _cut(exists, kv_offset, keys) & seen
        return exists.contiguous()
    if causal:
        keys = int(q_offset) + q_length - kv_offset
        if keys > kv_length:
            _refuse(f"queries up to position {keys + kv_offset} over keys up to {kv_length + kv_offset}")
    if exists is None:
        return None if keys == kv_length else torch.ones(batch_size, keys, dtype=torch.bool, device=device)
    exists = _cut(exists, kv_offset, keys)
    return None if keys == kv_length and skip and bool(exists.all()) else exists


def _cut(exists: Tensor, first: int, keys: int) -> Tensor:
    """The keys from the position ``first`` on; those behind the end of the mask do not exist."""
    return torch.nn.functional.pad(exists[:, first : first + keys], (0, max(0, first + keys - exists.shape[1])))


def _packed_starts(
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    device: Any,
) -> Tensor:
    """int32 (sequences + 1,): where sequences start, one behind the other in the rows of a flattened batch.

    The mask function is the only one to know. Where a token does not see the one before it a sequence starts; a token
    that sees the one behind it is something else than a packed causal sequence.
    """
    if attention_mask is not None or q_length != kv_length:
        _refuse("a mask other than causal, bidirectional or packed")
    rows, zero = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    places = torch.arange(q_length, device=device)[None]
    before, behind = places[:, :-1], places[:, 1:]
    if bool(mask_function(rows, zero, before, behind).any()):
        _refuse("a mask that lets tokens see later ones, such as blocks of an image")
    starts = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~mask_function(rows, zero, behind, before)
    ends = torch.full((1,), batch_size * q_length, device=device)
    return torch.cat((starts.flatten().nonzero()[:, 0], ends)).to(torch.int32)


def _refuse_options(keys: int, dropout: float, options: dict[str, Any]) -> None:
    if dropout:
        _refuse(f"attention dropout ({dropout}; set the configuration's attention_dropout to 0)")
    window = options.get("sliding_window")
    if window is not None and keys > window:
        _refuse(f"a sliding window of {window} keys over {keys}")
    unsupported = {
        "softcap": "soft-capped scores (softcap)",
        "s_aux": "attention sinks (s_aux)",
        "position_bias": "a position bias",
        "block_table": "transformers' paged cache (block_table)",
    }
    for option, what in unsupported.items():
        if options.get(option) is not None:
            _refuse(what)
    if options.get("output_attentions"):
        _refuse("attention weights as an output (output_attentions)")


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f'attn_implementation="cuattn": {what} is not supported')
