"""Loading compiled kernels to a device and launching them, through CuPy."""

import array
import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from cuattn.config import KernelConfig
from cuattn.devices import device_architecture, device_count, import_cupy, processor_count
from cuattn.jit import check_driver, cubin_path
from cuattn.launches import Launch
from cuattn.tensor_map import argument, encode

__all__ = ["device_architecture", "device_count", "launch_kernel", "load_anew", "loaded", "processor_count", "words_of"]

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
        """Launches what `ready` gives; the kernel's device must be the thread's current one."""
        self.ready(grid, words, stream, cluster).launch()

    def ready(self, grid: int, words: Words, stream: int, cluster: int = 1) -> "ReadyLaunch":
        """A launch of at least one block on a raw stream of the kernel's device.

        ``words`` are those of `words_of`, which the launch keeps, and writes the first of. ``cluster`` blocks run
        together.
        """
        address = words.buffer_info()[0]
        words[0] = address + words.itemsize
        threads = self._threads
        if self._launch_early is None:
            arguments = (self._handle, grid, 1, 1, threads, 1, 1, self._shared_bytes, stream, address, 0)
            return ReadyLaunch(grid, threads, self._launch, arguments, (words,))
        shape = _early(threads, self._shared_bytes, cluster, _starts_early())[:]
        own = shape.buffer_info()[0]
        shape[0], shape[4], shape[5] = grid | 1 << 32, stream, own + _CONFIG_WORDS * shape.itemsize
        return ReadyLaunch(grid, threads, self._launch_early, (own, self._handle, address, 0), (words, shape))


class ReadyLaunch(NamedTuple):
    """A launch that any thread may make, any number of times: nothing that it refers to changes any more.

    function: the driver's, which gives the number of an error, or CuPy's, which raises it. memory: what the arguments
    point to; the driver reads all of it before a launch returns.
    """

    grid: int
    threads: int
    function: Callable[..., int | None]
    arguments: tuple[int, ...]
    memory: tuple[Words, ...]

    def launch(self) -> None:
        """Launches; the kernel's device must be the thread's current one."""
        code = self.function(*self.arguments)
        if code:
            raise RuntimeError(
                f"cuLaunchKernelEx failed with CUDA error {code}: {self.grid} blocks, {self.threads} threads"
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
    """A kernel's argument as the driver wants to find it, in words of 64 bits: behind a pointer to it."""
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
    return load_anew(config)


def load_anew(config: KernelConfig) -> Kernel:
    """Compiles the sources that are in use now, if need be, and loads the kernel to the current device once more."""
    check_driver()
    function = import_cupy().RawModule(path=str(cubin_path(config))).get_function(config.kernel)
    function.max_dynamic_shared_size_bytes = config.shared_bytes  # needed above 48 KB; this also loads the kernel now
    return Kernel(config, function)
