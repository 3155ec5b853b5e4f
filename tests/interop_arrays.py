"""Arrays that the tests of the conversions share."""

import ml_dtypes
import numpy as np

from cuattn.interop import Tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ("float16", "bfloat16", "float32", "int64", "bool")


def numbers(dtype: str, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    """0, 1, 2, ... in a dtype, bfloat16 by ml_dtypes."""
    return np.arange(np.prod(shape)).reshape(shape).astype(BFLOAT16 if dtype == "bfloat16" else dtype)


def layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.pointer, tensor.shape, tensor.strides, tensor.dtype, tensor.device


class Foreign:
    """An exporter of a library without ``from_dlpack``, which hands its capsules out as NumPy makes them."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device
        self.requests: list[dict[str, object]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: object) -> object:
        self.requests.append(options)
        return self.array.__dlpack__(**options)


class Old(Foreign):
    """An exporter written before the protocol had versions."""

    def __dlpack__(self, *, stream: object = None) -> object:  # type: ignore[override]
        return self.array.__dlpack__()
