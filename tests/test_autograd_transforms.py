"""What torch makes of attention: checkpointed, cast, transformed; and what it is told that it cannot."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import (
    Tensors,
    assert_all_equal,
    assert_trains,
    both,
    causal,
    expected,
    gradients,
    inputs,
    packed,
    upstream,
)

import cuattn
from cuattn import dispatch
from cuattn.testing import BitwiseMismatch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each computation of attention."""
    seen: list[None] = []
    execute = dispatch.execute

    def counted(*args: Any) -> None:
        seen.append(None)
        execute(*args)

    monkeypatch.setattr(dispatch, "execute", counted)
    return seen


# Checkpoints and autocast


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(compiled: bool, use_reentrant: bool, forward_passes: list[None]) -> None:
    qkv = inputs()

    def function(*qkv: Tensor) -> Any:
        return checkpoint(both, *qkv, use_reentrant=use_reentrant)

    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=not use_reentrant)
    results = function(*qkv)
    given = upstream(*results)
    assert len(forward_passes) == 1
    torch.autograd.backward(results, given)
    assert len(forward_passes) == 2
    assert_all_equal([x.grad for x in qkv], expected(qkv, "causal", *given))


def test_selective_checkpointing_knows_the_operator(forward_passes: list[None]) -> None:
    def policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        kept = operator is torch.ops.cuattn.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    assert_trains(lambda *qkv: checkpoint(both, *qkv, use_reentrant=False, context_fn=contexts), inputs())
    assert len(forward_passes) == 1 + 2  # one by the checkpoint, two by what is expected


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_that_of_torchs_own_attention(compiled: bool, given: torch.dtype) -> None:
    qkv = inputs(dtype=given)
    cast = tuple(x.detach().to(torch.bfloat16).requires_grad_() for x in qkv)
    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    with torch.autocast("cpu", torch.bfloat16):
        results = function(*qkv)
        own = torch.nn.functional.scaled_dot_product_attention(*(x[:, :2] for x in qkv))
    assert results[0].dtype == own.dtype == torch.bfloat16
    assert results[1].dtype == torch.float32
    upstream_gradients = upstream(*results)
    wanted = expected(cast, "causal", *upstream_gradients)
    got = gradients(results, qkv, upstream_gradients)
    assert_all_equal(got, [x.to(given) for x in wanted])


def test_autocast_without_gradients_and_of_packed_sequences() -> None:
    qkv, starts = packed()
    plain = tuple(x.detach() for x in qkv)
    with torch.autocast("cpu", torch.float16):
        outs = [cuattn.attention_varlen(*x, *starts) for x in (plain, qkv)]
        (dq,) = gradients(outs[1], qkv[:1], upstream(outs[1]))
    assert_all_equal(outs, [cuattn.attention_varlen(*(x.half() for x in plain), *starts)] * 2)
    assert dq.dtype == torch.float32
    with torch.autocast("cpu", torch.float16, enabled=False):
        assert cuattn.attention_varlen(*plain, *starts).dtype == torch.float32
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"^q: got dtype float64"):
        cuattn.attention_varlen(*(x.double() for x in plain), *starts)


# torch.func


def per_sample(*tensors: Tensor) -> Tensors:
    """Each sequence as a batch of its own, along a new first dimension."""
    return tuple(x.detach()[:, None] for x in tensors)


def loss(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    out, lse = both(q, k, v)
    return (out * dout).sum() + (lse * dlse).sum()


def test_func_grad_and_vjp() -> None:
    qkv = tuple(x.detach() for x in inputs())
    given = upstream(*both(*qkv))
    wanted = expected(qkv, "causal", *given)
    assert_all_equal(torch.func.grad(loss, argnums=(0, 1, 2))(*qkv, *given), wanted)
    results, pull_back = torch.func.vjp(both, *qkv)
    assert_all_equal(results, both(*qkv))
    assert_all_equal(pull_back(given), wanted)


def test_vmap_is_the_batch() -> None:
    qkv = inputs(3)
    given = upstream(*both(*qkv))
    wanted = expected(qkv, "causal", *given)
    mapped = per_sample(*qkv)
    assert_all_equal([x[:, 0] for x in torch.func.vmap(both)(*mapped)], both(*(x.detach() for x in qkv)))
    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*mapped, *per_sample(*given))
    assert_all_equal([x[:, 0] for x in grads], wanted)

    def total(*arrays: Tensor) -> Tensor:
        return torch.func.vmap(loss)(*arrays).sum()

    arrays = (*mapped, *per_sample(*given))
    assert_all_equal([x[:, 0] for x in torch.func.grad(total, argnums=(0, 1, 2))(*arrays)], wanted)
    leaves = tuple(x.requires_grad_() for x in mapped)
    assert_all_equal([x[:, 0] for x in gradients(total(*arrays), leaves, torch.ones(()))], wanted)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert_all_equal([x[:, 0] for x in gradients(compiled(*arrays), leaves, torch.ones(()))], wanted)


@pytest.mark.parametrize("axis", [0, 1, 3, -1])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_over_any_dimension_of_some_arguments(batch: int, axis: int) -> None:
    q, k, v = (x.detach() for x in inputs(batch))
    lengths = torch.tensor([[5] * batch, [0] * batch, [7] * batch], dtype=torch.int32)
    queries = torch.stack([q, -q, 2 * q], axis)
    got = torch.func.vmap(lambda q, k, v, n: both(q, k, v, kv_lengths=n), in_dims=(axis, None, None, 0))(
        queries, k, v, lengths
    )
    calls = [both(x, k, v, kv_lengths=n) for x, n in zip((q, -q, 2 * q), lengths, strict=True)]
    assert_all_equal(got, [torch.stack(parts) for parts in zip(*calls, strict=True)])


