"""What a repeated call costs its thread, counted in calls of functions, which no other work on the machine changes."""

import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
#: Most calls of Python functions and of others that one repeated call may make, by the bench's name of it.
MOST = {
    "attention": (26, 50),
    "attention, LSE returned": (26, 50),
    "attention, one row, 2 launches": (28, 52),
    "attention_varlen": (26, 56),
    "attention_kvcache, pages": (21, 56),
    "attention_kvcache, append, 2 launches": (26, 70),
    "attention_backward, 4 launches": (31, 80),
}


def counted(call: Callable[[], Any]) -> tuple[int, int]:
    """Calls of Python functions, and of those written in C."""
    events: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        events[event] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return events["call"], events["c_call"]


def test_a_repeated_call_makes_few_calls(load) -> None:
    host_cost = load("host_cost")
    with host_cost.stubbed():
        calls = host_cost.calls_on("cpu")
        assert list(calls) == list(MOST)
        for name, call in calls.items():
            planned = counted(call)
            call()
            repeated = counted(call)
            assert repeated[0] <= MOST[name][0], name
            assert repeated[1] <= MOST[name][1], name
            assert sum(planned) > 3 * sum(repeated), f"{name}: the control, a first call, makes hardly more"


def test_the_bench_runs_without_a_device(tmp_path: Path) -> None:
    file = tmp_path / "host_cost.csv"
    command = [sys.executable, str(BENCH / "host_cost.py"), "--stub", "--batches", "2", "--csv", str(file)]
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    with file.open(encoding="utf-8") as rows:
        table = list(csv.DictReader(rows))
    assert [row["call"] for row in table] == [*MOST, "torch's attention"]
    assert all(0 < float(row["us_min"]) <= float(row["us"]) for row in table)
    assert {(row["device"], row["calls"]) for row in table} == {("stub", "200")}


@pytest.mark.gpu
def test_the_bench_runs_on_a_device(tmp_path: Path) -> None:
    file = tmp_path / "host_cost.csv"
    command = [sys.executable, str(BENCH / "host_cost.py"), "--batches", "2", "--csv", str(file)]
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "us_min" in file.read_text(encoding="utf-8")
