"""Loading compiled kernels to a device and launching them, through CuPy."""

import ctypes
import functools
import threading
from typing import Any

import numpy as np

from cuattn.config import KernelConfig
from cuattn.devices import device_architecture, device_count, import_cupy, processor_count
from cuattn.jit import check_driver, cubin_path

__all__ = ["device_architecture", "device_count", "launch_kernel", "processor_count"]

_load_lock = threading.Lock()


class _RawStream:
    """A raw cudaStream_t as an object of the CUDA stream protocol."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


def launch_kernel(config: KernelConfig, grid: int, params: ctypes.Structure, device_index: int, stream: int) -> None:
    """Launches ``grid`` blocks of ``config.threads`` threads on a raw stream of a device; returns at once.

    ``params`` is copied at the launch as the kernel's one argument; the memory that it points to must live until the
    kernel has run. The first launch of a configuration on a device compiles and loads it; from the second on, a launch
    can be captured in a CUDA graph. A loaded kernel stays for the life of the process. No blocks, no launch.

    Raises CompileError and MissingDependencyError from the first launch.
    """
    if grid == 0:
        return  # CuPy would launch one block
    cupy = import_cupy()
    with cupy.cuda.Device(device_index):
        with _load_lock:
            kernel = _load(config, device_index)
        with cupy.cuda.Stream.from_external(_RawStream(stream)):
            argument = np.frombuffer(bytes(params), dtype=f"V{ctypes.sizeof(params)}")  # one element: by value
            kernel((grid,), (config.threads,), (argument,), shared_mem=config.shared_bytes)


@functools.cache
def _load(config: KernelConfig, device_index: int) -> Any:
    """The kernel, loaded to the device ``device_index``, which must be the current one."""
    check_driver()
    kernel = import_cupy().RawModule(path=str(cubin_path(config))).get_function(config.kernel)
    kernel.max_dynamic_shared_size_bytes = config.shared_bytes  # needed above 48 KB; this also loads the kernel now
    return kernel
