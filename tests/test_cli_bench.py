"""``cuattn bench`` without a GPU: options, what is stored and shown, what is refused."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import usage_error

from cuattn.bench import chunked, decode, jit, prefill, rates
from cuattn.bench.results import Results
from cuattn.cli import main
from cuattn.cli.bench import BENCHMARKS

ON_GPU = ("prefill", "chunked", "decode", "backward", "host")
TIMES = {"cuattn": [2.0, 1.0, 3.0], "flash": [4.0]}
REASONS = {"flex": "RuntimeError: not here"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cuattn bench {name}")
    assert BENCHMARKS[name][0].__doc__.partition("\n")[0] in shown


@pytest.mark.parametrize("name", ON_GPU)
def test_a_gpu_is_needed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usage_error("bench", name)
    assert "device: got none, expected a CUDA device that torch can use" in capsys.readouterr().err


@pytest.mark.parametrize("name", ON_GPU)
def test_torch_is_needed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", name]) == 1
    assert "pip install 'cuattn[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["prefill", "--providers", "flash", "triton"], "argument --providers: invalid choice: 'triton'"),
        (["prefill", "--providers", "flash_deterministic"], "invalid choice: 'flash_deterministic'"),
        (["prefill", "--head-dim", "63"], "argument --head-dim: got 63, expected multiples of 8 up to 256"),
        (["prefill", "--length", "0"], "argument --length: got 0, expected at least 1"),
        (["decode", "--heads", "32/7"], "argument --heads: got 32/7, expected a multiple"),
        (["decode", "--heads", "many"], "argument --heads: "),
        (["backward", "--plot", __file__], "expected a folder"),
        (["host", "--batches", "0"], "argument --batches: got 0, expected at least 1"),
        (["jit", "--dtype", "float64"], "argument --dtype: invalid choice"),
        ([], "BENCHMARK"),
        (["training"], "argument BENCHMARK: invalid choice: 'training'"),
    ],
)
def test_wrong_usage(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage_error("bench", *argv)
    assert expected in capsys.readouterr().err


def stored(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def run(module: Any, argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a benchmark stores where measurements are stood in for; the second problem is refused."""
    problems: list[Any] = []

    def measure(problem: Any, names: list[str], *effort: Any) -> Any:
        assert names == ["flash", "flex"]
        problems.append(problem)
        return "a reason" if len(problems) == 2 else (TIMES, REASONS)

    monkeypatch.setattr(module, "begin", lambda options, columns: Results(options.csv, columns))
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(rates, "measure_roof", lambda repeats: {"matmul": [1.0]})
    monkeypatch.setattr(decode, "measure_roof", lambda repeats: ({"sum": [1.0], "copy": [2.0]}, {"sum": 1, "copy": 1}))
    files = ["--csv", str(folder / "rows.csv"), "--plot", str(folder / "pictures")]
    name = module.__name__.rpartition(".")[2]
    assert main(["bench", name, "--providers", "cuattn", "flash", "flex", *files, *argv]) == 1
    return stored(folder / "rows.csv")


@pytest.mark.parametrize(
    ("module", "argv", "rate"),
    [
        (prefill, ["--part", "grid", "--head-dim", "64", "--length", "512", "1024", "2048"], "tflops"),
        (chunked, [], "tflops"),
        (decode, ["--batch", "8", "--heads", "32/8", "--page-size"], "gb_per_s"),
    ],
)
def test_rows_are_stored_shown_and_drawn(
    module: Any,
    argv: list[str],
    rate: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    rows = run(module, argv, tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert shown.count("REFUSED: a reason") == 1
    assert "not measured: RuntimeError: not here" in shown
    measured = [row for row in rows if row["figure"] != "roof"]
    assert {row["provider"] for row in measured} == {"cuattn", "flash", "flex"}
    for row in measured:
        if row["provider"] == "flex":
            assert row["note"] == REASONS["flex"]
            assert row[rate] == ""
        else:
            assert float(row[rate]) >= 0
            assert row["ratio_to_flash"] == ("2.000" if row["provider"] == "cuattn" else "1.000")
            assert next(row[column] for column in row if column.startswith("percent_of_"))
    assert all(row["torch"] == torch.__version__ for row in rows)
    drawn = {file.name.partition("-")[2] for file in (tmp_path / "pictures").iterdir()}
    figure = {prefill: "forward", chunked: "chunk", decode: "decode"}[module]
    assert drawn == {f"{figure}-{name}.{form}" for name in ("rate", "price") for form in ("svg", "png")}
    if module is chunked:
        assert measured[0]["ratio_to_prefill"] == "1.000"
        assert measured[1]["ratio_to_prefill"] == "0.500"


class TestJit:
    def run(self, seconds: float, peer: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
        def measure(program: str, arguments: Any, cache: Path) -> tuple[float, float]:
            if program == jit.PEER_PROGRAM:
                if isinstance(peer, Exception):
                    raise peer
                return peer, 2 * peer
            assert program == jit.PROGRAM
            return seconds, 2 * seconds

        monkeypatch.setattr(jit, "measure", measure)
        return main(["bench", "jit", "--repeats", "2", "--csv", str(file)])

    def test_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "jit.csv"
        assert self.run(0.05, 5.0, file, monkeypatch) == 0
        rows = stored(file)
        assert len({row["kernel"] for row in rows}) == 2
        warm = [row for row in rows if row["figure"] == "warm"]
        assert [row["provider"] for row in warm] == ["cuattn", "flex"] * 2
        ours = warm[0]
        assert (ours["median_s"], ours["kernels_per_s"], ours["percent_of_target"]) == ("0.0500", "20.00", "200")
        assert ours["ratio_to_flex"] == "100.000"
        reasons = {row["provider"]: row["note"] for row in rows if row["note"]}
        assert set(reasons) == {"flash", "cudnn", "efficient", "math", "flash_attn", "flashinfer"}

    def test_late(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error = subprocess.CalledProcessError(1, ["python"], stderr="Traceback\nRuntimeError: no GPU\n")
        assert self.run(0.2, error, tmp_path / "jit.csv", monkeypatch) == 1
        (flex, _) = (row for row in stored(tmp_path / "jit.csv") if row["provider"] == "flex")
        assert flex["note"] == "RuntimeError: no GPU"

    def test_the_peers_program(self) -> None:
        """It asks for a GPU, in a process of its own."""
        if torch.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            jit.measure(jit.PEER_PROGRAM, ("flex", "64", "causal", "float16"), Path())
        assert "line 6, in" in caught.value.stderr
