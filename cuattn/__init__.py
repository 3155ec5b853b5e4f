"""Batch-invariant softmax attention: a row's bits do not depend on who shares the batch."""

import importlib
from typing import TYPE_CHECKING, Any

from cuattn.api import attention, attention_varlen
from cuattn.backend import use_backend
from cuattn.cache import append_kv, attention_kvcache
from cuattn.checks import Partials
from cuattn.contract import CONTRACT_VERSION
from cuattn.gradients import attention_backward, attention_varlen_backward
from cuattn.jit import precompile
from cuattn.partials import attention_partials, chunk_starts, combine

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cuattn import compat, jax, testing

__all__ = [
    "CONTRACT_VERSION",
    "Partials",
    "__version__",
    "append_kv",
    "attention",
    "attention_backward",
    "attention_kvcache",
    "attention_partials",
    "attention_varlen",
    "attention_varlen_backward",
    "chunk_starts",
    "combine",
    "compat",
    "jax",
    "precompile",
    "testing",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Imports `cuattn.autograd`, `compat`, `jax` and `testing` when they are first asked for, autograd by a tensor."""
    if name in ("autograd", "compat", "jax", "testing"):
        return importlib.import_module(f"cuattn.{name}")
    raise AttributeError(f"module 'cuattn' has no attribute {name!r}")
