"""Running an emulated kernel on tensors in CPU memory."""

import ctypes

import numpy as np
import numpy.typing as npt

from cuattn.config import KernelConfig
from cuattn.emulator import build, hardware
from cuattn.errors import EmulatorError
from cuattn.interop import Tensor
from cuattn.schedule import LaunchPlan

#: Orders in which threads run and copies land; random ones vary by seed. A correct kernel has the same bits under all.
SCHEDULES = ("ascending", "descending", "random")


class _Region(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("written", ctypes.c_void_p),
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
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("region_count", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("tensor_core_terms", ctypes.c_int32),
        ("tensor_core_fraction_bits", ctypes.c_int32),
    ]


def forward(
    config: KernelConfig,
    plan: LaunchPlan,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    schedule: str = "ascending",
    seed: int = 1,
) -> None:
    """Runs one launch. Raises EmulatorError where the kernel errs or leaves an element of an output unwritten."""
    launch(config.name, build.load(config), config.arch, plan, inputs, outputs, schedule, seed)


def launch(
    name: str,
    library: ctypes.CDLL,
    arch: str,
    plan: LaunchPlan,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    schedule: str = "ascending",
    seed: int = 1,
) -> None:
    """Runs the kernel of a library of `build.load_kernel` as ``forward`` runs its own; ``name`` is for messages.

    ``inputs`` and ``outputs`` are all the memory that the kernel may touch, inputs read-only. Python threads may run
    launches at the same time.
    """
    written = {output: np.zeros(tensor.nbytes_span, np.uint8) for output, tensor in outputs.items()}
    # Outputs first: where an output lies between the rows of an input, the first that holds an address is its region.
    regions = [_region(output, tensor, written[output]) for output, tensor in outputs.items()]
    regions += [_region(input_, tensor, None) for input_, tensor in inputs.items()]
    message = ctypes.create_string_buffer(1024)
    core = hardware.tensor_core(arch)
    argument = _Launch(
        params=ctypes.addressof(plan.params),
        regions=(_Region * len(regions))(*regions),
        exp2_table=hardware.exp2_table().ctypes.data,
        error=ctypes.cast(message, ctypes.c_char_p),
        error_bytes=len(message),
        grid=plan.grid,
        seed=seed,
        threads=plan.threads,
        shared_bytes=plan.shared_bytes,
        region_count=len(regions),
        schedule=SCHEDULES.index(schedule),
        tensor_core_terms=core.terms,
        tensor_core_fraction_bits=core.fraction_bits,
    )
    if library.emulate(ctypes.byref(argument)):
        raise EmulatorError(f"{name}: {message.value.decode()}")
    for output, tensor in outputs.items():
        _check_written(output, tensor, written[output])


def _region(name: str, tensor: Tensor, written: npt.NDArray[np.uint8] | None) -> _Region:
    first, end = tensor.address_range
    return _Region(name.encode(), first, end - first, None if written is None else written.ctypes.data)


def _check_written(name: str, tensor: Tensor, written: npt.NDArray[np.uint8]) -> None:
    """Every byte of every element was stored to, and no byte between elements."""
    if 0 in tensor.shape:
        return
    size = tensor.itemsize
    strides = (*(stride * size for stride in tensor.strides), 1)
    start = tensor.pointer - tensor.address_range[0]
    bytes_of = np.lib.stride_tricks.as_strided(written[start:], (*tensor.shape, size), strides)
    missing = np.argwhere(bytes_of.min(axis=-1) == 0)
    if missing.size:
        raise EmulatorError(
            f"{name}: {len(missing)} elements were not written, the first at {tuple(missing[0].tolist())}"
        )
    if stray := np.count_nonzero(written) - bytes_of.size:
        raise EmulatorError(f"{name}: {stray} bytes between its elements were written")
