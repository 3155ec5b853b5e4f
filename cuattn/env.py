"""The environment variables of cuattn: all of them, read at the time of use."""

import os
from pathlib import Path

#: "auto" (default), "cuda", "reference", "emulator" or "emulator:sm_90a": what `cuattn.use_backend` sets for a block.
BACKEND = "CUATTN_BACKEND"
#: Another folder of kernel sources in place of the packaged ``kernels_cu/``.
KERNEL_DIR = "CUATTN_KERNEL_DIR"
#: The folder of compiled kernels; default ``$XDG_CACHE_HOME/cuattn`` or ``~/.cache/cuattn``.
CACHE_DIR = "CUATTN_CACHE_DIR"

VARIABLES = (BACKEND, KERNEL_DIR, CACHE_DIR)


def backend() -> str:
    return os.environ.get(BACKEND, "auto")


def kernel_dir() -> Path:
    """The folder of kernel sources: the variable, else the wheel's copy, else the source checkout's."""
    if KERNEL_DIR in os.environ:
        return Path(os.environ[KERNEL_DIR]).expanduser().resolve()
    packaged = Path(__file__).parent / "kernels_cu"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "kernels_cu"


def cache_dir() -> Path:
    if CACHE_DIR in os.environ:
        return Path(os.environ[CACHE_DIR]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cuattn"
