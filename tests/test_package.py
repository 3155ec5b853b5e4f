"""The wheel: complete, installed beside NumPy alone, quick to import, and at work far from the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, away from this session's packages and kernels."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUATTN_KERNEL_DIR")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=keep, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with NumPy and the wheel, and nothing else: no CuPy, no torch, no pip."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    numpy = importlib.metadata.distribution("numpy")
    for name in {file.parts[0] for file in numpy.files or ()} - {".."}:
        (site / name).symlink_to(numpy.locate_file(name))
    # Without an index this succeeds only if NumPy is all that the wheel requires.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_is_pure_python_and_holds_every_source(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = [file for file in (ROOT / "kernels_cu").rglob("*") if file.is_file()]
    include = ROOT / "cuattn" / "emulator" / "include"
    headers = [file for file in include.rglob("*") if file.is_file()]
    assert kernels
    assert headers
    expected = {f"cuattn/kernels_cu/{file.relative_to(ROOT / 'kernels_cu').as_posix()}" for file in kernels}
    expected |= {f"cuattn/emulator/include/{file.relative_to(include).as_posix()}" for file in headers}
    assert expected <= names
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"cuattn", f"cuattn-{importlib.metadata.version('cuattn')}.dist-info"}


def test_the_checkout_uses_its_own_kernels() -> None:
    from cuattn import env

    if env.KERNEL_DIR not in os.environ:
        assert env.kernel_dir() == ROOT / "kernels_cu"


@pytest.mark.parametrize("package", ["cupy", "torch", "jax", "ml_dtypes", "rich"])
def test_the_fresh_environment_lacks(fresh: Path, package: str) -> None:
    program = f"from importlib.util import find_spec; print(find_spec({package!r}))"
    assert run(fresh / "python", "-I", "-c", program, cwd=fresh) == "None\n"


def test_import_takes_less_than_half_a_second(fresh: Path) -> None:
    program = "import time; t = time.perf_counter(); import cuattn; print(time.perf_counter() - t)"
    seconds = [float(run(fresh / "python", "-I", "-c", program, cwd=fresh)) for _ in range(3)]
    assert min(seconds) < 0.5, f"import cuattn took {seconds} s"


ATTENTION = """
import numpy as np
import cuattn
from cuattn import env

assert cuattn.__file__.startswith({prefix!r}) and str(env.kernel_dir()).startswith({prefix!r})
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 2, 40, 64)).astype(np.float16) for _ in range(3))
with cuattn.use_backend({backend!r}, **{options!r}):
    out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
scores = np.einsum("bhid,bhjd->bhij", q.astype(float), k.astype(float)) / 8
scores[..., ~np.tri(40, dtype=bool)] = -np.inf
weights = np.exp(scores)
gold = weights / weights.sum(-1, keepdims=True) @ v.astype(float)
assert out.dtype == np.float16 and lse.dtype == np.float32
assert (out[:, :, 0] == v[:, :, 0]).all(), "a row with one visible key is that key's value"
assert np.abs(out - gold).max() < 4e-3, np.abs(out - gold).max()
assert np.abs(lse - np.log(weights.sum(-1))).max() < 1e-4
"""


def test_numpy_attention_runs_from_the_wheel(fresh: Path, tmp_path: Path) -> None:
    program = ATTENTION.format(prefix=str(fresh.parent), backend="auto", options={})
    run(fresh / "python", "-I", "-c", program, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs a C++ compiler: no g++ here")
def test_emulated_kernels_run_from_the_wheel(fresh: Path, tmp_path: Path) -> None:
    program = ATTENTION.format(prefix=str(fresh.parent), backend="emulator", options={"arch": "sm_80"})
    run(fresh / "python", "-I", "-c", program, cwd=tmp_path)


@pytest.mark.parametrize("command", [["python", "-I", "-m", "cuattn"], ["cuattn"]])
def test_info_runs_from_the_wheel(fresh: Path, tmp_path: Path, command: list[str]) -> None:
    text = run(fresh / command[0], *command[1:], "info", cwd=tmp_path)
    assert importlib.metadata.version("cuattn") in text


def test_benchmarks_are_in_the_wheel(fresh: Path, tmp_path: Path) -> None:
    """They say what they miss."""
    assert "usage: cuattn bench prefill" in run(fresh / "cuattn", "bench", "prefill", "--help", cwd=tmp_path)
    done = subprocess.run([fresh / "cuattn", "bench", "prefill"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'cuattn[bench]'" in done.stderr
