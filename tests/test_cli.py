"""The command ``cuattn``."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_ins import moving_chunks, with_keywords

import cuattn
from cuattn import env
from cuattn.cli import check, libraries, machine, main
from cuattn.config import ForwardConfig
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.jit import Precompiled
from cuattn.reporting import counted
from cuattn.testing import CHECKS, GRADIENT_CHECKS, Case, CupyLibrary, NumpyLibrary, TorchLibrary

SWEEP_CASES = [Case(17, 80, batch=2, heads=4, kv_heads=2)]
ALL_CHECKS = (*CHECKS, *GRADIENT_CHECKS)
ACCURACY_CASES = [
    Case(16, 128),
    Case(16, 128, dtype="bfloat16", family="peaked 8"),
    Case(16, 128, "full", "float32", value_dim=32),
]


@pytest.fixture(autouse=True)
def _no_gpu_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a machine without a GPU, on any machine."""
    monkeypatch.setattr(libraries, "device_count", lambda: 0)
    monkeypatch.setattr(machine, "device_count", lambda: 0)
    monkeypatch.delenv(env.BACKEND, raising=False)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "standard_cases", lambda **variants: iter(SWEEP_CASES))
    for name in ("accuracy_cases", "gradient_accuracy_cases"):
        monkeypatch.setattr(check, name, lambda **variants: iter(ACCURACY_CASES))


