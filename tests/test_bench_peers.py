"""The peers of the benchmarks compute the problem that they are asked, or say why not; on a CPU, with stand-ins."""

import sys
from functools import partial, partialmethod
from typing import Any

import documented_flashinfer
import pytest
import torch

import cuattn
from cuattn.bench import answers, chunked, decode, libraries, peers, prefill, timing
from cuattn.compat import flash_attn

#: Those that a CPU has, or a stand-in that has the documented interface.
HERE = ("flash", "math", "flex", "flash_attn", "flashinfer")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without compiling it, flash-attn's functions by cuattn's own, what FlashInfer documents."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(libraries, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flashinfer", documented_flashinfer.module())


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (64, 32)])
def test_prefill(mask: str, head_dim: int, value_dim: int) -> None:
    problem = prefill.Problem("bfloat16", mask, head_dim, value_dim, 70, 2, 2)
    tried, refused = prefill.attempt(problem, [problem.inputs("cpu"), problem.inputs("cpu")], HERE)
    assert refused is None
    cannot = {"flash"} if head_dim != value_dim else set()
    assert set(tried.reasons) == cannot
    assert list(tried.calls) == list(tried.results) == [name for name in HERE if name not in cannot]
    assert all("requires q,k,v to have the same last dimension" in reason for reason in tried.reasons.values())
    assert all(len(calls) == 2 for calls in tried.calls.values())


def test_chunks_are_aligned_bottom_right() -> None:
    chunk = chunked.Chunk(70, 200, heads=4, kv_heads=2)
    tried, refused = chunked.attempt(chunk, [chunk.inputs("cpu")], HERE)
    assert refused is None
    assert tried.reasons == {}
    assert list(tried.results) == list(HERE)


@pytest.mark.parametrize("page_size", [0, 48])
def test_decode(page_size: int) -> None:
    problem = decode.Problem(3, 600, 4, 2, page_size)
    tried, refused = decode.attempt(problem, [problem.inputs("cpu")], HERE)
    assert refused is None
    pages = dict.fromkeys(HERE[:3], "ValueError: block_table: got pages, expected a contiguous cache")
    assert tried.reasons == (pages if page_size else {})
    assert list(tried.results) == [name for name in HERE if name not in tried.reasons]
    assert {tuple(result.shape) for result in tried.results.values()} == {(3, 4, 1, 128)}


def test_what_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    q = torch.randn(1, 1, 16, 64).to(torch.bfloat16)
    tried = peers.attempt(("flash_attn", "flashinfer", "math"), lambda peer: [peer.prepare(q, q, q, "full")])
    assert list(tried.results) == ["math"]
    assert list(tried.reasons) == ["flash_attn", "flashinfer"]
    assert all("flash" in reason for reason in tried.reasons.values())


def test_a_backend_that_this_torch_lacks_is_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a torch without CUDA, where a backend is missing")
    q = torch.randn(1, 1, 16, 64).to(torch.bfloat16)
    tried = peers.attempt(("cudnn", "math"), lambda peer: [peer.prepare(q, q, q, "full")])
    assert list(tried.results) == ["math"]
    assert tried.reasons["cudnn"].startswith("RuntimeError: ")


def test_flashinfer_has_no_gradients() -> None:
    q = torch.randn(1, 1, 16, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradients"):
        libraries.flashinfer(q, q, q, "full")


def other_mask(q: Any, k: Any, v: Any, mask: str) -> Any:
    return peers.sdpa(q, k, v, "full" if mask == "causal" else "causal")


def not_a_number(q: Any, k: Any, v: Any, mask: str) -> Any:
    return lambda: peers.sdpa(q, k, v, mask)() * torch.nan


@pytest.mark.parametrize("wrong", [other_mask, not_a_number])
def test_a_wrong_result_is_not_timed(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is no excuse for cuattn's own error."""
    monkeypatch.setitem(peers.PEERS, "math", peers.Peer(wrong, libraries.over_cache(wrong)))
    problem = prefill.Problem("bfloat16", "causal", 64, 64, 130, 2, 2)
    tried, refused = prefill.attempt(problem, [problem.inputs("cpu")], ("math", "flash"))
    assert refused is None
    assert list(tried.calls) == list(tried.results) == ["flash"]
    assert tried.reasons["math"].startswith("wrong: relative L2 error")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_right_results_are_not_called_wrong(dtype: str) -> None:
    problem = prefill.Problem(dtype, "causal", 64, 64, 130, 2, 2)
    inputs = problem.inputs("cpu")
    gold, _, unfused = answers.gold_and_unfused(*inputs, problem.mask)
    assert answers.why_wrong({"math": peers.PEERS["math"].attention(*inputs, problem.mask)}, gold, unfused) == {}


def test_settings_end() -> None:
    import torch._dynamo

    before = torch._dynamo.config.recompile_limit
    with peers.setting_of("flex"):
        assert torch._dynamo.config.recompile_limit > 1000
    assert torch._dynamo.config.recompile_limit == before
    with peers.setting_of("cuattn"):
        pass


@pytest.mark.parametrize(
    ("module", "problem", "effort"),
    [
        (prefill, prefill.Problem("bfloat16", "causal", 64, 64, 70, 2, 2), (2, 3)),
        (chunked, chunked.Chunk(70, 200, heads=4, kv_heads=2), (3,)),
        (decode, decode.Problem(3, 600, 4, 2), ((4,), 3)),
    ],
)
def test_what_is_timed_computes_the_problem(
    module: Any, problem: Any, effort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each provider, for each set of inputs in turn."""
    computed: dict[str, list[Any]] = {}

    def in_turns(providers: Any, repeats: int) -> Any:
        computed.update({name: [call() for _ in range(2)] for name, call in providers.items()})
        return {name: [2.0] * repeats for name in providers}

    def graphs(providers: Any, repeats: int) -> Any:
        computed.update({name: [call() for call in calls] for name, calls in providers.items()})
        return {name: [2.0] * repeats for name in providers}, {}

    on_cpu = partialmethod(type(problem).inputs, "cpu")
    monkeypatch.setattr(type(problem), "inputs", on_cpu)
    monkeypatch.setattr(timing, "COLD_BYTES", 4e6)
    monkeypatch.setattr(timing, "time_in_turns", in_turns)
    monkeypatch.setattr(timing, "time_graphs", graphs)
    monkeypatch.setattr(prefill, "prepared_launches", lambda *arguments: partial(cuattn.attention, *arguments))
    times, reasons = module.measure(problem, [*HERE, "cudnn"], *effort)
    own = {prefill: {"cuattn launch"}, chunked: set(), decode: {"cuattn 4 splits"}}[module]
    assert set(times) == set(computed) == {"cuattn", *own, *HERE}
    assert set(reasons) == {"cudnn"}
    for name, results in computed.items():
        assert len(results) == len(computed["cuattn"]) > 1
        for result, expected in zip(results, computed["cuattn"], strict=True):
            heads_first = result if result.shape == expected.shape else result.transpose(1, 2)
            torch.testing.assert_close(heads_first, expected, rtol=0.05, atol=0.02, msg=name)
        assert not torch.equal(results[0], results[1])