def test_vmap_of_vmap_and_of_nothing() -> None:
    qkv = tuple(x.detach() for x in inputs())
    nested = tuple(torch.stack([torch.stack([x, 2 * x, 3 * x]), torch.stack([x, x, -x])]) for x in qkv)
    out, lse = torch.func.vmap(torch.func.vmap(both))(*nested)
    for i in range(2):
        for j in range(3):
            assert_all_equal((out[i, j], lse[i, j]), both(*(x[i, j] for x in nested)))
    out, lse = torch.func.vmap(both)(*(x[0, :0] for x in nested))
    assert (out.shape, lse.shape) == ((0, 2, 4, 5, 24), (0, 2, 4, 5))


def test_jacobians() -> None:
    qkv = tuple(x.detach() for x in inputs())

    def first_rows(q: Tensor) -> Tensor:
        return causal(q, *qkv[1:])[0, 0]

    jacobian = torch.func.jacrev(first_rows)(qkv[0])
    assert jacobian.shape == (5, 24, 2, 4, 5, 16)
    dout = torch.zeros(2, 4, 5, 24)
    dout[0, 0, 3, 2] = 1
    assert_all_equal([jacobian[3, 2]], [expected(qkv, "causal", dout)[0]])
    other = torch.autograd.functional.jacobian(first_rows, qkv[0], vectorize=True)
    assert_all_equal([other], [jacobian])


# What is not there


def double_backward(*qkv: Tensor) -> Any:
    (dq,) = torch.autograd.grad(causal(*qkv).sum(), qkv[0], create_graph=True)
    return dq


def test_double_backward_is_refused() -> None:
    qkv = inputs()
    dq = double_backward(*qkv)
    assert_all_equal([dq], expected(qkv, "causal", torch.ones(2, 4, 5, 24))[:1])
    message = "^cuattn.attention_backward: double backward is not supported, gradients cannot be differentiated again$"
    with pytest.raises(NotImplementedError, match=message):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda q: torch.func.grad(lambda q: causal(q, *qkv[1:]).sum())(q).sum())(qkv[0].detach())
    results = both(*(x.detach() for x in qkv))
    dq, _, _ = cuattn.attention_backward(results[0], *qkv, *results, "causal")
    with pytest.raises(NotImplementedError, match=message):
        dq.sum().backward()
    tokens, starts = packed()
    (dk,) = torch.autograd.grad(cuattn.attention_varlen(*tokens, *starts).sum(), tokens[1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^cuattn.attention_varlen_backward: double backward"):
        dk.sum().backward()


def test_forward_mode_is_refused() -> None:
    qkv = tuple(x.detach() for x in inputs())
    tokens, starts = packed()
    for name, call in (
        ("attention", lambda: torch.func.jvp(both, qkv, qkv)),
        ("attention", lambda: torch.compile(lambda q: torch.func.jvp(both, q, q), backend="eager")(qkv)),
        ("attention", lambda: torch.func.hessian(lambda q: causal(q, *qkv[1:]).sum())(qkv[0])),
        (
            "attention_varlen",
            lambda: torch.func.jvp(lambda q: cuattn.attention_varlen(q, *tokens[1:], *starts), tokens[:1], tokens[:1]),
        ),
    ):
        with pytest.raises(Exception, match=f"cuattn.{name}: forward-mode derivatives are not supported"):
            call()
    with torch.autograd.forward_ad.dual_level():
        assert_all_equal([causal(*qkv)], [causal(*qkv)])
        with pytest.raises(NotImplementedError, match=r"^cuattn.attention: forward-mode"):
            causal(torch.autograd.forward_ad.make_dual(qkv[0], qkv[0]), *qkv[1:])


def test_vmap_of_packed_sequences_is_refused() -> None:
    (q, k, v), starts = packed()
    for recorded in (False, True):
        with (
            torch.set_grad_enabled(recorded),
            pytest.raises(
                NotImplementedError,
                match=r"^cuattn.attention_varlen: torch.func.vmap is not supported, expected sequences",
            ),
        ):
            torch.func.vmap(lambda q: cuattn.attention_varlen(q, k, v, *starts))(torch.stack([q, q]))


@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_refused_as_without_gradients() -> None:
    q, k, v = inputs()
    nested = torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 4, 8)], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jagged = torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 4, 8)], layout=torch.jagged)
    for wrong, message in (
        ((nested, k, v), "q: got a nested tensor, expected a strided torch tensor"),
        ((q, jagged.requires_grad_(), v), "k: got a nested tensor, expected a strided torch tensor"),
        ((q.to_sparse(), k, v), "q: got a tensor of layout torch.sparse_coo, expected a strided torch tensor"),
        ((q, k.detach().numpy(), v), "k: got a numpy array, expected an array of q's library"),
        ((q.double(), k, v), "q: got dtype float64, expected"),
        ((q, k.half(), v), "k: got dtype float16, expected q's float32"),
        ((q, k.mT.contiguous().mT, v), "k: got stride 7 in the last dimension, expected 1"),
        ((q[0], k, v), "q: got shape (4, 5, 16), expected 4 dimensions"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            cuattn.attention(*wrong)
        assert str(caught.value).startswith(message)


def test_what_compares_bits_can_fail() -> None:
    """A control of the tests above."""
    with pytest.raises(BitwiseMismatch):
        assert_trains(lambda *qkv: both(*(x * (1 + 2**-20) for x in qkv)), inputs())
