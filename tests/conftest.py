"""What every test session shares: a kernel cache of its own, and the rule for tests that need a GPU."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cuattn import dispatch, env
from cuattn.launches import Launch


def pytest_configure(config: pytest.Config) -> None:
    """One empty cache folder a session: nothing stale is used, and each kernel is compiled once for all workers."""
    if hasattr(config, "workerinput"):
        return  # a pytest-xdist worker has inherited the folder from the process that started it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU's memory
    folder = tempfile.mkdtemp(prefix="cuattn-tests-")
    before = os.environ.get(env.CACHE_DIR)
    os.environ[env.CACHE_DIR] = folder

    def restore() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            os.environ.pop(env.CACHE_DIR, None)
        else:
            os.environ[env.CACHE_DIR] = before

    config.add_cleanup(restore)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernel sources, in use in place of them."""
    folder = tmp_path / "kernels"
    shutil.copytree(env.kernel_dir(), folder)
    monkeypatch.setenv(env.KERNEL_DIR, str(folder))
    return folder


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of the emulated calls of a test."""
    seen: list[Launch] = []
    run = dispatch.emulator.run

    def noting(launches: list[Launch], *order: Any) -> None:
        seen.extend(launches)
        run(launches, *order)

    monkeypatch.setattr(dispatch.emulator, "run", noting)
    return seen


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of bench/ by its name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))
    return importlib.import_module


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of commands on a machine without a GPU and without a chosen backend, on any machine."""
    for module in ("cuattn.cli.libraries", "cuattn.machine"):
        monkeypatch.setattr(f"{module}.device_count", lambda: 0)
    monkeypatch.setattr("cuattn.cli.libraries._torch_has_gpu", lambda: False)
    monkeypatch.delenv(env.BACKEND, raising=False)


def why_no_gpu() -> str | None:
    """None where CuPy can use a CUDA device, else the reason."""
    try:
        import cupy
    except ImportError as error:
        return f"needs a CUDA device: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs a CUDA device: {error}"
    return None if count else "needs a CUDA device: the driver lists none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if gpu_items else None
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
