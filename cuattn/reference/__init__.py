"""The CPU backend, and the float64 gold standard for tests."""

from cuattn.reference.canonical import combine, forward, forward_partials
from cuattn.reference.gold import gold_attention, gold_gradients
from cuattn.reference.gradients import backward
from cuattn.reference.places import append

__all__ = ["append", "backward", "combine", "forward", "forward_partials", "gold_attention", "gold_gradients"]
