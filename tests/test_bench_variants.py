"""Comparisons of variants of a kernel, as far as they go without a GPU."""

import shutil
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from changed import change

from cuattn import env, launch
from cuattn.bench import timing
from cuattn.bench.prefill import Problem
from cuattn.tensor_map import encode_emulated


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
    """A variant whose output and LSE are a number everywhere; or whose results change with the inputs' number."""

    out: float
    code: bytes
    lse: float = 0.0
    drift: float = 0.0
    seen: list[Any] = field(default_factory=list)

    def prepared(self, inputs: Any, mask: str, lse: bool) -> Any:
        out = torch.full_like(inputs[0], self.out + self.drift * len(self.seen))
        self.seen.append(inputs)
        return lambda: (out, torch.full((3,), self.lse) if lse else None), (self.code,)


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
    [
        (Made(2.0, b"b"), "other has other bits"),
        (Made(1.0, b"b", lse=1.0), "other has other bits"),
        (Made(1.0, b"b", drift=1.0), "other has other bits"),  # in the second set of inputs
        (Made(1.0, b"a"), "other has the code of as it is"),
    ],
)
def test_what_cannot_be_compared(variants: ModuleType, times: list[Any], other: Made, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        variants.compare(PROBLEM, {variants.AS_IT_IS: Made(1.0, b"a"), "other": other}, 5, 2, lse=True)
    assert times == []


class Loaded(NamedTuple):
    """A kernel that notes where it comes from, and each launch."""

    config: Any
    folder: Path
    launches: list[Any]

    def ready(self, grid: int, words: Any, stream: int, cluster: int) -> Any:
        return SimpleNamespace(launch=lambda: self.launches.append((self.config, self.folder, grid, stream)))


def test_a_prepared_variant(variants: ModuleType, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches kernels of its sources, with its arguments, whatever is in use by then."""
    monkeypatch.delenv(env.KERNEL_DIR)
    change(sources / "forward_sm90.cuh", "KeyBoxes::prepare(params);", ";")
    q = torch.zeros(1, 2, 150, 64, dtype=torch.bfloat16)
    launches: list[Any] = []
    monkeypatch.setattr(variants, "load_anew", lambda config: Loaded(config, env.kernel_dir(), launches))
    monkeypatch.setattr(variants, "encode", encode_emulated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(launch, "device_architecture", lambda index: "sm_90a")
    monkeypatch.setattr(launch, "processor_count", lambda index: 2)
    ones = variants.chosen([variants.named(f"mine={sources}")])
    prepared = {name: one.prepared((q, q, q), "full", lse=False) for name, one in ones.items()}
    assert list(prepared) == ["as it is", "mine"]
    assert len({code for _, code in prepared.values()}) == 2
    for call, _ in prepared.values():
        out, lse = call()
        assert (out.shape, lse) == (q.shape, None)
    assert [folder for _, folder, *_ in launches] == [env.kernel_dir(), sources.resolve()]
    assert {stream for *_, stream in launches} == {7}


def test_variants_that_are_none(variants: ModuleType, sources: Path, tmp_path: Path) -> None:
    for text in (f"mine={tmp_path}", "mine"):
        with pytest.raises(ArgumentTypeError, match="expected NAME=FOLDER, a folder of kernels"):
            variants.named(text)
    one = variants.named(f"mine={sources}")
    for ones in ([one, one], [("as it is", one[1])]):
        with pytest.raises(ValueError, match="expected each once"):
            variants.chosen(ones)
    other = tmp_path / "other"
    shutil.copytree(sources, other)
    change(other / "attn/params.cuh", "int group_shift;", "i64 group_shift;")
    with pytest.raises(ArgumentTypeError, match=r"whose attn/params\.cuh is another one: its kernels take other arg"):
        variants.named(f"mine={other}")
