"""Comparisons of variants of a kernel, as far as they go without a GPU."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cuattn import env
from cuattn.bench import timing
from cuattn.bench.prefill import Problem
from cuattn.config import attention_configs, hopper
from cuattn.jit import cubin_path


@pytest.fixture
def variants(load: Any) -> ModuleType:
    return load("variants")


@dataclass(frozen=True)
class Here(Problem):
    def inputs(self, device: str = "cpu") -> Any:
        return super().inputs("cpu")


PROBLEM = Here("bfloat16", "full", 64, 64, 32, 1, 2)


@dataclass(frozen=True)
class Made:
    """A variant whose output is a number everywhere."""

    out: float
    code: bytes

    def prepared(self, inputs: Any, mask: str) -> Any:
        return lambda: torch.full_like(inputs[0], self.out), (self.code,)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that were timed; the first takes 3 ms, the next ones 2."""
    timed: list[dict[str, Any]] = []

    def in_turns(calls: dict[str, Any], repeats: int) -> dict[str, list[float]]:
        timed.append(calls)
        return {name: [2.0 + (i == 0)] * repeats for i, name in enumerate(calls)}

    monkeypatch.setattr(timing, "time_in_turns", in_turns)
    return timed


def test_rates_and_ratios(variants: ModuleType, times: list[Any]) -> None:
    rows = variants.compare(PROBLEM, {variants.AS_IT_IS: Made(1.0, b"a"), "other": Made(1.0, b"b")}, 5, 2)
    assert [(row["variant"], row["ratio"], row["repeats"]) for row in rows] == [
        ("as it is", "1.0000", 5),
        ("other", "1.5000", 5),
    ]
    assert rows[1]["tflops"] == f"{PROBLEM.flop / 2e-3 / 1e12:.1f}"
    assert set(rows[0]) <= set(variants.COLUMNS)
    assert list(times[0]) == ["as it is", "other"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [(Made(2.0, b"b"), "other has other bits"), (Made(1.0, b"a"), "other has the code of as it is")],
)
def test_what_cannot_be_compared(variants: ModuleType, times: list[Any], other: Made, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        variants.compare(PROBLEM, {variants.AS_IT_IS: Made(1.0, b"a"), "other": other}, 5, 1)
    assert times == []


def test_what_a_variant_puts_in_use(variants: ModuleType, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.KERNEL_DIR)
    before = env.kernel_dir()
    name, variant = variants.named(f"mine={sources}")
    assert name == "mine"
    with variant.in_use():
        assert env.kernel_dir() == sources.resolve()
    with variants.Variant(boxes=True).in_use():
        assert env.kernel_dir() == before
        boxed, *_ = (x for x in attention_configs(64, "full", "bfloat16", "sm_90a") if "boxes" in x.name)
    assert not hopper.STORES_BOXES
    assert env.KERNEL_DIR not in os.environ
    assert cubin_path(boxed).is_file()


def test_a_folder_without_kernels(variants: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (f"mine={tmp_path}", "mine"):
        with pytest.raises(variants.argparse.ArgumentTypeError, match="expected NAME=FOLDER, a folder of kernels"):
            variants.named(text)
