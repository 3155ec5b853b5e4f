"""Which array library and device a check runs on."""

from collections.abc import Iterator

from cuattn.devices import device_count
from cuattn.testing import CupyLibrary, Library, NumpyLibrary, TorchLibrary
from cuattn.testing.arrays import installed

NAMES = ("numpy", "torch", "cupy")


def choose(backend: str, name: str | None = None) -> Library:
    """The best library for a backend ("auto" takes a GPU if there is one); ``name`` insists on one of NAMES.

    Raises ValueError if none fits.
    """
    if backend == "cuda" and not device_count():
        raise ValueError("--backend: got cuda, expected it where CuPy can use a CUDA device; here it finds none")
    wanted = {"auto": ("cpu", "cuda"), "cuda": ("cuda",)}.get(backend, ("cpu",))
    for library in _usable(name):
        if library.device.partition(":")[0] in wanted:
            return library
    raise ValueError(f"--library: got {name}, expected one with {' or '.join(wanted)} arrays at hand, for {backend}")


def _usable(name: str | None) -> Iterator[Library]:
    """Installed libraries, of that name if one is given: on a GPU first, then those that hold bfloat16."""
    has_torch = name in (None, "torch") and installed("torch")
    if device_count():
        if has_torch and _torch_has_gpu():
            yield TorchLibrary(device="cuda:0")
        if name in (None, "cupy"):
            yield CupyLibrary()
    on_cpu: list[Library] = [NumpyLibrary()] if name in (None, "numpy") else []
    if has_torch:
        on_cpu.append(TorchLibrary())
    yield from sorted(on_cpu, key=lambda library: -len(library.dtypes()))


def _torch_has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
