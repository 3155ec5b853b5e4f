"""From a KernelConfig to the cubin on disk."""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cuattn import config as configs
from cuattn import contract, env
from cuattn.config import KernelConfig
from cuattn.devices import device_architecture, device_count
from cuattn.jit import compiler
from cuattn.jit.cache import ArtifactCache
from cuattn.jit.includes import source_digest
from cuattn.jit.unit import kernel_source

_T = TypeVar("_T", int, str)


class Precompiled(NamedTuple):
    """A kernel that is ready on disk; seconds of wall time, and whether it was there already."""

    config: KernelConfig
    path: Path
    seconds: float
    from_cache: bool


def cubin_path(config: KernelConfig) -> Path:
    """The compiled kernel, from the cache or compiled now; needs no GPU.

    Kernel sources are read at every call, so an edit is noticed by the next call and by every new process. A process
    that has loaded a kernel to a device keeps that one (cuattn/launch.py).

    Raises CompileError and MissingDependencyError.
    """
    return _cubin(config)[0]


def resources(config: KernelConfig) -> compiler.Resources:
    """What the compiled kernel uses, compiling it if need be."""
    path = cubin_path(config)
    return compiler.Resources(**_cache().read_metadata(path)["resources"])


def precompile(
    head_dims: Iterable[int] | None = None,
    masks: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    archs: Iterable[str] | None = None,
    *,
    value_dims: Iterable[int] | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int, Precompiled], None] | None = None,
) -> list[Precompiled]:
    """Compiles kernels ahead of time; no GPU is needed.

    Each argument selects values such as ``[64]``, ``["causal"]``, ``["bfloat16"]``, ``["sm_90a"]``; None means all, for
    ``archs`` those of the devices present, or without a device that of each compute capability which the installed
    NVRTC knows. Every function of cuattn then finds its kernels for these: prefill and decode, packed or not, caches,
    pages, padding masks, partial results, gradients. ``value_dims`` are head dims of values, each with each of
    ``head_dims``, such as ``[128]`` for ``[192]``; None means that values have the head dim of queries and keys.
    ``jobs`` kernels are compiled at a time (None: one a core). ``progress(done, total, kernel)`` is called in this
    thread as each is ready.

    Returns the kernels in a fixed order, each once. Raises ValueError for a value that is not supported, CompileError
    and MissingDependencyError.
    """
    choices = (
        _checked("archs", _default_architectures() if archs is None else archs, configs.ARCHITECTURES),
        _checked("head_dims", head_dims, configs.HEAD_DIMS),
        _checked("masks", masks, configs.MASKS),
        _checked("dtypes", dtypes, configs.DTYPES),
        [None] if value_dims is None else _checked("value_dims", value_dims, configs.HEAD_DIMS),
    )
    chosen = list(dict.fromkeys(_configs(*choices)))
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected None or a number of at least 1")
    # Threads are enough: CuPy lets go of the interpreter lock while NVRTC works.
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = [pool.submit(_precompile_one, config) for config in chosen]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                kernel = future.result()
                if progress:
                    progress(done, len(futures), kernel)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _configs(
    archs: list[str], head_dims: list[int], masks: list[str], dtypes: list[str], value_dims: Iterable[int | None]
) -> Iterator[KernelConfig]:
    for arch in archs:
        for head_dim, value_dim, mask, dtype in product(head_dims, value_dims, masks, dtypes):
            yield from configs.attention_configs(head_dim, mask, dtype, arch, value_dim)
            yield from configs.backward_configs(head_dim, mask, dtype, arch, value_dim)
        yield from configs.helper_configs(arch)


def _checked(argument: str, values: Any, supported: Collection[_T]) -> list[_T]:
    """The values without repeats, all the supported ones for None."""
    choices = ", ".join(map(str, supported))
    if isinstance(values, str) or not (values is None or isinstance(values, Iterable)):
        raise ValueError(f"{argument}: got {values!r}, expected None or a list of values among {choices}")
    chosen = list(dict.fromkeys(supported if values is None else values))
    for value in chosen:
        if value not in supported:
            raise ValueError(f"{argument}: got {value!r}, expected values among {choices}")
    return chosen


def _default_architectures() -> list[str]:
    if count := device_count():
        return [device_architecture(index) for index in range(count)]
    known = compiler.known_architectures()
    return [arch for arch in configs.OWN_ARCHITECTURES if configs.capability(arch) in known]


def _cache() -> ArtifactCache:
    return ArtifactCache(env.cache_dir())


def _cubin(config: KernelConfig) -> tuple[Path, bool]:
    """The path and whether nothing had to be compiled."""
    source, folder = kernel_source(config), env.kernel_dir()
    nvrtc = "{}.{}".format(*compiler.nvrtc_version())
    facts = {
        "source": source_digest(source, [folder]),
        "flags": " ".join(compiler.flags(config)),
        "nvrtc": nvrtc,
        "contract": contract.CONTRACT_VERSION,
    }
    metadata: dict[str, Any] = {"config": {"kernel": config.kernel, **config.constants, "arch": config.arch}, **facts}

    def build() -> bytes:
        cubin, used = compiler.compile_cubin(config, source, folder)
        metadata["resources"] = asdict(used)
        return cubin

    path = _cache().get(repr(facts), config.name, "cubin", build, metadata)
    return path, "resources" not in metadata


def _precompile_one(config: KernelConfig) -> Precompiled:
    start = time.perf_counter()
    path, from_cache = _cubin(config)
    return Precompiled(config, path, time.perf_counter() - start, from_cache)
