"""The benchmarks, as far as they go without a GPU: they start, count work rightly and judge rightly."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cuattn
from cuattn import env
from cuattn.bench import answers, backward, chunked, decode, host, jit, prefill, rates, results, timing

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPTS = (*("accuracy", "contract_choices", "counters", "gpu_suite", "padded", "sanitize", "smoke", "variants"),)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_says_what_it_does(script: str) -> None:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--help"]
    variables = {**os.environ, "PYTHONPATH": str(BENCH.parent)}  # as from a checkout where nothing is installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert set(SCRIPTS) == {
        file.stem for file in BENCH.glob("*.py") if "ArgumentParser(" in file.read_text(encoding="utf-8")
    }


def test_work_of_attention() -> None:
    flop = rates.attention_flop
    assert flop(1, 1, 1, 1, 1, "full") == 4  # a multiplication and an addition for q k, and for the weight and v
    assert flop(2, 16, 8192, 8192, 128, "full") == 4 * 2 * 16 * 8192**2 * 128
    assert flop(2, 3, 7, 7, 64, "causal") == flop(2, 3, 7, 7, 64, "full") / 2
    # 2 rows over 5 keys see 4 and 5 of them, half a key less each by convention
    assert flop(1, 1, 2, 5, 64, "causal", 32) == (4 + 5 - 1) * 2 * (64 + 32)


def test_csv_has_its_columns(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "new" / "a.csv", [{"b": 1}], ("a", "b"))
    assert (tmp_path / "new" / "a.csv").read_text(encoding="utf-8").split() == ["a,b", ",1"]
    with pytest.raises(ValueError, match="not in fieldnames"):
        results.write_csv(tmp_path / "b.csv", [{"c": 1}], ("a", "b"))


@pytest.mark.parametrize("module", [prefill, chunked, decode, backward, host, jit])
def test_columns_say_what_and_where_from(module: ModuleType) -> None:
    columns = module.COLUMNS
    assert len(set(columns)) == len(columns)
    assert {"provider", "note", *timing.RATIOS, *results.PROVENANCE} <= set(columns)
    assert any(column.startswith("percent_of_") for column in columns)


@pytest.mark.parametrize("script", ["padded", "accuracy", "contract_choices", "variants"])
def test_columns_of_scripts(load, script: str) -> None:
    columns = load(script).COLUMNS
    assert len(set(columns)) == len(columns)
    assert {"commit", "contract"} <= set(columns)
    assert script == "contract_choices" or set(results.PROVENANCE) <= set(columns)


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    facts = results.provenance()
    assert tuple(facts) == results.PROVENANCE
    assert facts["torch"] == torch.__version__
    assert all(facts.values())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [results.provenance()[name] for name in ("gpu", "torch", "cudnn")] == ["none"] * 3
    monkeypatch.setattr(results, "ROOT", Path("/nowhere"))  # as installed from a wheel
    assert results.commit() == cuattn.__version__
    monkeypatch.setenv("COMMIT", "abc")
    assert results.commit() == "abc"


def test_rows_of_prefill() -> None:
    (problem,) = prefill.problems(["bfloat16"], [(128, 128)], [8192], 16384)[:1]
    assert (problem.mask, problem.batch, problem.heads) == ("causal", 2, 16)
    times = {"cuattn": [1.0, 3.0, 2.0], "flash": [3.0, 3.0, 3.0]}
    rows = rates.rows_of({"figure": "forward"}, times, problem.flop, problem.flop, {"cudnn": "a reason"})
    assert {key for row in rows for key in row} <= set(prefill.COLUMNS)
    ours = rows[0]
    assert (ours["ms"], ours["ms_min"], ours["ms_max"], ours["repeats"]) == ("2.00000", "1.00000", "3.00000", 3)
    assert ours["tflops"] == f"{problem.flop / 2e9:.1f}"  # operations / 2 ms
    assert (ours["percent_of_roof"], ours["ratio_to_flash"], "ratio_to_cudnn" in ours) == ("50.0", "1.500", False)
    assert rows[1]["ratio_to_flash"] == "1.000"
    assert rows[2] == {"figure": "forward", "provider": "cudnn", "note": "a reason"}


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_prefill_refuses_what_is_wrong(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = prefill.Problem("bfloat16", mask, 64, 64, 130, 2, 2)
    sets = [problem.inputs("cpu")]
    assert prefill.attempt(problem, sets, [])[1] is None
    right = cuattn.attention

    def inaccurate(q, k, v, mask):
        return right(q, k, v, mask) * 1.02

    def depends_on_the_batch(q, k, v, mask):
        out = right(q, k, v, mask)
        out.view(torch.int16)[-1, 0, -1, 0] += q.shape[0] - 1
        return out

    monkeypatch.setattr(cuattn, "attention", inaccurate)
    assert "L2 error" in str(prefill.attempt(problem, sets, [])[1])
    monkeypatch.setattr(cuattn, "attention", depends_on_the_batch)
    assert "other bits" in str(prefill.attempt(problem, sets, [])[1])


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices in which the float64 answer is computed do not show; it is what cuattn.reference calls gold."""
    from cuattn.reference.gold import gold_attention

    monkeypatch.setattr(answers, "_SCORES", 1000)
    q, k, v = (torch.randn(2, 3, length, 64).to(torch.float16) for length in (20, 33, 33))
    for mask in ("full", "causal"):
        gold, lse, unfused = answers.gold_and_unfused(q, k, v, mask)
        expected, expected_lse = gold_attention(*(x.double().numpy() for x in (q, k, v)), mask)
        torch.testing.assert_close(gold, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, torch.from_numpy(expected_lse), rtol=1e-12, atol=1e-12)
        assert 1e-5 < answers.relative_error(unfused, gold) < 1e-3


