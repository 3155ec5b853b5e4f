"""The example: it trains, its comparison of bits holds for cuattn, and it refuses a run in which something fails."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_varlen_gpu import torch_library

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ("--device", "cpu", "--sequence-length", "16", "--steps")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tests beside it have the other cores
    yield importlib.import_module("train_bytes")
    torch.set_num_threads(threads)


def test_on_a_cpu(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main([*SMALL, "12"])
    printed = capsys.readouterr().out
    assert "the loss falls" in printed
    assert "80 of 80 arrays" in printed  # out, LSE, dq, dk, dv of 8 sequences in 2 layers
    assert "sequence 4, dk: 1 of 1024 elements differ" in printed
    assert "batch-dependent attention is found: 64 of 64 arrays" in printed


def test_refusals(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="the loss falls"):
        example.main([*SMALL, "1"])

    def batch_dependent(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return example.batch_dependent(*qkv)[0], torch.zeros(len(qkv[0]))

    monkeypatch.setattr(example, "batch_invariant", batch_dependent)
    with pytest.raises(AssertionError, match="16 of 80 arrays of single sequences"):  # the LSE
        example.main([*SMALL, "12"])
    monkeypatch.setattr(example, "batch_dependent", example.torch_sdpa)
    monkeypatch.setattr(example, "compare", lambda *_: (80, []))
    with pytest.raises(AssertionError, match="one changed bit is found: nothing"):
        example.main([*SMALL, "12"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu(example: Any, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = torch_library().device
    example.main(["--device", device, "--dtype", dtype, "--sequence-length", "300", "--steps", "60"])
    assert "80 of 80 arrays" in capsys.readouterr().out
