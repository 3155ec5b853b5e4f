"""Running emulated kernels on tensors in CPU memory."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cuattn.config import KernelConfig
from cuattn.emulator import build, hardware
from cuattn.errors import EmulatorError
from cuattn.interop import Tensor
from cuattn.interop.numpy_ import aligned_empty
from cuattn.launches import Launch
from cuattn.tensor_map import argument, encode_emulated

#: Orders in which threads run and copies land; random ones vary by seed. A correct kernel has the same bits under all.
SCHEDULES = ("ascending", "descending", "random")
#: emulator::Use in include/emulator/memory.h: what a kernel may do with a tensor.
_USES = ("input", "output", "update", "scratch")


class _Region(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writer", ctypes.c_void_p),
        ("use", ctypes.c_int32),
    ]


class _Launch(ctypes.Structure):
    """Mirror of emulator::Launch in include/emulator/launch.h."""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("regions", ctypes.POINTER(_Region)),
        ("exp2_table", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_int64),
        ("grid", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("first_block", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("overlaps", ctypes.c_int32),
        ("region_count", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("tensor_core_terms", ctypes.c_int32),
        ("tensor_core_fraction_bits", ctypes.c_int32),
    ]


def run(
    launches: Sequence[Launch],
    schedule: str = "ascending",
    seed: int = 1,
    load: Callable[[KernelConfig], ctypes.CDLL] = build.load,
) -> None:
    """Runs launches one after the other. ``load`` gives the library of a configuration's kernel.

    Its tensors are all the memory that a launch may touch: inputs are only read; every element of an output is written
    once by all launches together; an update, such as a cache, is written anywhere, but no byte twice in one launch; of
    scratch memory only what has been written is read. No block reads what another block of its launch has written to
    an update or to scratch memory, unless both are of a cluster that has met in between. A kernel that overlaps waits
    for earlier launches before it touches any of it. A tensor has the same name in every launch that writes to it.
    Raises EmulatorError where a kernel errs. Python threads may call this at the same time.
    """
    writers = _Writers()
    first_block = 1
    for launch in launches:
        _run(launch, load(launch.config), writers, first_block, schedule, seed)
        first_block += launch.grid
    for name, tensor in {name: tensor for launch in launches for name, tensor in launch.outputs.items()}.items():
        _check_written(name, tensor, writers.of(name, tensor))


class _Writers:
    """The number of the block that wrote each byte of a tensor last, for the launches of one run."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int, int], npt.NDArray[np.uint32]] = {}

    def of(self, name: str, tensor: Tensor) -> npt.NDArray[np.uint32]:
        key = (name, *tensor.address_range)
        if key not in self._arrays:
            self._arrays[key] = np.zeros(tensor.nbytes_span, np.uint32)
        return self._arrays[key]


def _run(launch: Launch, library: ctypes.CDLL, writers: _Writers, first_block: int, schedule: str, seed: int) -> None:
    def region(name: str, tensor: Tensor, use: str) -> _Region:
        first, end = tensor.address_range
        writer = None if use == "input" else writers.of(name, tensor).ctypes.data
        return _Region(name.encode(), first, end - first, writer, _USES.index(use))

    # Outputs first: where an output lies between the rows of an input, the first that holds an address is its region.
    tensors = {
        "output": launch.outputs,
        "scratch": launch.scratch,
        "update": launch.updates,
        "input": launch.inputs,
    }
    regions = [region(name, tensor, use) for use, named in tensors.items() for name, tensor in named.items()]
    message = ctypes.create_string_buffer(1024)
    core = hardware.tensor_core(launch.config.arch)
    content = argument(launch.params, launch.tensor_maps, encode_emulated)
    params = aligned_empty((len(content),), np.uint8)  # as tensor maps must lie
    params[:] = np.frombuffer(content, np.uint8)
    described = _Launch(
        params=params.ctypes.data,
        regions=(_Region * len(regions))(*regions),
        exp2_table=hardware.exp2_table().ctypes.data,
        error=ctypes.cast(message, ctypes.c_char_p),
        error_bytes=len(message),
        grid=launch.grid,
        seed=seed,
        first_block=first_block,
        threads=launch.threads,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        overlaps=launch.config.overlaps,
        region_count=len(regions),
        schedule=SCHEDULES.index(schedule),
        tensor_core_terms=core.terms,
        tensor_core_fraction_bits=core.fraction_bits,
    )
    if library.emulate(ctypes.byref(described)):
        raise EmulatorError(f"{launch.config.name}: {message.value.decode()}")


def _check_written(name: str, tensor: Tensor, writer: npt.NDArray[np.uint32]) -> None:
    """Every byte of every element was stored to, and no byte between elements."""
    if 0 in tensor.shape:
        return
    size = tensor.itemsize
    strides = (*(stride * size * writer.itemsize for stride in tensor.strides), writer.itemsize)
    start = tensor.pointer - tensor.address_range[0]
    bytes_of = np.lib.stride_tricks.as_strided(writer[start:], (*tensor.shape, size), strides)
    missing = np.argwhere(bytes_of.min(axis=-1) == 0)
    if missing.size:
        raise EmulatorError(
            f"{name}: {len(missing)} elements were not written, the first at {tuple(missing[0].tolist())}"
        )
    if stray := np.count_nonzero(writer) - bytes_of.size:
        raise EmulatorError(f"{name}: {stray} bytes between its elements were written")
