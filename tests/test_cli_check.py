"""``cuattn check`` of cuattn's own attention."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import usage_error
from stand_ins import moving_chunks, with_keywords

import cuattn
from cuattn import env
from cuattn.cli import check, main
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.reporting import make_reporter
from cuattn.testing import CHECKS, GRADIENT_CHECKS, Case, Cases
from cuattn.testing.report import SHOWN_FAILURES

pytestmark = pytest.mark.usefixtures("cpu_only")

ALL_CHECKS = (*CHECKS, *GRADIENT_CHECKS)
ACCURACY_CASES = (
    Case(16, 128),
    Case(16, 128, dtype="bfloat16", family="peaked 8"),
    Case(16, 128, "full", "float32", value_dim=32),
)
FEW_CASES = Cases((Case(17, 80, batch=2, heads=4, kv_heads=2),), ACCURACY_CASES, ACCURACY_CASES)
#: What `Cases.standard` was asked for.
asked: list[dict[str, Any]] = []


def give(monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """These cases in the place of the standard ones."""

    def standard(**variants: Any) -> Cases:
        asked.append(variants)
        return cases

    monkeypatch.setattr(check.Cases, "standard", standard)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, FEW_CASES)


class TestCheck:
    @pytest.mark.usefixtures("few_cases")
    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_all_is_well(self, library: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--library", library]) == 0
        text = capsys.readouterr().out
        assert f"cuattn {cuattn.__version__}: backend reference, {library} arrays on cpu" in text
        assert text.endswith(
            "forward accuracy: 3 of 3 trials passed\n"
            "forward invariance: 23 of 23 trials passed, 23 of 23 negative controls failed as they must\n"
            "gradient accuracy: 3 of 3 trials passed\n"
            "gradient invariance: 17 of 17 trials passed, 17 of 17 negative controls failed as they must\n"
        )
        assert (len(CHECKS), len(GRADIENT_CHECKS)) == (23, 17)

    @pytest.mark.usefixtures("few_cases")
    def test_the_emulator(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def without_keywords(*args: Any, scale: float | None = None, return_lse: bool = False) -> Any:
            return cuattn.attention(*args, scale=scale, return_lse=return_lse)

        def gradients_without_keywords(*args: Any, scale: float | None = None, dlse: Any = None) -> Any:
            return cuattn.attention_backward(*args, scale=scale, dlse=dlse)

        monkeypatch.setattr(check, "attention", without_keywords)  # whose checks need more kernels
        monkeypatch.setattr(check, "gradients", gradients_without_keywords)
        monkeypatch.setattr("cuattn.testing.judgments.GRADIENT_CHECKS", GRADIENT_CHECKS[:3])
        give(monkeypatch, Cases(FEW_CASES.invariance, ACCURACY_CASES[:1], ACCURACY_CASES[:1]))
        assert main(["check", "--backend", "emulator", "--arch", "sm_90a"]) == 0
        assert "backend emulator sm_90a, " in capsys.readouterr().out

    @pytest.mark.usefixtures("few_cases")
    def test_json_on_standard_output_is_alone_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--json", "-"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert "negative control" in err
        assert report["passed"] is True
        assert report["operation"] == "cuattn"
        assert all(verdict["passed"] for verdict in report["judgments"].values())
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
        assert "forward accuracy: 3 of 3 trials passed" in text
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
        assert f"gradient invariance, sequences alone, {case}: sequence 0 alone against batch 2: dk: " in text
        assert "gradient accuracy, float16 d64 causal 1x1/1x16x128: dk: relative L2 error 0.015" in text
        assert "\nforward accuracy: 3 of 3 trials passed\n" in text
        assert "\ngradient accuracy: 0 of 3 trials passed\n" in text
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
        assert "forward invariance: 23 of 23 trials passed, 1 of 23 negative controls failed as they must" in text
        assert "gradient invariance: 17 of 17 trials passed, 17 of 17 negative controls failed as they must" in text
        assert "and 12 more failures" in text
        assert "forward invariance, negative control of batch size, float16" in text
        assert text.count(": a non-invariant operation passed\n") == SHOWN_FAILURES

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
            (["--junit", "/"], "--junit: got '/', expected a file in an existing folder"),
            (["--junit", "/nonexistent/x.xml"], "--junit: got '/nonexistent/x.xml', expected a file in an existing"),
            (["--backward", "a:b"], "--backward: got it without --op, expected the two together"),
            (["--convention", "sdpa"], "--convention: got it without --op, expected the two together"),
            (["--device", "cpu"], "--device: got it without --op, expected the two together"),
            (["--backward", "a:b", "--forward-only"], "--backward: got it with --forward-only, expected one of the"),
        ],
    )
    def test_wrong_usage(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        usage_error("check", *argv)
        assert message in capsys.readouterr().err

    def test_the_environment_variable_chooses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def setting(**arguments: Any) -> tuple[str, str | None]:
            defaults = dict.fromkeys(("backend", "arch", "dtype", "op", "backward", "convention", "device"))
            more = {"library": "numpy", "quick": True, "forward_only": False, **arguments}
            chosen = check._setting(check.argparse.Namespace(**{**defaults, **more}))
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
        give(monkeypatch, Cases(FEW_CASES.invariance, ACCURACY_CASES[:1], ACCURACY_CASES[:1]))
        main(["check", "--quick", "--library", "numpy"])
        assert "without bfloat16, which numpy cannot hold: pip install ml_dtypes" in capsys.readouterr().out
        assert asked[-1] == {"size": "tiny", "dtypes": ("float16",), "head_dims": (64,)}
        main(["check", "--library", "numpy"])
        assert asked[-1] == {"size": "tiny", "dtypes": ("float16", "float32"), "head_dims": (64, 128)}
        usage_error("check", "--dtype", "bfloat16", "--library", "numpy")
        assert "--dtype: got bfloat16, which numpy cannot hold: pip install ml_dtypes" in capsys.readouterr().err

    def test_dtypes_can_be_chosen(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        give(monkeypatch, Cases(FEW_CASES.invariance, ACCURACY_CASES[2:], ACCURACY_CASES[2:]))
        assert main(["check", "--dtype", "float32", "bfloat16"]) == 0
        assert asked[-1]["dtypes"] == ("float32", "bfloat16")
        assert "d64/32 full" in capsys.readouterr().out

    def test_kernels_are_compiled_together_before_a_gpu_needs_them(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        compiled: list[Any] = []

        def precompile(*chosen: list[str]) -> list[str]:
            compiled.extend(chosen)
            return ["kernel"] * 7

        monkeypatch.setattr(check, "precompile", precompile)
        check._compile(make_reporter(), FEW_CASES)
        assert compiled == [[64], ["causal", "full"], ["bfloat16", "float16", "float32"]]
        assert capsys.readouterr().out.startswith("7 kernels compiled or found in 0 s")


def _attend_whole(op: Any, sequence: Any, mask: str, cut: int, options: Any) -> Any:
    """What makes the controls invariant."""
    return sequence.attend(op, slice(None), slice(None), mask, options)