def test_accuracy_on_a_cpu(load) -> None:
    accuracy = load("accuracy")
    problem = next(iter(accuracy.problems(64, 8, 256)))
    rows, reason = accuracy.measure(problem, "cpu")
    assert reason is None
    assert {"cuattn", "unfused"} <= {row["provider"] for row in rows}
    assert {key for row in rows for key in row} <= set(accuracy.COLUMNS)
    assert 1e-3 < float(rows[0]["rel_l2"]) < 3e-3  # bfloat16


def test_changed_kernels(load) -> None:
    """The changes that the benchmarks make fit the kernels of today; one that does not fit is an error."""
    changes_of = load("changes").changed_kernels
    before = os.environ.get(env.KERNEL_DIR)
    changes = [[change] for change in load("sanitize").PLANTS.values()]
    changes += [[*load("contract_choices").STORE_FP32, *load("contract_choices").SUM_ROUNDED]]
    for change in changes:
        with changes_of(change) as folder:
            assert env.kernel_dir() == folder.resolve()
            assert change[0][2] in (folder / change[0][0]).read_text(encoding="utf-8")
    assert os.environ.get(env.KERNEL_DIR) == before
    with pytest.raises(ValueError, match=r"tile\.cuh"), changes_of([("attn/tile.cuh", "no such text", "")]):
        pass


def test_contract_choices_measures_the_kernel(load) -> None:
    """One small cell: before rounding the output is far nearer to float64 than bfloat16 can be."""
    choices = load("contract_choices")
    row = choices.measure(choices.Cell("contract", "bfloat16", 64, 256, "v mean 30"))
    assert set(row) <= set(choices.COLUMNS)
    assert float(row["rel_l2"]) < 3e-4
    assert float(row["max_lse_error"]) < 1e-4


def test_committed_results_have_the_columns_of_today(load) -> None:
    for file in sorted((BENCH / "results").glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            assert tuple(next(csv.reader(lines))) == load(file.stem).COLUMNS, file.name


def test_suite_runs_its_steps(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = load("gpu_suite")
    steps = [
        suite.Step("good", 20, suite.python("-c", "print('a\\nb\\nc\\nd')"), shown=2),
        suite.Step("found", 20, suite.python("-c", f"raise SystemExit({suite.FOUND})"), suite.FOUND),
        suite.Step("silent", 20, suite.python("-c", "pass"), suite.FOUND),
        suite.Step("slow", 6, suite.python("-c", "import time; time.sleep(60)")),
        suite.Step("absent", 20, ("no-such-program",)),
    ]
    lines = suite.run_all(steps, tmp_path, 100)
    assert ["passed" in line for line in lines] == [True, True, False, False, False]
    assert "stopped after 6 s" in lines[3]
    assert (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines() == lines
    assert "\nc\nd\n" in capsys.readouterr().out
    assert "a\nb\nc\nd\n" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "NOT RUN" in suite.run_all(steps[:1], tmp_path, 0)[0]
    assert sum(step.seconds for step in suite.all_steps(tmp_path) if step.group == "suite") < 1800
