"""torch's autograd: gradients flow through attention, with the bits of `cuattn.attention_backward`."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from training import (
    DTYPES,
    Tensors,
    assert_all_equal,
    both_masks,
    expected,
    expected_packed,
    gradients,
    inputs,
    normal,
    packed,
    upstream,
)

import cuattn
from cuattn import autograd, backend, dispatch
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3},
    "num_splits": {"num_splits": 3},
    "kv_lengths": {"kv_lengths": torch.tensor([4, 0], dtype=torch.int32)},
    "key_padding_mask": {"key_padding_mask": torch.arange(14).reshape(2, 7) % 3 > 0},
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
masks = pytest.mark.parametrize("mask", both_masks)


def without_splits(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "num_splits"}


# Bits


@masks
@every_dtype
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_attention_backward(
    options: dict[str, Any], layout: str, dtype: torch.dtype, mask: str
) -> None:
    qkv = inputs(dtype=dtype, layout=layout)
    results = cuattn.attention(*qkv, mask, return_lse=True, layout=layout, **options)
    with torch.no_grad():
        assert_all_equal(results, cuattn.attention(*qkv, mask, return_lse=True, layout=layout, **options))
    given = upstream(*results)
    wanted = expected(qkv, mask, *given, layout=layout, **without_splits(options))
    assert_all_equal(gradients(results, qkv, given), wanted)


@masks
@every_dtype
def test_packed_sequences(dtype: torch.dtype, mask: str) -> None:
    qkv, starts = packed(dtype=dtype)
    results = cuattn.attention_varlen(*qkv, *starts, mask, return_lse=True, num_splits=2)
    given = upstream(*results)
    assert_all_equal(gradients(results, qkv, given), expected_packed(qkv, starts, mask, *given))


def test_a_loss_of_one_result_alone() -> None:
    qkv = inputs()
    dout, dlse = upstream(*cuattn.attention(*qkv, "causal", return_lse=True))
    of_out = gradients(cuattn.attention(*qkv, "causal"), qkv, dout)
    assert_all_equal(gradients(cuattn.attention(*qkv, "causal", return_lse=True)[0], qkv, dout), of_out)
    assert_all_equal(of_out, expected(qkv, "causal", dout, torch.zeros_like(dlse)))
    of_lse = gradients(cuattn.attention(*qkv, "causal", return_lse=True)[1], qkv, dlse)
    assert_all_equal(of_lse, expected(qkv, "causal", torch.zeros_like(dout), dlse))
    with pytest.raises(BitwiseMismatch):
        assert_all_equal(of_out, expected(qkv, "causal", dout, dlse))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_alone(needed: tuple[int, ...]) -> None:
    qkv = inputs()
    some = tuple(x if i in needed else x.detach() for i, x in enumerate(qkv))
    out = cuattn.attention(*some)
    dout = upstream(out)[0]
    wanted = expected(qkv, "full", dout)
    assert_all_equal(gradients(out, tuple(some[i] for i in needed), dout), [wanted[i] for i in needed])


def test_one_tensor_for_all_three() -> None:
    x = normal(1, 2, 6, 16).requires_grad_()
    out = cuattn.attention(x, x, x)
    (dx,) = gradients(out, (x,), upstream(out))
    torch.testing.assert_close(dx, sum(expected((x, x, x), "full", *upstream(out))), rtol=1e-6, atol=1e-6)


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: torch.stack([x, x], 4)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "rows": lambda x: torch.cat([x, x[..., :1]], 3)[..., :-1],
    "readable": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("form", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradients_of_any_form(form: Callable[[Tensor], Tensor]) -> None:
    qkv = inputs()
    out, lse = cuattn.attention(*qkv, return_lse=True)
    dout, dlse = upstream(out, lse)
    given = form(dout), dlse.mT.contiguous().mT
    wanted = expected(qkv, "full", given[0].clone(memory_format=torch.contiguous_format), dlse)
    assert_all_equal(gradients((out, lse), qkv, given), wanted)


def small() -> Tensors:
    shapes = (1, 2, 3, 8), (1, 1, 4, 8), (1, 1, 4, 8)
    return tuple(normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))


def assert_gradients_are_right(function: Callable[..., Any], qkv: Tensors) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input #. requires gradient and is not a double precision")
        assert torch.autograd.gradcheck(function, qkv, eps=1e-2, atol=2e-3, rtol=1e-2, check_batched_grad=True)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        ("full", {}),
        ("causal", {"scale": -0.4}),
        ("full", {"kv_lengths": torch.tensor([3], dtype=torch.int32)}),
        ("full", {"key_padding_mask": torch.tensor([[True, False, True, True]])}),
    ],
)
def test_gradcheck(mask: str, options: dict[str, Any]) -> None:
    assert_gradients_are_right(lambda *qkv: cuattn.attention(*qkv, mask, return_lse=True, **options), small())


def test_gradcheck_of_packed_sequences() -> None:
    starts = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    qkv = tuple(x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in small())
    assert_gradients_are_right(lambda *qkv: cuattn.attention_varlen(*qkv, *starts, "causal", return_lse=True), qkv)


def test_gradcheck_finds_a_wrong_gradient() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cuattn.attention(q, k.detach() + 0 * k, v)

    with pytest.raises(GradcheckError):
        assert_gradients_are_right(wrong, small())


# Independence of the batch


def batch_dependent(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    """Mathematically the same, but relative to the largest query of the batch."""
    largest = q.detach().abs().amax()
    return cuattn.attention(q / largest, k * largest, v, *args, **options)


def assert_independent(attention: Callable[..., Any], dtype: torch.dtype) -> None:
    qkv = inputs(3, 33, 40, dtype=dtype)
    out, lse = attention(*qkv, "causal", return_lse=True)
    given = upstream(out, lse)
    together = gradients((out, lse), qkv, given)
    for item in range(3):
        alone = tuple(x[item : item + 1].detach().requires_grad_() for x in qkv)
        results = attention(*alone, "causal", return_lse=True)
        got = gradients(results, alone, tuple(x[item : item + 1] for x in given))
        assert_all_equal(got, [x[item : item + 1] for x in together], f"sequence {item}")


@every_dtype
def test_a_sequences_gradients_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    assert_independent(cuattn.attention, dtype)
    with pytest.raises(BitwiseMismatch):
        assert_independent(batch_dependent, dtype)


@every_dtype
def test_packed_sequences_have_the_gradients_of_each_alone(dtype: torch.dtype) -> None:
    qkv, starts = packed(((3, 6), (0, 2), (5, 5)), dtype=dtype)
    out = cuattn.attention_varlen(*qkv, *starts, "causal")
    dout = upstream(out)[0]
    dq, dk, dv = gradients(out, qkv, dout)
    for rows, keys in zip(*map(itertools.pairwise, starts), strict=True):
        spans = slice(*rows), slice(*keys), slice(*keys)
        alone = tuple(x[span][None] for x, span in zip(qkv, spans, strict=True))
        single = cuattn.attention(*alone, "causal", layout="bshd")
        got = gradients(single, alone, dout[spans[0]][None])
        assert_all_equal(got, [x[span][None] for x, span in zip((dq, dk, dv), spans, strict=True)])


# What is saved


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function()
    return saved


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).mT / 4).softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_saved_but_inputs_and_results(options: dict[str, Any]) -> None:
    qkv, results = inputs(), []
    saved = saved_by(lambda: results.extend(cuattn.attention(*qkv, return_lse=True, **options)))
    known = [*qkv, *results, *(x for x in options.values() if isinstance(x, Tensor))]
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in known)
    assert sum(x.nbytes for x in saved) == sum(x.nbytes for x in known)
    assert [x.shape for x in saved_by(lambda: cuattn.attention(*qkv, **options))] == [x.shape for x in saved]


def test_nothing_more_is_saved_for_packed_sequences() -> None:
    qkv, starts = packed()
    saved = saved_by(lambda: cuattn.attention_varlen(*qkv, *starts))
    assert len(saved) == 7
    assert {x.data_ptr() for x in (*qkv, *starts)} < {x.data_ptr() for x in saved}


def test_memory_for_a_backward_pass_grows_with_the_length() -> None:
    def bytes_of(function: Callable[..., Any]) -> list[int]:
        return [sum(x.nbytes for x in saved_by(lambda n=n: function(*inputs(1, n, n)))) for n in (64, 128)]

    short, long = bytes_of(cuattn.attention)
    assert long == 2 * short
    short, long = bytes_of(naive)
    assert long > 2 * short


def test_a_saved_tensor_that_is_overwritten_is_noticed() -> None:
    qkv = inputs()
    out = cuattn.attention(*qkv)
    with torch.no_grad():
        qkv[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Which calls come this way


def test_calls_without_gradients_compute_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("came this way")

    qkv, (tokens, starts) = inputs(), packed()
    for name in ("attention", "attention_varlen", "attention_backward", "attention_varlen_backward"):
        monkeypatch.setattr(autograd, name, fail)
    plain = tuple(x.detach() for x in qkv)
    assert not cuattn.attention(*plain).requires_grad
    results = cuattn.attention(*plain, return_lse=True)
    cuattn.attention_backward(results[0], *plain, *results)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not cuattn.attention(*qkv).requires_grad
            assert not cuattn.attention(*map(torch.nn.Parameter, plain)).requires_grad
            cuattn.attention_varlen(*tokens, *starts)
            cuattn.attention_backward(results[0], *qkv, *results)
    for call in (
        lambda: cuattn.attention(*qkv),
        lambda: cuattn.attention_varlen(*tokens, *starts),
        lambda: cuattn.attention_backward(results[0], *qkv, *results),
    ):
        with pytest.raises(AssertionError, match="came this way"):
            call()


def test_a_backward_pass_runs_on_the_backend_of_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(dispatch, "execute_backward", lambda *args: seen.append(backend.active().name))
    with cuattn.use_backend("reference"):
        outs = [cuattn.attention(*inputs())]
    outs.append(cuattn.attention(*inputs()))
    for out in outs:
        out.sum().backward()
    assert seen == ["reference", backend.active().name]
    assert backend.active().name != "reference"


def test_leaves_accumulate_and_modules_train() -> None:
    torch.manual_seed(0)
    heads = torch.nn.Linear(64, 3 * 64, bias=False)
    x, goal = normal(2, 5, 64), normal(2, 5, 64, seed=1)
    optimizer, losses = torch.optim.SGD(heads.parameters(), 0.5), []
    for _ in range(5):
        q, k, v = heads(x).unflatten(-1, (3, 4, 16)).unbind(2)
        loss = (cuattn.attention(q, k, v, "causal", layout="bshd").flatten(2) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert_bitwise_equal(heads.weight.grad.isfinite().all(), torch.tensor(True))
