"""What a repeated call costs its thread, counted in calls of functions, which no other work on the machine changes."""

import csv
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cuattn.bench import host
from cuattn.cli import main

#: Most calls of Python functions and of others that one repeated call may make, by the bench's name of it.
MOST = {
    "attention": (20, 34),
    "attention, LSE returned": (20, 38),
    "attention, one row": (22, 37),
    "attention_varlen": (20, 40),
    "attention_kvcache, pages": (15, 34),
    "attention_kvcache, append, 2 launches": (19, 44),
    "attention_backward, 4 launches": (25, 57),
}


#: Of which the fewest calls count: a result may have to lie elsewhere than the one before.
REPETITIONS = 100


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


def test_a_repeated_call_makes_few_calls() -> None:
    with host.stubbed():
        calls = host.calls_on("cpu")
        assert list(calls) == list(MOST)
        for name, call in calls.items():
            planned = counted(call)
            repeated = min(counted(call) for _ in range(REPETITIONS))
            assert repeated[0] <= MOST[name][0], name
            assert repeated[1] <= MOST[name][1], name
            assert sum(planned) > 3 * sum(repeated), f"{name}: the control, a first call, makes hardly more"


def table_of(*options: str, to: Path) -> list[dict[str, str]]:
    """What ``cuattn bench host`` writes."""
    assert main(["bench", "host", "--batches", "2", "--csv", str(to), *options]) == 0
    with to.open(encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def test_the_bench_runs_without_a_device(tmp_path: Path) -> None:
    table = table_of("--stub", "--providers", "math", "flash_attn", to=tmp_path / "host.csv")
    measured = [row for row in table if not row["note"]]
    own = [row for row in measured if row["provider"] == "cuattn"]
    assert [row["call"] for row in own] == list(MOST)
    assert [(row["call"], row["provider"]) for row in measured if row not in own] == [
        ("roof", "torch"),
        ("attention", "math"),
    ]
    assert all(0 < float(row["us_min"]) <= float(row["us"]) for row in measured)
    assert {(row["device"], row["calls"]) for row in measured} == {("stub", "200")}
    assert all(float(row["percent_of_roof"]) > 0 and float(row["calls_per_s"]) > 0 for row in measured)
    assert [row["call"] for row in measured if row["ratio_to_math"]] == ["attention", "attention"]
    (missing,) = (row for row in table if row["note"])
    assert missing["provider"] == "flash_attn"
    assert "flash_attn" in missing["note"]


@pytest.mark.gpu
def test_the_bench_runs_on_a_device(tmp_path: Path) -> None:
    assert {row["device"] for row in table_of("--providers", "math", to=tmp_path / "host.csv")} != {"stub"}
