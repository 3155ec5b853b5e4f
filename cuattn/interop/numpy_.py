"""NumPy arrays."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn.errors import MissingDependencyError
from cuattn.interop.tensor import CPU, Device, Tensor, contiguous_strides, element_strides

#: Bytes: what a kernel's 16-byte accesses need, raised to the cache line below which JAX copies instead of borrowing.
ALIGNMENT = 64


@lru_cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """A NumPy dtype's name; one of foreign byte order keeps its mark (">f2"), for its plain name would hide it."""
    return dtype.name if dtype.isnative else dtype.str


@lru_cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name; bfloat16 is that of ml_dtypes (MissingDependencyError without the package)."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependencyError("bfloat16 in NumPy and CuPy needs ml_dtypes: pip install ml_dtypes") from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """``numpy.empty`` with the data on a multiple of ALIGNMENT; NumPy itself promises 16 bytes at most."""
    array = np.empty(shape, dtype)
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % ALIGNMENT)


class NumpyFramework:
    """Arrays of dtype bfloat16 are those of ml_dtypes."""

    name = "numpy"

    def wrap(self, array: Any, name: str) -> Tensor:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: got a masked array, whose mask would be ignored, expected a plain NumPy array")
        return Tensor(
            pointer=array.ctypes.data,
            shape=array.shape,
            strides=element_strides(array.strides, array.itemsize, name),
            dtype=dtype_name(array.dtype),
            device=CPU,
            framework=self,
            owner=array,
            readonly=not array.flags.writeable,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device, like: Tensor) -> Tensor:
        array = aligned_empty(shape, numpy_dtype(dtype))
        return Tensor(array.ctypes.data, shape, contiguous_strides(shape), dtype, device, self, array)

    def export(self, tensor: Tensor, like: Tensor) -> Any:
        return tensor.owner

    def written(self, tensor: Tensor) -> None:
        pass

    def to_host(self, tensor: Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = tensor.owner
        return array

    def stream(self, device: Device) -> int:
        return 0
