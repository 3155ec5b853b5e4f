"""Attention under the signatures of other packages, to be imported in their place.

`sdpa`: `torch.nn.functional.scaled_dot_product_attention`. `flash_attn`: the functions of flash-attn 2. Names, order,
defaults, layouts and meaning of the arguments are those of the originals; what cuattn does not compute is refused with
NotImplementedError. The bits are those of `cuattn.attention` and its siblings, under the same guarantee.
"""

from cuattn.compat import flash_attn, sdpa

__all__ = ["flash_attn", "sdpa"]
