"""The command ``cuattn``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import usage_error

from cuattn import env, machine
from cuattn.cli import libraries, main
from cuattn.config import ForwardConfig
from cuattn.errors import MissingDependencyError
from cuattn.jit import Precompiled
from cuattn.reporting import counted
from cuattn.testing import CupyLibrary, NumpyLibrary, TorchLibrary

pytestmark = pytest.mark.usefixtures("cpu_only")


class TestLibraries:
    def test_a_cpu_takes_what_holds_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert libraries.choose("auto") == NumpyLibrary()
        monkeypatch.setattr("cuattn.testing.arrays.installed", lambda package: package != "ml_dtypes")
        assert libraries.choose("reference") == TorchLibrary()
        monkeypatch.setattr(libraries, "installed", lambda package: False)
        assert libraries.choose("emulator") == NumpyLibrary()

    def test_a_gpu_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "device_count", lambda: 1)
        monkeypatch.setattr(libraries, "_torch_has_gpu", lambda: True)
        assert libraries.choose("auto") == TorchLibrary(device="cuda:0")
        assert libraries.choose("cuda", "cupy") == CupyLibrary()
        assert libraries.choose("reference", "torch") == TorchLibrary()
        assert libraries.choose("auto", "numpy") == NumpyLibrary()
        monkeypatch.setattr(libraries, "_torch_has_gpu", lambda: False)
        assert libraries.choose("auto") == CupyLibrary()
        assert libraries.choose("auto", "torch") == TorchLibrary()


class TestInfo:
    def test_names_every_fact(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        facts = ("cuattn", "contract", "python", "numpy", "torch", "cupy", "nvrtc", "driver", "device", "backend")
        lines = [line.split() for line in text.splitlines() if line.strip()]
        assert {line[0] for line in lines} >= set(facts)
        assert str(env.kernel_dir()) in text
        assert str(env.cache_dir()) in text
        assert "no CUDA device that CuPy can use" in text
        assert "reference, on the CPU" in text

    def test_without_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> Any:
            raise MissingDependencyError("no cupy")

        monkeypatch.setattr(machine, "import_cupy", missing)
        versions = machine.versions()
        assert (versions["cupy"], versions["nvrtc"]) == (machine.ABSENT, machine.ABSENT)

    def test_the_environment_variable_shows(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(env.BACKEND, "emulator:sm_90a")
        main(["info"])
        assert "emulator:sm_90a (CUATTN_BACKEND)" in capsys.readouterr().out

    @pytest.mark.parametrize("command", [["info"], ["check"]])
    @pytest.mark.parametrize(
        ("variable", "value", "expected"),
        [
            (env.BACKEND, "emulator:sm_99", "CUATTN_BACKEND: got 'sm_99', expected one of sm_80, "),
            (env.BACKEND, "gpu", "CUATTN_BACKEND: got 'gpu', expected one of 'auto', "),
            (env.KERNEL_DIR, "/nonexistent", "CUATTN_KERNEL_DIR: got '/nonexistent', expected a folder of kernel"),
        ],
    )
    def test_a_wrong_environment_variable_is_an_error(
        self,
        command: list[str],
        variable: str,
        value: str,
        expected: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv(variable, value)
        usage_error(*command)
        assert expected in capsys.readouterr().err


class TestKernels:
    def test_cache_list_and_clear(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from cuattn.jit import ArtifactCache

        monkeypatch.setenv(env.CACHE_DIR, str(tmp_path))
        assert main(["cache", "list"]) == 0
        assert f"0 files, 0 KiB, in {tmp_path}" in capsys.readouterr().out
        for key, text in (("a", "1 file, 2 KiB, in "), ("b", "2 files, 4 KiB, in ")):
            path = ArtifactCache(tmp_path).get(key, f"kernel_{key}", "cubin", lambda: bytes(2048), {})
            main(["cache", "list"])
            assert f"\n{text}{tmp_path}\n" in capsys.readouterr().out
        path.write_bytes(b"damaged")
        main(["cache", "list"])
        text = capsys.readouterr().out
        rows = [line.split() for line in text.splitlines() if "kernel_" in line]
        assert [(row[0], row[1]) for row in rows] == [("kernel_a", "2"), ("kernel_b", "0")]
        assert rows[0][-1] == "yes"
        assert "no, built anew on use" in text
        assert main(["cache", "clear"]) == 0
        assert f"2 files removed from {tmp_path}" in capsys.readouterr().out
        assert ArtifactCache(tmp_path).entries() == []

    @pytest.mark.parametrize(("number", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
    def test_plurals(self, number: int, text: str) -> None:
        assert counted(number, "file") == text

    def test_precompile_passes_the_selection_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls = []

        def precompile(*selection: Any, progress: Any, **options: Any) -> list[Precompiled]:
            calls.append((selection, options))
            kernel = Precompiled(ForwardConfig(64, "causal", "float16", "sm_80"), Path("x"), 1.25, from_cache=False)
            progress(1, 2, kernel)
            progress(2, 2, kernel._replace(from_cache=True))
            return [kernel, kernel]

        monkeypatch.setattr("cuattn.jit.precompile", precompile)
        some = "--head-dim 64 192 --value-dim 128 --mask causal --arch sm_80 --jobs 1"
        assert main(["precompile", *some.split()]) == 0
        assert main(["precompile"]) == 0
        assert calls == [
            (([64, 192], ["causal"], None, ["sm_80"]), {"value_dims": [128], "jobs": 1}),
            ((None, None, None, None), {"value_dims": None, "jobs": None}),
        ]
        text = capsys.readouterr().out
        assert "[1/2] forward_sm80_d64_causal_float16_sm_80: 1.2 s\n" in text
        assert "[2/2] forward_sm80_d64_causal_float16_sm_80: was there\n" in text
        assert "2 kernels in " in text

    @pytest.mark.parametrize(
        "argv",
        [["--head-dim", "65"], ["--value-dim", "0"], ["--dtype", "float64"], ["--jobs", "0"], ["--arch", "sm_1"]],
    )
    def test_precompile_wrong_usage(self, argv: list[str]) -> None:
        usage_error("precompile", *argv)

    def test_commands_are_required(self) -> None:
        usage_error()
        usage_error("cache")


def test_as_a_module_and_without_heavy_imports() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "cuattn", "check", "--help"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("usage: cuattn check")
    program = "import sys, cuattn.cli; print(sorted({'torch', 'cupy', 'jax', 'rich', 'ml_dtypes'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
