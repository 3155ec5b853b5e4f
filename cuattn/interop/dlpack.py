"""Arrays of every other library that implements DLPack, such as JAX's."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy.typing as npt

from cuattn.devices import import_cupy
from cuattn.interop import capsule
from cuattn.interop.cupy_ import CupyFramework
from cuattn.interop.numpy_ import NumpyFramework, numpy_dtype
from cuattn.interop.tensor import CPU, Device, Framework, Tensor, host_bits

#: cudaStreamLegacy: DLPack has no way to ask for a library's current stream, so work is ordered on this one.
LEGACY_STREAM = 1

_STORES: dict[str, Framework] = {"cpu": NumpyFramework(), "cuda": CupyFramework()}


class _Borrowed(NamedTuple):
    """Dropping the unused capsule calls the exporter's deleter, once; the array tells which library to answer in."""

    array: Any
    capsule: Any


class _LegacyStream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, LEGACY_STREAM)


@contextmanager
def _on_legacy_stream(device: Device) -> Iterator[Any]:
    """The stream, current in CuPy inside the block."""
    cupy = import_cupy()
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_LegacyStream()) as stream:
        yield stream


class Exporter:
    """A result on its way to another library: the DLPack protocol around the NumPy or CuPy array that holds it.

    NumPy and CuPy do not export bfloat16, so such a tensor is stored as uint16 and its capsules are relabelled.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._tensor.owner.__dlpack_device__()
        return (int(kind), index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, versioned if ``max_version`` allows; BufferError for a request to copy or to change the device.

        On a GPU the consumer's ``stream`` waits, by an event, for the work that fills the tensor.
        """
        elsewhere = dl_device is not None and (int(dl_device[0]), dl_device[1]) != self.__dlpack_device__()
        if copy or elsewhere:
            raise BufferError(f"got copy={copy} and dl_device={dl_device}, expected a request for the memory as it is")
        versioned = max_version is not None and max_version >= capsule.MAX_VERSION
        if self._tensor.device == CPU:
            exported = capsule.request(self._tensor.owner, None, versioned)
        else:
            # CuPy lets the consumer's stream wait for the stream that is current here.
            with _on_legacy_stream(self._tensor.device):
                exported = capsule.request(self._tensor.owner, stream, versioned)
        if self._tensor.dtype == "bfloat16":
            capsule.relabel_bfloat16(exported)
        return exported


class DlpackFramework:
    """Reads through ``__dlpack__``; answers through ``from_dlpack`` of the caller's array namespace.

    A type without ``__array_namespace__().from_dlpack`` gets NumPy arrays, or CuPy arrays on a GPU.
    """

    name = "dlpack"

    def wrap(self, array: Any, name: str) -> Tensor:
        """The exporter orders its pending work on a GPU before our stream."""
        try:
            kind = int(array.__dlpack_device__()[0])
            if kind not in capsule.CPU_KINDS + capsule.CUDA_KINDS:
                raise BufferError(f"memory of DLPack device type {kind}, expected CPU or CUDA memory")
            handle = capsule.request(array, LEGACY_STREAM if kind in capsule.CUDA_KINDS else None)
            content = capsule.read(handle)
        except Exception as error:  # each library has its own exceptions for what it cannot export
            raise TypeError(
                f"{name}: got {type(array).__name__} that cannot be used through DLPack: {error}"
            ) from error
        return Tensor(
            pointer=content.pointer,
            shape=content.shape,
            strides=content.strides,
            dtype=content.dtype,
            device=Device("cuda", content.device[1]) if content.device[0] in capsule.CUDA_KINDS else CPU,
            framework=self,
            owner=_Borrowed(array, handle),
            readonly=content.readonly,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device, like: Tensor) -> Tensor:
        """``owner`` is a NumPy or CuPy array; one of uint16 for bfloat16."""
        stored = "uint16" if dtype == "bfloat16" else dtype
        if device == CPU:
            tensor = _STORES["cpu"].empty(shape, stored, device, like)
        else:
            # CuPy's memory pool reuses freed memory in the order of the stream on which it was allocated.
            with _on_legacy_stream(device):
                tensor = _STORES["cuda"].empty(shape, stored, device, like)
        return dataclasses.replace(tensor, dtype=dtype, framework=self)

    def export(self, tensor: Tensor, like: Tensor) -> Any:
        """Waits for the GPU first.

        The inputs go back to their library when the call ends. DLPack cannot tell it that kernels on our stream still
        read them, so it might put something else into the memory of an array that the caller has dropped.
        """
        if tensor.device != CPU:
            with _on_legacy_stream(tensor.device) as stream:
                stream.synchronize()
        namespace = getattr(like.owner.array, "__array_namespace__", None)
        from_dlpack = getattr(namespace(), "from_dlpack", None) if namespace else None
        return from_dlpack(Exporter(tensor)) if from_dlpack else tensor.owner.view(numpy_dtype(tensor.dtype))

    def written(self, tensor: Tensor) -> None:
        pass

    def to_host(self, tensor: Tensor) -> npt.NDArray[Any]:
        if tensor.device == CPU:
            return host_bits(tensor).view(tensor.dtype)
        with _on_legacy_stream(tensor.device):
            array: npt.NDArray[Any] = import_cupy().from_dlpack(tensor.owner.array).get()
        return array

    def stream(self, device: Device) -> int:
        return 0 if device == CPU else LEGACY_STREAM
