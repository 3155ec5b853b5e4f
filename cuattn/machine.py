"""Facts about this machine that a report needs beside its results."""

import importlib.metadata
import platform

import cuattn
from cuattn.devices import device_architecture, device_count, import_cupy
from cuattn.errors import MissingDependencyError

ABSENT = "not installed"


def versions() -> dict[str, str]:
    """Versions of what decides bits or speed, by name; what is missing reads "not installed" or "none"."""
    return {
        "cuattn": cuattn.__version__,
        "contract": str(cuattn.CONTRACT_VERSION),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in ("numpy", "torch", "ml_dtypes", "rich")},
        **_cuda_versions(),
    }


def devices() -> list[str]:
    """One line for each CUDA device that kernels can run on: name and compilation target."""
    lines = []
    for index in range(device_count()):
        name = import_cupy().cuda.runtime.getDeviceProperties(index)["name"].decode()
        try:
            target = device_architecture(index)
        except NotImplementedError as error:
            target = f"unsupported: {error}"
        lines.append(f"cuda:{index} {name} ({target})")
    return lines


def installed_version(package: str) -> str:
    """Of a distribution; ABSENT for one that is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _cuda_versions() -> dict[str, str]:
    try:
        cupy = import_cupy()
    except MissingDependencyError:
        return {"cupy": ABSENT, "nvrtc": ABSENT, "driver": "unknown without cupy"}
    from cuattn.jit.compiler import nvrtc_version

    try:
        nvrtc = "{}.{}".format(*nvrtc_version())
    except MissingDependencyError:
        nvrtc = ABSENT
    driver = cupy.cuda.runtime.driverGetVersion()
    newest = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    return {"cupy": cupy.__version__, "nvrtc": nvrtc, "driver": newest}
