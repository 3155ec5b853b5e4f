"""Loading compiled kernels to a device and launching them, through CuPy."""

import array
import ctypes
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
#: Of CUlaunchAttributeID in cuda.h; words of a CUlaunchConfig and a CUlaunchAttribute; that a launch may start early.
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_CONFIG_WORDS, _ATTRIBUTE_WORDS = 7, 9
_EARLY = (_PROGRAMMATIC_STREAM_SERIALIZATION, 1)
#: The first driver that can capture such launches in a CUDA graph, too.
_EARLY_DRIVER = 12030


class Kernel:
    """A kernel that is loaded to a device."""

    def __init__(self, config: KernelConfig, function: Any) -> None:
        self._function = function  # keeps it loaded
        self._handle = function.kernel.ptr
        self._threads, self._shared_bytes = config.threads, config.shared_bytes
        self._launch = _driver().launchKernel
        self._launch_early = _launch_ex() if config.overlaps else None

    def launch(self, grid: int, words: Words, stream: int, cluster: int = 1) -> None:
        """Launches at least one block on a raw stream of the kernel's device, the thread's current one.

        ``words`` are those of `words_of`, of which this call writes the first. ``cluster`` blocks run together.
        """
        address = words.buffer_info()[0]
        words[0] = address + words.itemsize
        if self._launch_early is None:
            self._launch(self._handle, grid, 1, 1, self._threads, 1, 1, self._shared_bytes, stream, address, 0)
            return
        shape = _early(self._threads, self._shared_bytes, cluster, _starts_early())[:]
        own = shape.buffer_info()[0]
        shape[0], shape[4], shape[5] = grid | 1 << 32, stream, own + _CONFIG_WORDS * shape.itemsize
        code = self._launch_early(own, self._handle, address, 0)
        if code:
            raise RuntimeError(
                f"cuLaunchKernelEx failed with CUDA error {code}: {grid} blocks, {self._threads} threads"
            )


@functools.cache
def _early(threads: int, shared_bytes: int, cluster: int, early: bool) -> Words:
    """A CUlaunchConfig of cuda.h without its grid, stream and place, and behind it its attributes: an early start, and
    the blocks of a cluster.
    """
    attributes = [_EARLY] * early + [(_CLUSTER_DIMENSION, cluster | 1 << 32, 1)] * (cluster > 1)
    words = array.array("Q", (0, 1 | threads << 32, 1 | 1 << 32, shared_bytes, 0, 0, len(attributes)))
    for attribute in attributes:
        words.extend((*attribute, *(0,) * (_ATTRIBUTE_WORDS - len(attribute))))
    return words


def words_of(argument: bytes | bytearray) -> Words:
    """A kernel's argument as the driver wants to find it, in words of 64 bits: behind a pointer to it.

    The driver reads all of it before a launch returns.
    """
    return array.array("Q", bytes(8) + argument + bytes(-len(argument) % 8))


def _driver() -> Any:
    from cupy.cuda import driver

    return driver


@functools.cache
def _starts_early() -> bool:
    return bool(import_cupy().cuda.runtime.driverGetVersion() >= _EARLY_DRIVER)


@functools.cache
def _launch_ex() -> Any:
    """cuLaunchKernelEx of the driver."""
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    return function


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
        kernel.launch(
            launch.grid, words_of(argument(launch.params, launch.tensor_maps, encode)), stream, launch.cluster
        )


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
