"""The CUDA devices at hand, as CuPy sees them."""

import functools
from typing import Any

from cuattn import env
from cuattn.config import ARCHITECTURES, architecture_of, capability
from cuattn.errors import MissingDependencyError

INSTALL_ADVICE = "pip install 'cuattn[cuda13]', or 'cuattn[cuda12]' for a driver of CUDA 12"


def import_cupy() -> Any:
    """The module cupy. Raises MissingDependencyError, with the reason, if it does not import."""
    try:
        import cupy
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise MissingDependencyError(f"CUDA kernels and arrays need CuPy ({reason}): {INSTALL_ADVICE}") from error
    return cupy


@functools.cache
def device_count() -> int:
    """The number of CUDA devices that CuPy can use: 0 without CuPy, without a driver and where either is broken."""
    try:
        return int(import_cupy().cuda.runtime.getDeviceCount())
    except Exception:  # whatever keeps CuPy from working, the answer is the same
        return 0


def device_architecture(index: int) -> str:
    """The compilation target of a device, such as "sm_90a": that of its compute capability, or what CUATTN_ARCH names.

    Raises NotImplementedError for a device that has none, and ValueError where the variable names another device's.
    """
    own, named = _own_architecture(index), env.arch()
    if named is None:
        return own
    choices = [arch for arch in ARCHITECTURES if capability(arch) == capability(own)]
    if named not in choices:
        raise ValueError(f"{env.ARCH}: got {named!r}, expected {' or '.join(choices)} for the device cuda:{index}")
    return named


@functools.cache
def _own_architecture(index: int) -> str:
    return architecture_of(import_cupy().cuda.Device(index).compute_capability)


@functools.cache
def processor_count(index: int) -> int:
    """The number of multiprocessors of a device."""
    return int(import_cupy().cuda.Device(index).attributes["MultiProcessorCount"])
