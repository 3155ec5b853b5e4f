"""From a kernel's source to a shared library that emulates it, through the host's C++ compiler and the kernel cache."""

import ctypes
import functools
import hashlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cuattn import env
from cuattn.config import KernelConfig
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.jit.cache import ArtifactCache
from cuattn.jit.includes import source_digest
from cuattn.jit.listing import listings
from cuattn.jit.unit import kernel_source

INCLUDE = Path(__file__).parent / "include"
#: No contraction and no fast-math: the host's IEEE operations are the device's.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas")


def load(config: KernelConfig) -> ctypes.CDLL:
    """The emulated kernel's library, built if its sources, the compiler or this machine's processor are new."""
    return load_kernel(config.name, kernel_source(config), config.kernel, config.params, vars(config))


def load_kernel(
    name: str, source: str, kernel: str, params: str, config: Mapping[str, object] | None = None
) -> ctypes.CDLL:
    """The library that emulates ``cuattn::<kernel>(cuattn::<params>)``, a kernel of the CUDA C++ text ``source``.

    ``name`` and ``config`` describe it in the cache. Raises MissingDependencyError without a C++ compiler, and
    CompileError with ``config``, the flags, the compiler's messages and the numbered source.
    """
    compiler = _compiler()
    folders = [INCLUDE, env.kernel_dir()]
    unit = emulated_source(source, kernel, params)
    facts = {
        "source": source_digest(unit, folders),
        "flags": " ".join(FLAGS),
        "compiler": _version(tuple(compiler)),
        "processor": _processor(),
    }

    def build() -> bytes:
        with tempfile.TemporaryDirectory(prefix="cuattn-") as folder:
            file, library = Path(folder, f"{name}.cpp"), Path(folder, f"{name}.so")
            file.write_text(unit, encoding="utf-8")
            command = [*compiler, *FLAGS, *(f"-I{f}" for f in folders), str(file), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(
                    f"{name}: {compiler[0]} failed with exit code {done.returncode}\n"
                    f"configuration: {config}\nflags: {shlex.join(command[len(compiler) :])}\nlog:\n{done.stderr}\n"
                    + listings(str(file), unit, done.stderr)
                )
            return library.read_bytes()

    cache = ArtifactCache(env.cache_dir())
    return _load(cache.get(repr(facts), f"{name}_emulated", "so", build, {"config": config, **facts}))


def emulated_source(source: str, kernel: str, params: str) -> str:
    """A unit of CUDA C++ between the stand-ins for the CUDA built-ins and the entry point."""
    return (
        f"#include <cuda_builtins.h>\n{source}#include <emulator/launch.h>\n"
        'extern "C" int emulate(const emulator::Launch* launch) {\n'
        f"    const auto& params = *static_cast<const cuattn::{params}*>(launch->params);\n"
        f"    return emulator::run(*launch, [&] {{ cuattn::{kernel}(params); }});\n"
        "}\n"
    )


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    command = shlex.split(env.compiler())
    if not command or shutil.which(command[0]) is None:
        raise MissingDependencyError(
            f"the emulator needs a C++17 compiler and {command[0] if command else 'c++'} is not on the PATH: "
            f"apt-get install g++, or set {env.COMPILER}"
        )
    return command


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.machine() + hashlib.sha256(flags.encode()).hexdigest()
