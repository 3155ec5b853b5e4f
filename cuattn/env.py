"""The environment variables of cuattn: all of them, read at the time of use. An empty one counts as not set."""

import os
from pathlib import Path

#: "auto" (default), "cuda", "reference", "emulator" or "emulator:sm_90a": what `cuattn.use_backend` sets for a block.
BACKEND = "CUATTN_BACKEND"
#: Another folder of kernel sources in place of the packaged ``kernels_cu/``.
KERNEL_DIR = "CUATTN_KERNEL_DIR"
#: The folder of compiled kernels; default ``$XDG_CACHE_HOME/cuattn`` or ``~/.cache/cuattn``.
CACHE_DIR = "CUATTN_CACHE_DIR"
#: The command of the C++17 compiler that builds the emulator, default ``c++``; may have options: ``ccache g++``.
COMPILER = "CXX"
#: "1": lengths and pages that lie on a GPU are read and checked before a launch, which waits for the GPU. Default "0".
CHECK = "CUATTN_CHECK"
#: The compilation target of kernels, of the device's compute capability, in place of the device's own: "sm_90" on a
#: Hopper GPU chooses the kernels that newer GPUs have, too, with the same bits.
ARCH = "CUATTN_ARCH"

VARIABLES = (BACKEND, KERNEL_DIR, CACHE_DIR, COMPILER, CHECK, ARCH)


_BACKEND, _CHECK, _ARCH = map(os.fsencode, (BACKEND, CHECK, ARCH))


def unparsed() -> tuple[bytes | None, ...]:
    """What the environment says of each call (BACKEND, CHECK, ARCH), for comparison alone: so it takes 0.1 us.

    `os.environ` itself takes 0.5 us a variable to encode names and decode values.
    """
    values: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined] # which all its methods go by
    return values.get(_BACKEND), values.get(_CHECK), values.get(_ARCH)


def backend() -> str:
    return os.environ.get(BACKEND) or "auto"


def kernel_dir() -> Path:
    """The folder of kernel sources: the variable, else the wheel's copy, else the source checkout's.

    Raises ValueError if the variable names a folder without any.
    """
    if named := os.environ.get(KERNEL_DIR):
        folder = Path(named).expanduser().resolve()
        if not any(folder.glob("*.cuh")):
            raise ValueError(f"{KERNEL_DIR}: got {named!r}, expected a folder of kernel sources (*.cuh)")
        return folder
    packaged = Path(__file__).parent / "kernels_cu"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "kernels_cu"


def cache_dir() -> Path:
    if named := os.environ.get(CACHE_DIR):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cuattn"


def compiler() -> str:
    return os.environ.get(COMPILER) or "c++"


def check() -> bool:
    """Whether the numbers in arrays on a GPU are checked. Raises ValueError for another value than "0" or "1"."""
    value = os.environ.get(CHECK) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{CHECK}: got {value!r}, expected '0' or '1'")
    return value == "1"


def arch() -> str | None:
    """A target by name, which `cuattn.devices` checks; None for the device's own."""
    return os.environ.get(ARCH) or None
