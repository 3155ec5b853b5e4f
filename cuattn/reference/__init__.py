"""The CPU backend, and the float64 gold standard for tests."""

from cuattn.reference.canonical import forward
from cuattn.reference.gold import gold_attention

__all__ = ["forward", "gold_attention"]
