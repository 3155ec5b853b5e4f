"""Running tests/kernels/hopper.cuh and its companions, emulated, on NumPy arrays of bits."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from exact_products import Bits
from hardware_kernels import Array, emulated, products

from cuattn import emulator
from cuattn.config import KernelConfig
from cuattn.config.base import Constants
from cuattn.emulator import build
from cuattn.errors import EmulatorError
from cuattn.interop import import_tensor
from cuattn.launches import Launch

KERNELS = Path(__file__).parent / "kernels"
SOURCE = "".join((KERNELS / file).read_text() for file in ("hopper.cuh", "hopper_roles.cuh", "hopper_stores.cuh"))
TILE = 8 * 1024


class TensorMap(ctypes.Structure):
    """A matrix in the emulator's form (cuattn/emulator/include/emulator/tma.h)."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)

    @classmethod
    def of(cls, matrix: npt.NDArray[np.uint16], box_rows: int) -> "TensorMap":
        rows, columns = matrix.shape
        strides = [matrix.strides[0], rows * matrix.strides[0], rows * matrix.strides[0]]
        words = [0x63756174746E6D70, matrix.ctypes.data, 2, 4, columns, rows, 1, 1, *strides, 64, box_rows, 1, 1, 128]
        return cls((ctypes.c_uint64 * 16)(*words))


class HopperParams(ctypes.Structure):
    """Mirror of HopperParams in hopper.cuh."""

    _fields_ = (
        *((name, TensorMap) for name in ("left_map", "right_map")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "start", "out")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "depth")),
        ("padding", ctypes.c_int32 * 9),
    )


@dataclass(frozen=True)
class HopperConfig(KernelConfig):
    """A kernel of these files with its template arguments."""

    params = "HopperParams"

    kernel: str
    threads: int = 128
    shared_bytes: int = 0
    arch: str = "sm_90a"

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.kernel)

    @property
    def constants(self) -> Constants:
        return {}


@dataclass
class Product:
    """A kernel and its operands; ``source``: the kernels' text. Without ``right`` its map is of as many columns of the
    result's bits as ``left`` has."""

    kernel: str
    left: npt.NDArray[np.uint16]
    right: npt.NDArray[np.uint16] | None
    columns: int
    boxes: tuple[int, int]  # rows of left's and of right's
    shared_bytes: int
    start: npt.NDArray[np.float32] | None = None
    threads: int = 128
    blocks: int = 1
    rows: int | None = None  # of the result, unless as many as left's
    source: str = SOURCE

    def run(self, schedule: str = "ascending", seed: int = 1) -> Bits:
        rows, depth = self.rows or len(self.left), self.left.shape[1]
        operands: dict[str, Array | None] = {"left": self.left, "right": self.right, "start": self.start}
        inputs = {name: x for name, x in operands.items() if x is not None}
        out = np.full((rows, self.columns), np.nan, np.float32)
        stored = out.view(np.uint16)[:, :depth]
        written, right = (stored, stored) if self.right is None else (out, self.right)
        maps = (TensorMap.of(x, box) for x, box in zip((self.left, right), self.boxes, strict=True))
        pointers = {name: x.ctypes.data for name, x in (inputs | {"out": out}).items()}
        params = HopperParams(*maps, **pointers, rows=rows, columns=self.columns, depth=depth)
        config = HopperConfig(self.kernel, self.threads, self.shared_bytes)
        tensors = {name: import_tensor(x, name) for name, x in inputs.items()}
        launch = Launch(config, self.blocks, params, tensors, {"out": import_tensor(written, "out")})
        emulator.run([launch], schedule, seed, load=self._load)
        return out.view(np.uint32)

    def _load(self, config: KernelConfig) -> ctypes.CDLL:
        return build.load_kernel(config.name, self.source, config.kernel, config.params)


class Case(NamedTuple):
    """A kernel's call, and the bits that it must give."""

    product: Product
    expected: npt.NDArray[np.uint32]

    def check(self, schedule: str = "ascending", seed: int = 1) -> None:
        np.testing.assert_array_equal(self.product.run(schedule, seed), self.expected)


class Bug(NamedTuple):
    """One change of the kernels and a pattern of what the emulator says about it."""

    old: str
    new: str
    error: str
    kernel: str = "ring"  # of several, which one

    def check(self, product: Product) -> None:
        """The changed kernel is found wrong in every order of threads."""
        assert SOURCE.count(self.old) == 1, f"{self.old!r} is there {SOURCE.count(self.old)} times"
        product.source = SOURCE.replace(self.old, self.new)
        for schedule in emulator.SCHEDULES:
            with pytest.raises(EmulatorError) as caught:
                product.run(schedule)
            assert re.search(self.error, str(caught.value)), f"{schedule}: {caught.value}"


def padded(matrix: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The same, with rows of a multiple of 16 bytes, as the copy engine needs them; NaN fill the gaps."""
    rows, columns = matrix.shape
    wide = np.full((rows, -(-columns // 8) * 8), 0xFFFF, np.uint16)
    wide[:, :columns] = matrix
    return wide[:, :columns]


def chained(dtype: str, left: Bits, right: Bits, start: npt.NDArray[np.float32] | None = None) -> Bits:
    """start + left right^T by mma_m16n8k16, one group of 16 columns after the other; zeros fill up odd shapes."""
    (rows, depth), columns = left.shape, len(right)
    whole = [-(-n // size) * size for n, size in ((rows, 16), (columns, 8), (depth, 16))]
    a, b, c = np.zeros((whole[0], whole[2]), np.uint16), np.zeros((whole[1], whole[2]), np.uint16), np.zeros(whole[:2])
    a[:rows, :depth], b[:columns, :depth] = left, right
    sums = c.astype(np.float32)
    if start is not None:
        sums[:rows, :columns] = start
    shape = (whole[0] // 16, whole[1] // 8)
    tiles = sums.reshape(shape[0], 16, shape[1], 8).swapaxes(1, 2).reshape(-1, 16, 8).view(np.uint32)
    for k in range(0, whole[2], 16):
        a_tiles = np.repeat(a[:, k : k + 16].reshape(-1, 16, 16), shape[1], axis=0)
        b_tiles = np.tile(b[:, k : k + 16].reshape(-1, 8, 16), (shape[0], 1, 1))
        tiles = products(emulated("sm_90a"), dtype, a_tiles, b_tiles, tiles)
    merged = tiles.reshape(*shape, 16, 8).swapaxes(1, 2).reshape(whole[0], whole[1])
    return np.ascontiguousarray(merged[:rows, :columns])


def numbers(dtype: str, shape: tuple[int, int], seed: int) -> npt.NDArray[np.uint16]:
    """Bits of finite numbers of widely varying exponents, some of them zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    if dtype == "bfloat16":
        exponent = rng.integers(87, 150, shape, np.uint16)
        bits = bits & 0x807F | exponent << 7
    else:
        bits = bits & 0x83FF | rng.integers(0, 31, shape, np.uint16) << 10
    return np.where(rng.random(shape) < 0.1, 0, bits).astype(np.uint16)
