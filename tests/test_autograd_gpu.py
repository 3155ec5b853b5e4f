"""Training on a CUDA device: gradients, compiled, cast, on other streams, and a whole step in a CUDA graph."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from training import (
    DTYPES,
    Tensors,
    assert_all_equal,
    assert_trains,
    both,
    both_masks,
    expected,
    expected_packed,
    gradients,
    inputs,
    packed,
    upstream,
)

import cuattn
from cuattn.testing import BitwiseMismatch

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: this one is {torch.__version__}")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_device(dtype: torch.dtype = torch.bfloat16, batch: int = 3, len_q: int = 70, len_k: int = 133) -> Tensors:
    return inputs(batch, len_q, len_k, head_dim=64, dtype=dtype, device="cuda")


@every_dtype
@pytest.mark.parametrize("mask", both_masks)
def test_gradients_are_those_of_attention_backward(mask: str, dtype: torch.dtype) -> None:
    qkv = on_device(dtype)
    results = cuattn.attention(*qkv, mask, return_lse=True)
    given = upstream(*results)
    assert_all_equal(gradients(results, qkv, given), expected(qkv, mask, *given))
    expanded = torch.ones((), dtype=dtype, device="cuda").expand(results[0].shape)
    got = gradients(cuattn.attention(*qkv, mask), qkv, expanded)
    assert_all_equal(got, expected(qkv, mask, expanded.contiguous()))


@every_dtype
def test_packed_sequences(dtype: torch.dtype) -> None:
    qkv, starts = packed(((70, 133), (0, 2), (1, 40)), dtype=dtype, device="cuda")
    results = cuattn.attention_varlen(*qkv, *starts, "causal", return_lse=True)
    given = upstream(*results)
    assert_all_equal(gradients(results, qkv, given), expected_packed(qkv, starts, "causal", *given))


@every_dtype
def test_a_sequences_gradients_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    qkv = on_device(dtype)
    results = both(*qkv)
    given = upstream(*results)
    together = gradients(results, qkv, given)
    alone = tuple(x[1:2].detach().requires_grad_() for x in qkv)
    got = gradients(both(*alone), alone, tuple(x[1:2] for x in given))
    assert_all_equal(got, [x[1:2] for x in together])
    with pytest.raises(BitwiseMismatch):
        assert_all_equal(got, [x[:1] for x in together])


@every_dtype
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_functions_have_the_same_bits(mode: str, dtype: torch.dtype) -> None:
    def function(*qkv: Tensor) -> Tensors:
        return both(*qkv)

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(3):  # a CUDA graph is recorded in the second call
        torch.compiler.cudagraph_mark_step_begin()
        assert_trains(lambda *qkv: tuple(x.clone() for x in compiled(*qkv)), on_device(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_that_of_torchs_own_attention(compiled: bool, dtype: torch.dtype) -> None:
    qkv = on_device(torch.float32)
    cast = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
    with torch.autocast("cuda", dtype):
        results = (torch.compile(both, fullgraph=True) if compiled else both)(*qkv)
        own = torch.nn.functional.scaled_dot_product_attention(*(x[:, :2] for x in qkv))
    assert (results[0].dtype, results[1].dtype) == (own.dtype, torch.float32) == (dtype, torch.float32)
    given = upstream(*results)
    assert_all_equal(gradients(results, qkv, given), [x.float() for x in expected(cast, "causal", *given)])


def test_another_stream() -> None:
    qkv = on_device()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = both(*qkv)
        given = upstream(*results)
        got = gradients(results, qkv, given)
    torch.cuda.current_stream().wait_stream(stream)
    assert_all_equal(got, expected(qkv, "causal", *given))


def training(attention: Callable[..., Tensors], qkv: Tensors) -> Callable[[], Tensors]:
    """A function that makes a step: it changes q, k and v and gives their gradients."""
    with torch.no_grad():
        weights = [x.float() for x in upstream(*attention(*qkv))]

    def step() -> Tensors:
        loss = sum((x.float() * weight).sum() for x, weight in zip(attention(*qkv), weights, strict=True))
        found = torch.autograd.grad(loss, qkv)
        with torch.no_grad():
            for x, gradient in zip(qkv, found, strict=True):
                x.sub_(gradient, alpha=0.125)
        return found

    return step


@every_dtype
@pytest.mark.parametrize("packs", [False, True])
def test_a_training_step_in_a_cuda_graph(packs: bool, dtype: torch.dtype) -> None:
    tokens, starts = packed(((70, 133), (0, 2), (1, 40)), dtype=dtype, device="cuda")

    def varlen(*qkv: Tensor) -> Tensors:
        return cuattn.attention_varlen(*qkv, *starts, "causal", return_lse=True)

    leaves, attention = (tokens, varlen) if packs else (on_device(dtype), both)
    eager, captured, spare = (tuple(x.detach().clone().requires_grad_() for x in leaves) for _ in range(3))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up = training(attention, spare)
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    ordinary, recorded = training(attention, eager), training(attention, captured)
    with torch.cuda.graph(graph):
        found = recorded()
    assert_all_equal(captured, leaves)
    seen = []
    for _ in range(2):
        wanted = ordinary()
        graph.replay()
        assert_all_equal(found, wanted)
        assert_all_equal(captured, eager)
        seen.append([x.detach().clone() for x in captured])
    with pytest.raises(BitwiseMismatch):
        assert_all_equal(*seen)
