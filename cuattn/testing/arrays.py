"""Arrays of any library as raw bits on the host and back: what the checks compare and what they feed to an operation.

On the host a value is its bit pattern, an unsigned integer beside a dtype name; so bfloat16 needs no package at all,
and only a library that has to hold such an array must know the type.
"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from cuattn.interop.numpy_ import numpy_dtype

Bits = NDArray[Any]  # unsigned integers of the element's size

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_QUIET_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}


def raw_bits(array: Any) -> tuple[Bits, str]:
    """Raw bits of an array (NumPy, torch, CuPy, or whatever ``numpy.asarray`` takes), on the host, and its dtype name.

    The bits may be the array's own memory. Raises TypeError for elements that are not 1, 2, 4 or 8 bytes long.
    """
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, torch.Tensor):
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(array.element_size())
        if integer is not None:
            host = array.detach().cpu().contiguous().view(integer).numpy()
            return host.view(_UNSIGNED[host.itemsize]), str(array.dtype).removeprefix("torch.")
    elif cupy is not None and isinstance(array, cupy.ndarray):
        if array.itemsize in _UNSIGNED:
            words = array.view(_UNSIGNED[array.itemsize])  # first: CuPy has no kernel that copies bfloat16
            return cupy.asnumpy(cupy.ascontiguousarray(words)), array.dtype.name
    else:
        array = np.asarray(array)
        if array.itemsize in _UNSIGNED:
            # ascontiguousarray alone would turn a scalar into one dimension
            return np.ascontiguousarray(array).reshape(array.shape).view(_UNSIGNED[array.itemsize]), array.dtype.name
    raise TypeError(f"array: got dtype {array.dtype}, expected elements of 1, 2, 4 or 8 bytes")


def round_to_bits(values: NDArray[np.float32], dtype: str) -> Bits:
    """fp32 values rounded to nearest even, as bits of "float16", "bfloat16" or "float32". NaN becomes the quiet NaN."""
    if dtype == "bfloat16":
        wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((wide + (((wide >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):
            rounded = np.ascontiguousarray(values, dtype).view(_UNSIGNED[np.dtype(dtype).itemsize])
    return np.where(np.isnan(values), rounded.dtype.type(_QUIET_NAN[dtype]), rounded)


def values_of(bits: Bits, dtype: str) -> NDArray[Any]:
    """What the bits stand for: fp32 for bfloat16, a view in its own type for all else."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype)


def poison(shape: tuple[int, ...], itemsize: int) -> Bits:
    """Bits that are NaN in every floating-point type, with a payload no arithmetic produces: all ones."""
    return np.full(shape, -1, f"i{itemsize}").view(_UNSIGNED[itemsize])


class Library(Protocol):
    """An array library on one device."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0"."""

    def dtypes(self) -> tuple[str, ...]:
        """Those of float16, bfloat16 and float32 that its arrays can hold here."""

    def array(self, bits: Bits, dtype: str) -> Any:
        """A new C-contiguous array of these bits."""


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _dtypes_of_numpy() -> tuple[str, ...]:
    return ("float16", "bfloat16", "float32") if installed("ml_dtypes") else ("float16", "float32")


@dataclass(frozen=True)
class NumpyLibrary:
    name: str = "numpy"
    device: str = "cpu"

    def dtypes(self) -> tuple[str, ...]:
        return _dtypes_of_numpy()

    def array(self, bits: Bits, dtype: str) -> Any:
        return np.array(bits, order="C").view(numpy_dtype(dtype))


@dataclass(frozen=True)
class TorchLibrary:
    name: str = "torch"
    device: str = "cpu"

    def dtypes(self) -> tuple[str, ...]:
        return ("float16", "bfloat16", "float32")

    def array(self, bits: Bits, dtype: str) -> Any:
        import torch

        signed = np.array(bits, order="C").view(f"i{bits.itemsize}")
        return torch.from_numpy(signed).to(self.device).view(getattr(torch, dtype))


@dataclass(frozen=True)
class CupyLibrary:
    name: str = "cupy"
    device: str = "cuda:0"

    def dtypes(self) -> tuple[str, ...]:
        return _dtypes_of_numpy()

    def array(self, bits: Bits, dtype: str) -> Any:
        import cupy

        with cupy.cuda.Device(int(self.device.rpartition(":")[2])):
            return cupy.array(bits, order="C").view(numpy_dtype(dtype))


def library_of(array: Any) -> Library:
    """The library and device of an array. Raises TypeError if it is none of NumPy, torch and CuPy."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if isinstance(array, np.ndarray):
        return NumpyLibrary()
    if torch is not None and isinstance(array, torch.Tensor):
        return TorchLibrary(device=str(array.device))
    if cupy is not None and isinstance(array, cupy.ndarray):
        return CupyLibrary(device=f"cuda:{array.device.id}")
    raise TypeError(f"array: got {type(array).__name__}, expected an array of NumPy, torch or CuPy")


def int32_array(library: Library, numbers: npt.ArrayLike) -> Any:
    """A new array of the library that holds int32 numbers, such as lengths."""
    return library.array(np.array(numbers, np.int32).view(np.uint32), "int32")


def bool_array(library: Library, values: NDArray[np.bool_]) -> Any:
    """A new array of the library that holds a mask."""
    return library.array(values.view(np.uint8), "bool")


def is_contiguous(array: Any) -> bool:
    flags = getattr(array, "flags", None)
    return bool(array.is_contiguous() if flags is None else flags.c_contiguous)


def poisoned_empty_like(array: Any) -> Any:
    """An array of the same library, device, dtype and shape, C-contiguous, full of NaN: what is left unwritten shows.

    Raises TypeError if the array is of none of NumPy, torch and CuPy.
    """
    library = library_of(array)  # first: it names the argument
    dtype = str(array.dtype).removeprefix("torch.")
    return library.array(poison(tuple(array.shape), array.itemsize), dtype)
