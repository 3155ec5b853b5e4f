"""What all kernels' configurations have in common: the architectures, the choices and the base class."""

from abc import ABC, abstractmethod
from typing import ClassVar

MASKS = ("full", "causal")
DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = tuple(range(8, 257, 8))
#: NVRTC targets, with the shared memory in bytes that one block may use there (CUDA C++ Programming Guide, table of
#: technical specifications per compute capability).
ARCHITECTURES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_103a": 227 * 1024,
    "sm_110a": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
}
#: Hopper: without what it alone has, and with it. The former runs only where CUATTN_ARCH asks for it, for comparisons.
HOPPER = ("sm_90", "sm_90a")
#: The target of each compute capability.
OWN_ARCHITECTURES = tuple(arch for arch in ARCHITECTURES if arch != "sm_90")


def capability(arch: str) -> int:
    """The compute capability of a target: 90 for "sm_90a"."""
    return int(arch.removeprefix("sm_").rstrip("a"))


def architecture_of(compute_capability: str) -> str:
    """Target for a compute capability such as "80": the entry of OWN_ARCHITECTURES with that number.

    Raises NotImplementedError for a capability without an entry.
    """
    for arch in OWN_ARCHITECTURES:
        if capability(arch) == int(compute_capability):
            return arch
    raise NotImplementedError(
        f"device: got compute capability {compute_capability}, expected one of {', '.join(OWN_ARCHITECTURES)}"
    )


Constants = dict[str, int | bool]


class KernelConfig(ABC):
    """One specialisation of a kernel for one architecture.

    kernel: its name, which is that of its file in kernels_cu/; params: the name of its argument's struct.
    overlaps: whether it waits itself for the launches before it, and so may start before they have ended.
    """

    kernel: ClassVar[str]
    params: ClassVar[str]
    arch: str
    overlaps = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def threads(self) -> int: ...

    @property
    @abstractmethod
    def shared_bytes(self) -> int: ...

    @property
    @abstractmethod
    def constants(self) -> Constants:
        """What the kernel finds in its namespace ``config``."""


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def tile_columns(head_dim: int) -> int:
    """Columns of a tile in shared memory: head_dim and zeros behind it."""
    return -(-head_dim // 64) * 64


def dims_name(head_dim: int, value_dim: int) -> str:
    """The part of a kernel's name for its head dims, such as "d64" or "d192_128"."""
    return f"d{head_dim}" + (f"_{value_dim}" if value_dim != head_dim else "")


def place_bytes(tiles: int, key_tile: int) -> int:
    """Shared memory for the places of the keys and values of some tiles."""
    return -(-tiles * key_tile * 8 // 1024) * 1024
