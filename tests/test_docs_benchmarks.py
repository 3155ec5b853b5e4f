"""docs/benchmarks.md names the benchmarks, providers and columns that there are, and its commands are understood."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cuattn.bench import backward, chunked, decode, host, jit, prefill, timing
from cuattn.bench.peers import OWN, PEERS
from cuattn.cli import main
from cuattn.cli.bench import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("cuattn bench")
]


def first_cells(table: str) -> list[str]:
    """The names in the first column of the table that has this heading."""
    rows = PAGE.partition(f"| {table} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]


def test_every_benchmark_is_explained() -> None:
    assert first_cells("benchmark") == list(BENCHMARKS)


def test_every_provider_is_explained() -> None:
    assert sorted(first_cells("name")) == sorted([OWN, *PEERS])


def test_columns_of_results_are_explained() -> None:
    explained = {*first_cells("column"), *timing.RATIOS}
    columns = {name for module in (prefill, chunked, decode, backward, host, jit) for name in module.COLUMNS}
    assert explained <= columns
    of_figures = {name for name in columns if re.search(r"percent_|_per_s$|tflops|note", name)}
    assert of_figures <= explained


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[argparse.Namespace] = []
    for module, _ in BENCHMARKS.values():
        monkeypatch.setattr(module, "run", lambda options: asked.append(options) or 0)
    program, *argv = shlex.split(command)
    assert program == "cuattn"
    assert main(argv) == 0
    assert len(asked) == 1


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3
