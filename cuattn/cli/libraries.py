"""Which array library and device a check runs on."""

from collections.abc import Callable, Iterator

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


def on_device(name: str | None, device: str | None) -> Library:
    """A library for an operation that is not cuattn's: one of NAMES (default: what is installed of torch and NumPy), on
    "cpu", "cuda" or "cuda:1" (default: a GPU if the library finds one).

    Raises ValueError if there is none.
    """
    name = name or ("torch" if installed("torch") else "numpy")
    kind, colon, index = (device or "").partition(":")
    if kind not in ("", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device: got {device}, expected cpu, cuda or cuda:INDEX")
    if not installed(name):
        raise ValueError(f"--library: got {name}, which is not installed")
    found = _torch_has_gpu() if name == "torch" else name == "cupy" and device_count() > 0
    if kind == "cuda" and not found:
        raise ValueError(f"--device: got {device}, where {name} finds no GPU")
    if name == "cupy" and (kind == "cpu" or not found):
        raise ValueError(f"--library: got cupy for {device or 'cpu'}, expected it with a GPU")
    place = f"cuda:{index or 0}" if found and kind != "cpu" else "cpu"
    makers: dict[str, Callable[..., Library]] = {"numpy": NumpyLibrary, "torch": TorchLibrary, "cupy": CupyLibrary}
    return makers[name](device=place)


def _torch_has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