def usage_error(*argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


class TestCheck:
    @pytest.mark.usefixtures("few_cases")
    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_all_is_well(self, library: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--library", library]) == 0
        text = capsys.readouterr().out
        assert f"cuattn {cuattn.__version__}: backend reference, {library} arrays on cpu" in text
        checks = len(ALL_CHECKS)
        assert f"invariance: {checks} of {checks} trials passed\n" in text
        assert "\naccuracy: 3 of 3 cases passed\naccuracy of gradients: 3 of 3 cases passed\n" in text
        assert text.endswith(f"negative control: {checks} of {checks} checks failed as they must\n")

    @pytest.mark.usefixtures("few_cases")
    def test_the_emulator(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def without_keywords(*args: Any, scale: float | None = None, return_lse: bool = False) -> Any:
            return cuattn.attention(*args, scale=scale, return_lse=return_lse)

        def gradients_without_keywords(*args: Any, scale: float | None = None, dlse: Any = None) -> Any:
            return cuattn.attention_backward(*args, scale=scale, dlse=dlse)

        monkeypatch.setattr(check, "attention", without_keywords)  # whose checks need more kernels
        monkeypatch.setattr(check, "gradients", gradients_without_keywords)
        monkeypatch.setattr(check, "GRADIENT_CHECKS", GRADIENT_CHECKS[:3])
        for name in ("accuracy_cases", "gradient_accuracy_cases"):
            monkeypatch.setattr(check, name, lambda **variants: iter(ACCURACY_CASES[:1]))
        assert main(["check", "--backend", "emulator", "--arch", "sm_90a"]) == 0
        assert "backend emulator sm_90a, " in capsys.readouterr().out

    @pytest.mark.usefixtures("few_cases")
    def test_json_on_standard_output_is_alone_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--json", "-"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert "negative control" in err
        assert report["passed"] is True
        assert (report["backend"], report["arch"], report["device"]) == ("reference", None, "cpu")
        assert report["versions"]["contract"] == str(cuattn.CONTRACT_VERSION)
        assert len(report["invariance"]) == 2 * len(ALL_CHECKS)
        assert {entry["check"] for entry in report["invariance"] if entry["control"]} == {c.name for c in ALL_CHECKS}
        assert report["invariance"][0]["case"]["len_k"] == 80
        assert [entry["case"]["family"] for entry in report["accuracy"]] == ["normal", "peaked 8", "normal"]
        assert all(0 < entry["error"] < 1 and entry["passed"] for entry in report["accuracy"])
        assert [entry["case"] for entry in report["gradient_accuracy"]] == [x["case"] for x in report["accuracy"]]
        for entry in report["gradient_accuracy"]:
            assert entry["passed"]
            assert all(0 < entry[x]["error"] < 1 and 0 < entry[x]["ratio"] < 2 for x in ("dq", "dk", "dv"))

    @pytest.mark.usefixtures("few_cases")
    def test_bits_that_move_are_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(check, "attention", moving_chunks)
        assert main(["check", "--json", str(tmp_path / "report.json")]) == 1
        text = capsys.readouterr().out
        assert "batch size, float16 d64 causal 2x4/2x17x80: batch 1 against 2: out:" in text
        assert "accuracy: 3 of 3 cases passed" in text
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["passed"] is False
        failed = [entry for entry in report["invariance"] if not entry["passed"]]
        assert failed
        assert all("elements differ, first at" in entry["detail"] for entry in failed)

    @pytest.mark.usefixtures("few_cases")
    def test_gradients_that_are_wrong_are_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def by_batch(*args: Any, scale: float | None = None) -> Any:
            dq, dk, dv = cuattn.attention_backward(*args, scale=scale)
            return dq, (dk * (1 + len(dq) / 64)).astype(dk.dtype), dv

        monkeypatch.setattr(check, "gradients", by_batch)
        assert main(["check", "--json", "-"]) == 1
        out, text = capsys.readouterr()
        case = "float16 d64 causal 2x4/2x17x80"
        assert f"gradients: sequences alone, {case}: sequence 0 alone against batch 2: dk: " in text
        assert "accuracy of gradients, float16 d64 causal 1x1/1x16x128: dk: relative L2 error 0.015" in text
        assert "\naccuracy: 3 of 3 cases passed\naccuracy of gradients: 0 of 3 cases passed\n" in text
        report = json.loads(out)
        failed = {entry["check"] for entry in report["invariance"] if not entry["passed"]}
        assert failed == {f"gradients: {name}" for name in ("sequences alone", "batch size", "neighbours")}
        assert [entry["passed"] for entry in report["gradient_accuracy"]] == [False] * 3

    @pytest.mark.usefixtures("few_cases")
    def test_a_harmless_control_is_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("cuattn.testing.controls._attend_in_two", _attend_whole)
        monkeypatch.setattr(check, "attention", with_keywords)
        assert main(["check"]) == 1
        text = capsys.readouterr().out
        checks, harmful = len(ALL_CHECKS), len(GRADIENT_CHECKS) + 1
        assert f"invariance: {checks} of {checks} trials passed" in text
        assert f"negative control: {harmful} of {checks} checks failed as they must" in text
        assert "more failures" in text
        assert "negative control of batch size, float16" in text
        assert text.count(": a non-invariant operation passed\n") == check.SHOWN_FAILURES

    @pytest.mark.usefixtures("few_cases")
    def test_an_operation_that_raises_is_reported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(check, "attention", broken)
        assert main(["check", "--json", "-"]) == 1
        out, err = capsys.readouterr()
        assert "RuntimeError: no" in err
        report = json.loads(out)
        assert report["accuracy"][0]["error"] is None  # NaN is no JSON
        assert report["accuracy"][0]["failures"] == ["RuntimeError: no"]
        assert report["gradient_accuracy"][0]["dv"]["ratio"] is None
        assert report["gradient_accuracy"][0]["failures"] == ["RuntimeError: no"]

    @pytest.mark.usefixtures("few_cases")
    @pytest.mark.parametrize("error", [CompileError("line 7"), MissingDependencyError("pip install 'cuattn[cuda13]'")])
    def test_what_ends_the_sweep_is_one_message(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def unequipped(*args: Any, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(check, "attention", unequipped)
        assert main(["check"]) == 1
        assert capsys.readouterr().err == f"cuattn: {error}\n"

    @pytest.mark.usefixtures("few_cases")
    def test_a_report_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(*args: Any, **options: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        assert main(["check", "--json", str(tmp_path / "report.json")]) == 1
        assert capsys.readouterr().err == "cuattn: [Errno 28] No space left on device\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--backend", "gpu"], "invalid choice: 'gpu'"),
            (["--arch", "sm_80"], "--arch: got sm_80 for the backend auto"),
            (["--backend", "emulator", "--arch", "sm_70"], "invalid choice: 'sm_70'"),
            (["--backend", "cuda"], "--backend: got cuda, expected it where CuPy"),
            (["--backend", "reference", "--library", "cupy"], "--library: got cupy, expected one with cpu arrays"),
            (["--json", "/nonexistent/x.json"], "--json: got '/nonexistent/x.json', expected a file in an existing"),
            (["--json", "/"], "--json: got '/', expected a file in an existing folder"),
            (["--json", ""], "--json: got '', expected a file in an existing folder"),
        ],
    )
    def test_wrong_usage(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        usage_error("check", *argv)
        assert message in capsys.readouterr().err

    def test_the_environment_variable_chooses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def setting(**arguments: Any) -> tuple[str, str | None]:
            defaults = {"backend": None, "arch": None, "library": "numpy", "dtype": None, "quick": True, **arguments}
            chosen = check._setting(check.argparse.Namespace(**defaults))
            return chosen.backend, chosen.arch

        assert setting() == ("reference", None)
        monkeypatch.setenv(env.BACKEND, "emulator:sm_90a")
        assert setting() == ("emulator", "sm_90a")
        assert setting(arch="sm_86") == ("emulator", "sm_86")
        assert setting(backend="reference") == ("reference", None)
        monkeypatch.delenv(env.BACKEND)
        assert setting(backend="emulator") == ("emulator", "sm_80")

    def test_without_bfloat16_there_is_a_note(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("cuattn.testing.arrays.installed", lambda package: False)
        monkeypatch.setattr(check, "standard_cases", lambda **variants: _remember(variants))
        for name in ("accuracy_cases", "gradient_accuracy_cases"):
            monkeypatch.setattr(check, name, lambda **variants: iter(ACCURACY_CASES[:1]))
        main(["check", "--quick", "--library", "numpy"])
        assert "without bfloat16, which numpy cannot hold: pip install ml_dtypes" in capsys.readouterr().out
        assert _remembered[-1] == {"size": "tiny", "dtypes": ("float16",), "head_dims": (64,)}
        main(["check", "--library", "numpy"])
        assert _remembered[-1] == {"size": "tiny", "dtypes": ("float16", "float32"), "head_dims": (64, 128)}
        usage_error("check", "--dtype", "bfloat16", "--library", "numpy")
        assert "--dtype: got bfloat16, which numpy cannot hold: pip install ml_dtypes" in capsys.readouterr().err

    def test_dtypes_can_be_chosen(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(check, "standard_cases", lambda **variants: _remember(variants))
        for name in ("accuracy_cases", "gradient_accuracy_cases"):
            monkeypatch.setattr(check, name, lambda **variants: iter(ACCURACY_CASES[2:]))
        assert main(["check", "--dtype", "float32", "bfloat16"]) == 0
        assert _remembered[-1]["dtypes"] == ("float32", "bfloat16")
        assert "d64/32 full" in capsys.readouterr().out


_remembered: list[dict[str, Any]] = []


def _remember(variants: dict[str, Any]) -> Iterator[Case]:
    _remembered.append(variants)
    return iter(SWEEP_CASES)


def _attend_whole(op: Any, sequence: Any, mask: str, cut: int, options: Any) -> Any:
    """What makes the controls invariant."""
    return sequence.attend(op, slice(None), slice(None), mask, options)


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
