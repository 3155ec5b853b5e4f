"""Just-in-time compilation: KernelConfig -> generated unit -> NVRTC -> cubin in a cache addressed by content."""

from cuattn.jit.cache import ArtifactCache
from cuattn.jit.compiler import NUMERICS_FLAGS, Resources, check_driver
from cuattn.jit.includes import source_digest
from cuattn.jit.kernels import Precompiled, cubin_path, precompile, resources
from cuattn.jit.unit import kernel_source

__all__ = [
    "NUMERICS_FLAGS",
    "ArtifactCache",
    "Precompiled",
    "Resources",
    "check_driver",
    "cubin_path",
    "kernel_source",
    "precompile",
    "resources",
    "source_digest",
]
