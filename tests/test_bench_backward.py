"""What the benchmark of gradients measures is right: it accepts cuattn's gradients and memory, and refuses others."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import cuattn
from cuattn.bench import answers, backward, peers, rates, results
from cuattn.cli import main
from cuattn.reference import gold_gradients


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_gold_gradients(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of cuattn.reference, in slices too; what is rounded shows, and is no more than a dtype's rounding."""
    monkeypatch.setattr(answers, "_SCORES", 1000)
    torch.manual_seed(0)
    dout, q, k, v = (torch.randn(2, 3, 33, columns).bfloat16() for columns in (32, 64, 64, 32))
    gold, unfused = answers.gold_and_unfused_gradients(dout, q, k, v, mask)
    expected = gold_gradients(*(x.double().numpy() for x in (dout, q, k, v)), mask)
    for ours, theirs, rounded in zip(gold, expected, unfused, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=1e-12)
        assert rounded.dtype == torch.bfloat16
        assert 1e-3 < answers.relative_error(rounded, ours) < 1e-2


@pytest.mark.parametrize(("dtype", "mask"), [("bfloat16", "causal"), ("float16", "full"), ("float32", "causal")])
def test_backward(dtype: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given = backward.Given.make(backward.Problem(dtype, mask, 64, 64, 70, 2, 2), "cpu")
    unit = {"math": tuple(x[backward.CHECKED] for x in given.both(peers.PEERS["math"].attention))}
    assert backward.why_refused(given, unit) is None
    size = float(given.backward()()[1].float().square().mean()) ** 0.5
    too_much = (200 if dtype == "float32" else 30) * torch.finfo(given.q.dtype).eps * size  # too little for the norm
    right, attention, runs = cuattn.attention_backward, cuattn.attention, itertools.count()

    def changed(change: Any) -> Any:
        def gradients(*args: Any, **options: Any) -> Any:
            dq, dk, dv = right(*args, **options)
            return dq, change(dk, args), dv

        return gradients

    def one_wrong_element(dk: torch.Tensor, args: Any) -> torch.Tensor:
        dk[-1, 0, 9, 9] += too_much
        return dk

    def one_bit(tensor: torch.Tensor, wrong: int) -> torch.Tensor:
        tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])[0, 0, -1, -1] ^= wrong
        return tensor

    for wrong, reason in (
        (lambda dk, args: one_bit(dk, next(runs) & 1), "dk: other bits for the whole problem again"),
        (lambda dk, args: one_bit(dk, args[1].shape[0] & 1), "dk: other bits for the last sequence"),
        (lambda dk, args: one_bit(dk, args[1].shape[1] & 1), "dk: other bits for the first head"),
    ):
        monkeypatch.setattr(cuattn, "attention_backward", changed(wrong))
        monkeypatch.setattr(cuattn, "attention", autograd_by_hand(attention))
        assert reason in str(backward.why_refused(given, {}))
    monkeypatch.setattr(cuattn, "attention_backward", changed(lambda dk, args: 1.02 * dk))
    assert "dk: relative L2 error" in str(backward.why_refused(given, unit))
    monkeypatch.setattr(cuattn, "attention_backward", changed(lambda dk, args: dk * torch.nan))
    assert "dk: relative L2 error nan" in str(backward.why_refused(given, unit))
    monkeypatch.setattr(cuattn, "attention_backward", changed(one_wrong_element))
    assert "dk: an element's error" in str(backward.why_refused(given, unit))
    monkeypatch.setattr(cuattn, "attention_backward", right)
    monkeypatch.setattr(cuattn, "attention", autograd_by_hand(attention, wrong=1))
    assert "dq: other bits for autograd" in str(backward.why_refused(given, unit))


def autograd_by_hand(attention: Any, wrong: int = 0) -> Any:
    """`cuattn.attention` whose gradients are those of what `cuattn.attention_backward` is at the time."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, mask: str) -> Any:
            out, lse = attention(q.detach(), k.detach(), v.detach(), mask, return_lse=True)
            ctx.mask = mask
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            dq, dk, dv = cuattn.attention_backward(dout, *ctx.saved_tensors, ctx.mask)
            dq[0, 0, 0, 0] += wrong
            return dq, dk, dv, None

    def call(q: Any, k: Any, v: Any, mask: str, return_lse: bool = False) -> Any:
        return attention(q, k, v, mask, return_lse=True) if return_lse else Attention.apply(q, k, v, mask)

    return call


def test_backward_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure of each provider that there is; each of them computes the gradients of each set of inputs."""
    torch.manual_seed(0)
    problem = backward.Problem("bfloat16", "causal", 64, 64, 40, 2, 2)
    names = ["flash", "flash_deterministic", "flashinfer"]
    computed_by: list[dict[str, Any]] = []

    def in_turns(providers: Any, repeats: int) -> Any:
        computed_by.append({name: [call() for _ in range(2)] for name, call in providers.items()})
        return {name: [2.0] * repeats for name in providers}

    monkeypatch.setattr(backward.timing, "time_in_turns", in_turns)
    measured = backward.measure(problem, names, 2, 3, "cpu")
    assert list(measured) == list(backward.WORK)
    for computed, (figure, (samples, reasons)) in zip(computed_by, measured.items(), strict=True):
        assert list(samples) == ["cuattn", "flash", "flash_deterministic"]
        assert list(reasons) == ["flashinfer"]
        for name, sets in computed.items():
            for gradients, expected in zip(sets, computed["cuattn"], strict=True):
                for ours, theirs in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02, msg=f"{figure} {name}")
            assert not torch.equal(sets[0][0], sets[1][0])
        rows = rates.rows_of({"figure": figure}, samples, backward.WORK[figure] * problem.flop, 1e9, reasons)
        assert {key for row in rows for key in row} <= set(backward.COLUMNS)
        assert rows[0]["tflops"] == f"{backward.WORK[figure] * problem.flop / 2e9:.1f}"
        assert rows[0]["ratio_to_flash_deterministic"] == "1.000"
    monkeypatch.setattr(backward, "why_refused", lambda given, others: "a reason")
    assert backward.measure(problem, names, 1, 1, "cpu") == "a reason"
    assert len(computed_by) == 2  # nothing more was timed


