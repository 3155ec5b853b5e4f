"""NVRTC through CuPy: a unit in, a cubin and what it uses out. Needs CuPy's package but no GPU and no CUDA headers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuattn.config import KernelConfig, capability
from cuattn.devices import INSTALL_ADVICE, import_cupy
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.jit.listing import listings

#: Part of the numerical contract: no contraction, subnormals kept, IEEE division and square root.
NUMERICS_FLAGS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

_REPORT_FLAG = "--ptxas-options=-v"


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel: registers a thread; bytes of local memory a thread; static shared bytes a block; and
    whether products of warpgroups wait for each other, for want of registers or of an order that ptxas understands."""

    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    serialized: bool = False

    @property
    def spills(self) -> bool:
        """True if anything of a thread lives in local memory."""
        return bool(self.stack_frame or self.spill_stores or self.spill_loads)


def flags(config: KernelConfig) -> tuple[str, ...]:
    """NVRTC options of a configuration, all but the include folder: what of them decides the cubin."""
    return ("--std=c++17", f"-arch={config.arch}", *NUMERICS_FLAGS, _REPORT_FLAG)


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use. Raises MissingDependencyError without CuPy or NVRTC."""
    return _nvrtc_and_version()[1]


def known_architectures() -> frozenset[int]:
    """The compute capabilities, such as 90, that the NVRTC in use compiles for."""
    return frozenset(_nvrtc_and_version()[0].getSupportedArchs())


def compile_cubin(config: KernelConfig, source: str, folder: Path) -> tuple[bytes, Resources]:
    """The cubin of a unit whose angle includes lie in ``folder``.

    Raises CompileError with the configuration, flags, log and numbered source, and MissingDependencyError where NVRTC
    is missing or too old for the architecture.
    """
    nvrtc, (major, minor) = _nvrtc_and_version()
    if capability(config.arch) not in known_architectures():
        package = "nvidia-cuda-nvrtc" if major > 12 else f"nvidia-cuda-nvrtc-cu{major}"
        raise MissingDependencyError(
            f"NVRTC {major}.{minor} cannot compile for {config.arch}: pip install --upgrade {package}"
        )
    # From 12.9 on NVRTC has a cache of its own, which returns cubins without the report of ptxas.
    own_cache = ("--no-cache",) if (major, minor) >= (12, 9) else ()
    options = (*flags(config), *own_cache, f"--include-path={folder}")
    program = nvrtc.createProgram(source, f"{config.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy takes the last byte for a string's end
        return cubin, parse_resources(nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise CompileError(
            f"{config.name}: NVRTC {major}.{minor}: {error}\n"
            f"configuration: {config}\nflags: {' '.join(options)}\nlog:\n{log}\n"
            + listings(f"{config.name}.cu", source, log)
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def parse_resources(log: str) -> Resources:
    """Resources from a log of ptxas -v; with several functions in it, the largest of each."""

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    if "registers" not in log:
        raise ValueError(f"log: got no report of ptxas, expected one with {_REPORT_FLAG}:\n{log}")
    return Resources(
        registers=largest(r"Used (\d+) registers"),
        stack_frame=largest(r"(\d+) bytes stack frame"),
        spill_stores=largest(r"(\d+) bytes spill stores"),
        spill_loads=largest(r"(\d+) bytes spill loads"),
        static_shared=largest(r"(\d+) bytes smem"),
        serialized="wgmma.mma_async instructions are serialized" in log,
    )


def check_driver() -> None:
    """Raises MissingDependencyError if there is a driver and it is too old to load what this NVRTC makes."""
    nvrtc_major, _ = nvrtc_version()
    driver = import_cupy().cuda.runtime.driverGetVersion()  # 0 without a driver
    if driver and nvrtc_major > driver // 1000:
        raise MissingDependencyError(
            f"NVRTC {nvrtc_major} makes kernels that this driver (CUDA {driver // 1000}.{driver % 1000 // 10}) cannot "
            f"load: update the driver, or remove the packages of CUDA {nvrtc_major} and "
            f"pip install 'cuattn[cuda{driver // 1000}]'"
        )


def _nvrtc_and_version() -> tuple[Any, tuple[int, int]]:
    """CuPy's NVRTC module and its version; asking for the version is what loads the library."""
    import_cupy()
    from cupy.cuda import nvrtc

    try:
        return nvrtc, nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MissingDependencyError(
            f"CUDA kernels need NVRTC, which does not load ({reason}): {INSTALL_ADVICE}"
        ) from error
