"""Loading compiled kernels to a device and launching them, through CuPy."""

import array
import functools
import threading
from typing import Any, TypeAlias

from cuattn.config import KernelConfig
from cuattn.devices import device_architecture, device_count, import_cupy, processor_count
from cuattn.jit import check_driver, cubin_path
from cuattn.launches import Launch
from cuattn.tensor_map import argument, encode

__all__ = ["device_architecture", "device_count", "launch_kernel", "loaded", "processor_count", "words_of"]

Words: TypeAlias = "array.array[int]"

_load_lock = threading.Lock()


class Kernel:
    """A kernel that is loaded to a device."""

    def __init__(self, config: KernelConfig, function: Any) -> None:
        self._function = function  # keeps it loaded
        self._handle = function.kernel.ptr
        self._threads, self._shared_bytes = config.threads, config.shared_bytes
        self._launch = _driver().launchKernel

    def launch(self, grid: int, words: Words, stream: int) -> None:
        """Launches at least one block on a raw stream of the kernel's device, the thread's current one.

        ``words`` are those of `words_of`, of which this call writes the first.
        """
        address = words.buffer_info()[0]
        words[0] = address + words.itemsize
        self._launch(self._handle, grid, 1, 1, self._threads, 1, 1, self._shared_bytes, stream, address, 0)


def words_of(argument: bytes | bytearray) -> Words:
    """A kernel's argument as the driver wants to find it, in words of 64 bits: behind a pointer to it.

    The driver reads all of it before a launch returns.
    """
    return array.array("Q", bytes(8) + argument + bytes(-len(argument) % 8))


def _driver() -> Any:
    from cupy.cuda import driver

    return driver


def launch_kernel(launch: Launch, device_index: int, stream: int) -> None:
    """Launches ``grid`` blocks of ``config.threads`` threads on a raw stream of a device; returns at once.

    ``params`` is copied at the launch as the kernel's one argument, with the tensor maps filled in; the memory that it
    points to must live until the kernel has run. The first launch of a configuration on a device compiles and loads it;
    from the second on, a launch can be captured in a CUDA graph. A loaded kernel stays for the life of the process. No
    blocks, no launch.

    Raises CompileError and MissingDependencyError from the first launch.
    """
    if launch.grid == 0:
        return  # an error to the driver
    with import_cupy().cuda.Device(device_index):
        kernel = loaded(launch.config, device_index)
        kernel.launch(launch.grid, words_of(argument(launch.params, launch.tensor_maps, encode)), stream)


def loaded(config: KernelConfig, device_index: int) -> Kernel:
    """The kernel, compiled and loaded the first time; the device must be the current one."""
    with _load_lock:
        return _load(config, device_index)


@functools.cache
def _load(config: KernelConfig, device_index: int) -> Kernel:
    check_driver()
    function = import_cupy().RawModule(path=str(cubin_path(config))).get_function(config.kernel)
    function.max_dynamic_shared_size_bytes = config.shared_bytes  # needed above 48 KB; this also loads the kernel now
    return Kernel(config, function)