def test_wrong_gradients_of_a_peer_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = backward.Given.make(backward.Problem("bfloat16", "causal", 64, 64, 40, 2, 2), "cpu")
    other = peers.Peer(lambda q, k, v, mask: peers.sdpa(q, k, v, "full"), peers.sdpa)
    monkeypatch.setitem(peers.PEERS, "math", other)
    for figure in backward.WORK:
        tried = backward.attempt(figure, [given], ["math", "flash"])
        assert list(tried.calls) == list(tried.results) == ["flash"]
        assert tried.reasons["math"].startswith("dq: wrong: relative L2 error")


@pytest.mark.parametrize("memory", [False, True])
def test_backward_tells_and_stores(
    memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(problem: Any, names: Any, sets: int, repeats: int) -> Any:
        if (problem.mask, problem.length) == ("full", 1024):
            return "a reason"
        return {figure: ({"cuattn": [4.0], "flash": [2.0]}, {"flex": "not here"}) for figure in backward.WORK}

    monkeypatch.setattr(backward, "begin", lambda options, columns: results.Results(options.csv, columns))
    monkeypatch.setattr(backward, "measure", measure)
    monkeypatch.setattr(rates, "measure_roof", lambda repeats: {"matmul": [1.0]})
    bound_on_full = {"causal": (1, 4), "full": (1, 5)}

    def measure_memory(dtype: str, mask: str, names: Any) -> Any:
        peak = iter(bound_on_full[mask])
        return measured_memory(dtype, mask, (), peak=lambda attention, problem: next(peak))

    measured_memory = backward.measure_memory
    monkeypatch.setattr(backward, "measure_memory", measure_memory)
    file = tmp_path / "rows.csv"
    chosen = ["--memory"] if memory else ["--head-dim", "64", "--length", "512", "1024", "--tokens", "1024"]
    assert main(["bench", "backward", "--providers", "flash", "flex", "--csv", str(file), *chosen]) == 1
    printed = capsys.readouterr().out
    assert printed.count("REFUSED") == 1
    rows = file.read_text(encoding="utf-8").splitlines()
    if memory:
        assert "bfloat16 full REFUSED: 5 bytes at 65536 tokens, allowed 4" in printed
        assert len(rows) == 1 + 4
    else:
        # the roof, twice; 3 problems and the first again, 2 figures, 3 providers
        assert len(rows) == 1 + 2 + 4 * 2 * 3
        assert sum("not here" in row for row in rows) == 4 * 2
        assert "flex              not measured: not here" in printed
        assert "forward+backward, TFLOP/s by length: cuattn / flash / flex" in printed
        work = 2.5 * backward.Problem("bfloat16", "causal", 64, 64, 512, 2, 32).flop
        shown = " / ".join([*(f"{work / ms / 1e9:.0f}" for ms in (4, 2)), "-"])
        assert f"causal 512: {shown} " in printed


def test_deterministic_flash() -> None:
    with peers.setting_of("flash_deterministic"):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_memory_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = peers.PEERS["flash"].attention
    kinds = {cuattn.attention: lambda n: 1e6 + 5000 * n, flash: lambda n: 8 * n**2}

    def peak(attention: Any, problem: Any) -> int:
        return int(kinds[attention](problem.length))

    rows, reason = backward.measure_memory("bfloat16", "causal", ["flash", "flashinfer"], peak=peak)
    assert reason is None
    assert {key for row in rows for key in row} <= set(backward.COLUMNS)
    ours = [row for row in rows if row["provider"] == "cuattn"]
    assert [(row["length"], row["peak_bytes"]) for row in ours] == [(16384, 82920000), (65536, 328680000)]
    assert (ours[0]["bytes_per_token"], ours[0]["ratio_to_flash"]) == ("5061.0", f"{8 * 16384**2 / 82920000:.3f}")
    assert [row["provider"] for row in rows if "note" in row] == ["flashinfer"] * 2
    kinds[cuattn.attention] = lambda n: 5000 * n + n**2 // 64
    assert "bytes at 65536 tokens, allowed" in str(backward.measure_memory("bfloat16", "causal", [], peak=peak)[1])

    held = {"now": 1000, "most": 0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    make = backward.Given.make
    monkeypatch.setattr(backward.Given, "make", lambda problem: make(problem, "cpu"))

    def holding(*qkv: Any) -> Any:
        held["most"] += 7
        return flash(*qkv)

    assert backward.peak_of(holding, backward.Problem("bfloat16", "causal", 64, 64, 16, 1, 1)) == 7
