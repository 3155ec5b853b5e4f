"""Running tests/kernels/hardware.cuh, emulated or on a device, on NumPy arrays of bits."""

import ctypes
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from exact_products import Bits

from cuattn import emulator, env
from cuattn.config import KernelConfig
from cuattn.config.base import Constants
from cuattn.emulator import build
from cuattn.interop import import_tensor
from cuattn.jit.compiler import compile_cubin
from cuattn.launches import Launch

SOURCE = Path(__file__).parent / "kernels" / "hardware.cuh"

Array = npt.NDArray[np.generic]
#: (kernel's name, blocks, inputs, outputs), both by the name of their field in the parameters; fills the outputs.
Launcher = Callable[[str, int, dict[str, Array], dict[str, Array]], None]
KERNELS = ("product_bfloat16", "product_float16", "product_tf32", "functions")


class HardwareParams(ctypes.Structure):
    """Mirror of HardwareParams in hardware.cuh."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("a", "b", "c", "out", "packed"))


@dataclass(frozen=True)
class HardwareConfig(KernelConfig):
    """A kernel of hardware.cuh; it has no unit of its own."""

    params = "HardwareParams"
    threads = 32
    shared_bytes = 512 + 256 + 512

    kernel: str
    arch: str

    @property
    def name(self) -> str:
        return self.kernel

    @property
    def constants(self) -> Constants:
        return {}


class Functions(NamedTuple):
    """Bits of 2^x, ln(x), and x in bf16 and fp16."""

    exp2: npt.NDArray[np.uint32]
    log: npt.NDArray[np.uint32]
    bf16: npt.NDArray[np.uint16]
    fp16: npt.NDArray[np.uint16]


def load(config: KernelConfig) -> ctypes.CDLL:
    return build.load_kernel(config.name, SOURCE.read_text(), config.kernel, config.params)


def emulated(arch: str) -> Launcher:
    """Launches on the CPU, as a GPU of that architecture."""

    def launch(kernel: str, blocks: int, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        config = HardwareConfig(kernel, arch)
        tensors_in, tensors_out = ({n: import_tensor(x, n) for n, x in part.items()} for part in (inputs, outputs))
        params = HardwareParams(**{name: x.ctypes.data for name, x in (inputs | outputs).items()})
        planned = Launch(config, blocks, params, tensors_in, tensors_out)
        emulator.run([planned], load=load)

    return launch


@functools.cache
def cubin(arch: str) -> bytes:
    """All kernels of hardware.cuh, compiled by NVRTC; needs no device."""
    return compile_cubin(HardwareConfig(KERNELS[0], arch), SOURCE.read_text(), env.kernel_dir())[0]


def on_device(arch: str) -> Launcher:
    """Launches on the current CUDA device, whose architecture must be given."""
    import cupy

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin(arch))
        file.flush()
        module = cupy.RawModule(path=file.name)
        kernels = {kernel: module.get_function(kernel) for kernel in KERNELS}

    def launch(kernel: str, blocks: int, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        arrays = {name: cupy.asarray(x) for name, x in (inputs | outputs).items()}
        params = HardwareParams(**{name: x.data.ptr for name, x in arrays.items()})
        argument = np.frombuffer(bytes(params), f"V{ctypes.sizeof(params)}")
        kernels[kernel]((blocks,), (HardwareConfig.threads,), (argument,), shared_mem=HardwareConfig.shared_bytes)
        for name, x in outputs.items():
            x[...] = arrays[name].get()

    return launch


def products(launch: Launcher, dtype: str, a: Array, b: Array, c: Bits) -> Bits:
    """Bits of ``c + a b^T``: c and the result (n, 16, 8), fp32; a, b as in exact_products.Operands."""
    inputs = {"a": a, "b": b, "c": c.view(np.float32)}
    out = np.empty(c.shape, np.float32)
    launch(f"product_{dtype}", len(a), {n: np.ascontiguousarray(x) for n, x in inputs.items()}, {"out": out})
    return out.view(np.uint32)


def functions(launch: Launcher, x: npt.NDArray[np.float32]) -> Functions:
    """All functions at fp32 ``x``, of any length."""
    blocks = -(-x.size // 128)
    padded = np.ones((blocks, 32, 4), np.float32)
    padded.reshape(-1)[: x.size] = x
    out, packed = np.empty((blocks, 32, 4, 2), np.float32), np.empty((blocks, 32, 2, 4), np.uint16)
    launch("functions", blocks, {"a": padded}, {"out": out, "packed": packed})
    exp2, log = (out.view(np.uint32)[..., i].reshape(-1)[: x.size] for i in range(2))
    bf16, fp16 = (packed[:, :, i].reshape(-1)[: x.size] for i in range(2))
    return Functions(exp2, log, bf16, fp16)
