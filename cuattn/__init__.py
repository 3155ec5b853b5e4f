"""Batch-invariant softmax attention: a row's bits do not depend on who shares the batch."""

from cuattn.api import attention
from cuattn.backend import use_backend
from cuattn.contract import CONTRACT_VERSION
from cuattn.jit import precompile

__version__ = "0.1.0"

__all__ = ["CONTRACT_VERSION", "__version__", "attention", "precompile", "use_backend"]
