"""Which implementation runs: CUDA kernels, the emulator, or the CPU reference."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cuattn import config, env
from cuattn.interop import Device

NAMES = ("auto", "cuda", "reference", "emulator")
DEFAULT_EMULATED_ARCH = "sm_80"


@dataclass(frozen=True)
class Backend:
    """name: one of NAMES; arch: the architecture that the emulator takes the part of, None for the others."""

    name: str
    arch: str | None = None

    def for_device(self, device: Device, name: str = "q") -> "Backend":
        """The backend that runs tensors on ``device``; "auto" is CUDA kernels on a GPU, the reference on a CPU.

        ``name`` is the argument that errors name.
        """
        if self.name == "auto":
            return Backend("cuda" if device.kind == "cuda" else "reference")
        wanted = "cuda" if self.name == "cuda" else "cpu"
        if device.kind != wanted:
            raise ValueError(f"{name}: got device {device}, expected a {wanted} device for the backend {self.name!r}")
        return self


def _parse(name: str, arch: str | None, source: str, arch_source: str) -> Backend:
    """``source`` and ``arch_source`` are what errors name."""
    if name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    if name != "emulator":
        if arch is not None:
            raise ValueError(f"{arch_source}: got {arch!r}, expected None for the backend {name!r}")
        return Backend(name)
    arch = arch or DEFAULT_EMULATED_ARCH
    if arch not in config.ARCHITECTURES:
        raise ValueError(f"{arch_source}: got {arch!r}, expected one of {', '.join(config.ARCHITECTURES)}")
    return Backend(name, arch)


_chosen: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("cuattn_backend", default=None)

#: What `use_backend` set for the running block, or None.
chosen: Callable[[], Backend | None] = _chosen.get


def active() -> Backend:
    """What `use_backend` set for the running block, else the environment variable CUATTN_BACKEND, else "auto".

    Raises ValueError for a wrong variable.
    """
    backend = chosen()
    if backend is not None:
        return backend
    name, _, arch = env.backend().partition(":")
    return _parse(name, arch or None, env.BACKEND, env.BACKEND)


@contextlib.contextmanager
def use_backend(name: str, arch: str | None = None) -> Iterator[None]:
    """Context manager that chooses the implementation for the calls inside it (in this thread or task).

    name: "auto" (CUDA kernels for GPU tensors, the reference for CPU tensors), "cuda", "reference" (readable NumPy code
        in the canonical order, CPU tensors) or "emulator" (the CUDA sources run on the CPU, CPU tensors; needs a C++
        compiler).
    arch: for the emulator alone: the GPU architecture it takes the part of, "sm_80" by default, for example "sm_90a",
        whose results equal an H200's bit for bit.

    The environment variable CUATTN_BACKEND does the same for a whole process: ``emulator:sm_90a``. Each backend is
    batch-invariant; bits differ between backends. Raises ValueError for an unknown name or architecture.
    """
    token = _chosen.set(_parse(name, arch, "name", "arch"))
    try:
        yield
    finally:
        _chosen.reset(token)
