"""From a KernelConfig to a shared library of the emulated kernel, through the host's C++ compiler and the kernel cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from cuattn import env
from cuattn.config import KernelConfig
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.jit.cache import ArtifactCache
from cuattn.jit.includes import source_digest
from cuattn.jit.unit import kernel_source

INCLUDE = Path(__file__).parent / "include"
#: No contraction and no fast-math: the host's IEEE operations are the device's.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas")


def load(config: KernelConfig) -> ctypes.CDLL:
    """The emulated kernel's library, built if its sources, the compiler or this machine's processor are new."""
    return _load(library_path(config))


def library_path(config: KernelConfig) -> Path:
    """Raises MissingDependencyError without a C++ compiler, CompileError with the compiler's messages."""
    compiler = _compiler()
    folders = [INCLUDE, env.kernel_dir()]
    source = emulated_source(config)
    facts = {
        "source": source_digest(source, folders),
        "flags": " ".join(FLAGS),
        "compiler": _version(tuple(compiler)),
        "processor": _processor(),
    }

    def build() -> bytes:
        with tempfile.TemporaryDirectory(prefix="cuattn-") as folder:
            unit, library = Path(folder, "unit.cpp"), Path(folder, "unit.so")
            unit.write_text(source)
            command = [*compiler, *FLAGS, *(f"-I{f}" for f in folders), str(unit), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(f"{config}\n{shlex.join(command)}\n{done.stderr}\n{source}")
            return library.read_bytes()

    cache = ArtifactCache(env.cache_dir())
    return cache.get(repr(facts), f"{config.name}_emulated", "so", build, {"config": vars(config), **facts})


def emulated_source(config: KernelConfig) -> str:
    """The kernel's unit between the stand-ins for the CUDA built-ins and the entry point."""
    return (
        f"#include <cuda_builtins.h>\n{kernel_source(config)}#include <emulator/launch.h>\n"
        'extern "C" int emulate(const emulator::Launch* launch) {\n'
        "    const auto& params = *static_cast<const cuattn::ForwardParams*>(launch->params);\n"
        f"    return emulator::run(*launch, [&] {{ cuattn::{config.kernel}(params); }});\n"
        "}\n"
    )


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise MissingDependencyError(
            f"the emulator needs a C++17 compiler and {command[0] if command else 'c++'} is not on the PATH: "
            "apt-get install g++, or set CXX"
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
