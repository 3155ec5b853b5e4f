"""CuPy arrays."""

from typing import Any

import numpy.typing as npt

from cuattn.devices import import_cupy
from cuattn.interop.numpy_ import dtype_name, numpy_dtype
from cuattn.interop.tensor import Device, Tensor, contiguous_strides, element_strides


class CupyFramework:
    """Arrays of dtype bfloat16 are those of ml_dtypes."""

    name = "cupy"

    def wrap(self, array: Any, name: str) -> Tensor:
        """Reads the array's fields, which is far quicker than building a DLPack capsule."""
        return Tensor(
            pointer=array.data.ptr,
            shape=array.shape,
            strides=element_strides(array.strides, array.itemsize, name),
            dtype=dtype_name(array.dtype),
            device=Device("cuda", array.data.device_id),
            framework=self,
            owner=array,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device, like: Tensor) -> Tensor:
        cupy = import_cupy()
        with cupy.cuda.Device(device.index):
            array = cupy.empty(shape, numpy_dtype(dtype))
        return Tensor(array.data.ptr, shape, contiguous_strides(shape), dtype, device, self, array)

    def export(self, tensor: Tensor, like: Tensor) -> Any:
        return tensor.owner

    def written(self, tensor: Tensor) -> None:
        pass

    def to_host(self, tensor: Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = tensor.owner.get()
        return array

    def stream(self, device: Device) -> int:
        return int(import_cupy().cuda.get_current_stream(device.index).ptr)
