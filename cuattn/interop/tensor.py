"""What the rest of cuattn knows of an array: where it lies, how it is laid out, and which library it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Device:
    """A place of memory; ``str()`` gives "cpu" or "cuda:<index>"."""

    kind: Literal["cpu", "cuda"]
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Strided memory of any array library.

    pointer: address of element (0, ..., 0), in bytes; may be 0 where the tensor has no element.
    strides: in elements; negative and zero ones are allowed.
    dtype: NumPy's name, or "bfloat16"; a name that is not native to this machine, such as ">f2", stays as it is.
    owner: keeps the memory alive; of a tensor that ``Framework.empty`` made, the native array.
    readonly: whether writing is forbidden, or would not be seen by the caller.
    requires_grad: whether its library would have to record what is written to it, for automatic differentiation.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device
    framework: "Framework"
    owner: Any
    readonly: bool = False
    requires_grad: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element; TypeError for a dtype other than NumPy's and bfloat16."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def address_range(self) -> tuple[int, int]:
        """``(first, end)``: every byte of every element has an address with first <= address < end."""
        if 0 in self.shape:
            return self.pointer, self.pointer
        lowest, highest, itemsize = 0, 1, self.itemsize
        for length, stride in zip(self.shape, self.strides, strict=True):
            if stride < 0:
                lowest += (length - 1) * stride
            else:
                highest += (length - 1) * stride
        return self.pointer + lowest * itemsize, self.pointer + highest * itemsize

    @property
    def nbytes_span(self) -> int:
        """Bytes from the first byte of the lowest element to the end of the highest, gaps included; 0 if empty."""
        first, end = self.address_range
        return end - first


class Framework(Protocol):
    """One array library: how its arrays are read, allocated and handed back."""

    @property
    def name(self) -> str: ...

    def wrap(self, array: Any, name: str) -> Tensor:
        """View ``array``, an array of this library, without a copy; errors name the argument ``name``."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device, like: Tensor) -> Tensor:
        """An uninitialised C-contiguous tensor, its data 16-byte aligned, from the allocator that ``like`` uses."""
        ...

    def export(self, tensor: Tensor, like: Tensor) -> Any:
        """The array to hand to the user, of the type of ``like``, for a ``tensor`` made by ``empty``."""
        ...

    def written(self, tensor: Tensor) -> None:
        """Tell the library that the memory of the caller's array was written to; ``owner`` is that array."""
        ...

    def to_host(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The elements of a tensor of a dtype of NumPy's, for reading; of one on a GPU, after its pending work."""
        ...

    def stream(self, device: Device) -> int:
        """The raw ``cudaStream_t`` on which the caller's work on ``device`` is ordered; 0 on the CPU."""
        ...


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array; as in NumPy and torch, a length of 0 counts as 1."""
    strides: list[int] = []
    stride = 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(1, length)
    return tuple(reversed(strides))


def element_strides(byte_strides: Sequence[int], itemsize: int, name: str) -> tuple[int, ...]:
    """Strides in elements from strides in bytes; ValueError where they are no whole numbers (a field of a record)."""
    if any(stride % itemsize for stride in byte_strides):
        raise ValueError(
            f"{name}: got strides of {tuple(byte_strides)} bytes, expected multiples of the item size {itemsize}"
        )
    return tuple(stride // itemsize for stride in byte_strides)


class _Memory:
    """A tensor in the form in which NumPy borrows foreign memory; NumPy keeps it, and so the owner, alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.pointer, tensor.readonly),
            "typestr": f"=u{tensor.itemsize}",
            "shape": tensor.shape,
            "strides": tuple(stride * tensor.itemsize for stride in tensor.strides),
        }


def host_bits(tensor: Tensor) -> npt.NDArray[Any]:
    """The raw memory of a CPU tensor as unsigned integers of its item size: no copy, the same shape and strides.

    Writable unless the tensor is read-only. The view keeps the memory alive. ValueError for a tensor on a GPU.
    """
    if tensor.device.kind != "cpu":
        raise ValueError(f"tensor: got one on {tensor.device}, expected one on the CPU")
    return np.asarray(_Memory(tensor))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether any byte belongs to elements of both; True too for strides of which that is hard to tell.

    The tensors are on one device; only their addresses are looked at.
    """
    first, second = np.asarray(_Memory(a)), np.asarray(_Memory(b))
    try:
        return np.shares_memory(first, second, max_work=10_000)  # type: ignore[arg-type] # the stubs know 0 and -1 alone
    except np.exceptions.TooHardError:
        return True
