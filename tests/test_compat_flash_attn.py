"""`cuattn.compat.flash_attn` against what flash-attn documents, written out in float64; signatures, bits, refusals."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from documented_flash_attn import TOLERANCES, assert_close, bottom_right, documented, starts
from torch import Tensor
from training import DTYPES, gradients, normal, upstream

import cuattn
from cuattn.compat import flash_attn
from cuattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both = pytest.mark.parametrize("causal", [False, True])

# Signatures, in the words of flash_attn/flash_attn_interface.py, version 2

PLAIN = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {PLAIN})",
    "flash_attn_kvpacked_func": f"(q, kv, {PLAIN})",
    "flash_attn_qkvpacked_func": f"(qkv, {PLAIN})",
    "flash_attn_varlen_func": f"(q, k, v, {PACKED}, {PLAIN}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {PACKED}, {PLAIN})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {PLAIN})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_no_function_is_missing() -> None:
    assert {name for name in vars(flash_attn) if name.startswith("flash_attn_")} == set(SIGNATURES)


# What flash-attn documents


def documented_batch(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    results = [documented(*arrays, *options) for arrays in zip(q, k, v, strict=True)]
    out, lse = zip(*results, strict=True)
    return torch.stack(out), torch.stack(lse)


def inputs(rows: int = 5, keys: int = 7, heads: tuple[int, int] = (4, 2), **options: Any) -> tuple[Tensor, ...]:
    shapes = (3, rows, heads[0], 16), (3, keys, heads[1], 16), (3, keys, heads[1], 24)
    return tuple(normal(*shape, seed=i, **options).requires_grad_() for i, shape in enumerate(shapes))


@pytest.mark.parametrize(
    ("rows", "keys", "seen"),
    [(2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])],
)
def test_the_causal_masks_of_the_documentation(rows: int, keys: int, seen: list[list[int]]) -> None:
    """Equal scores, and a value for each key: the output is the mask, each row divided by its sum, or zero."""
    mask = torch.tensor(seen, dtype=torch.float32)
    assert (bottom_right(rows, keys) == mask.bool()).all()
    v = torch.eye(keys, 8).view(1, keys, 1, 8)
    q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, keys, 1, 8)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    counts = mask.sum(1)
    torch.testing.assert_close(out[0, :, 0, :keys], mask / counts.clamp(min=1)[:, None])
    torch.testing.assert_close(lse[0, 0], counts.log())
    assert_bitwise_equal(out[:, counts == 0], torch.zeros(1, int((counts == 0).sum()), 1, 8))


@both
@every_dtype
@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5), (1, 9), (33, 20)], ids=str)
def test_flash_attn_func(lengths: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    for heads in ((4, 2), (3, 1), (2, 2)):
        qkv = tuple(x.detach() for x in inputs(*lengths, heads, dtype=dtype))
        out, lse, probabilities = flash_attn_func(*qkv, causal=causal, return_attn_probs=True)
        assert probabilities is None
        assert_close((out, lse), documented_batch(*qkv, causal), dtype)
        assert_bitwise_equal(flash_attn_func(*qkv, causal=causal), out)
    scaled = flash_attn_func(*qkv, 0.0, -0.3, causal, [-1, -1], -1.0, None, True, True)
    assert_close(scaled[:2], documented_batch(*qkv, causal, -0.3), dtype)


@both
def test_gradients(causal: bool) -> None:
    qkv = inputs()
    out, lse, _ = flash_attn_func(*qkv, causal=causal, return_attn_probs=True)
    given = upstream(out, lse)
    exact = documented_batch(*qkv, causal)
    wanted = gradients(exact, qkv, tuple(x.double() for x in given))
    for got, want in zip(gradients((out, lse), qkv, given), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_head_dims_of_no_multiple_of_8() -> None:
    q, k, v = (x.detach() for x in inputs())
    qkv = q[..., :13].requires_grad_(), k[..., :13].requires_grad_(), v[..., :5].requires_grad_()
    out, lse, _ = flash_attn_func(*qkv, causal=True, return_attn_probs=True)
    exact = documented_batch(*qkv, True)
    assert out.shape == (3, 5, 4, 5)
    assert_close((out, lse), exact, torch.float32)
    (dout,) = upstream(out)
    wanted = gradients(exact[0], qkv, dout.double())
    for got, want in zip(gradients(out, qkv, dout), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_memory_of_any_form() -> None:
    qkv = tuple(x.detach() for x in inputs())
    wanted = flash_attn_func(*qkv, causal=True)
    for form in (lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x[..., :1]], 3)[..., :-1]):
        assert_bitwise_equal(flash_attn_func(*map(form, qkv), causal=True), wanted)


# Packed tensors and packed sequences


@both
def test_packed_tensors_are_their_parts(causal: bool) -> None:
    qkv = normal(3, 6, 3, 4, 16).requires_grad_()
    q, k, v = qkv.unbind(2)
    wanted = flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal, return_attn_probs=True)
    options = {"softmax_scale": 0.3, "causal": causal, "return_attn_probs": True}
    kv_packed = flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options)
    given = upstream(*wanted[:2])
    expected = gradients(wanted[:2], (qkv,), given)[0]
    for got in (flash_attn_qkvpacked_func(qkv, **options), kv_packed):
        assert got[2] is None
        for x, y in zip(got[:2], wanted[:2], strict=True):
            assert_bitwise_equal(x, y)
        assert_bitwise_equal(gradients(got[:2], (qkv,), given)[0], expected)
    assert_bitwise_equal(flash_attn_qkvpacked_func(qkv, causal=causal), flash_attn_func(q, k, v, causal=causal))


LENGTHS_Q, LENGTHS_K = [3, 0, 5, 9], [6, 2, 5, 4]


def packed(**options: Any) -> tuple[Tensor, ...]:
    shapes = (sum(LENGTHS_Q), 4, 16), (sum(LENGTHS_K), 2, 16), (sum(LENGTHS_K), 2, 24)
    return tuple(normal(*shape, seed=i, **options).requires_grad_() for i, shape in enumerate(shapes))


def documented_sequences(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    parts = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True)
    out, lse = zip(*(documented(*arrays, causal) for arrays in parts), strict=True)
    return torch.cat(out), torch.cat(lse, 1)


@both
@every_dtype
def test_packed_sequences(dtype: torch.dtype, causal: bool) -> None:
    qkv, bounds = packed(dtype=dtype), (starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    out, lse, probabilities = flash_attn_varlen_func(*qkv, *bounds, causal=causal, return_attn_probs=True)
    assert probabilities is None
    assert lse.shape == (4, sum(LENGTHS_Q))
    exact = documented_sequences(*qkv, causal)
    assert_close((out, lse), exact, dtype)
    (dout,) = upstream(out)
    wanted = gradients(exact[0], qkv, dout.double())
    for got, want in zip(gradients(out, qkv, dout), wanted, strict=True):
        tolerance = 4 * TOLERANCES[dtype]
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@both
def test_packed_tensors_of_packed_sequences(causal: bool) -> None:
    qkv, bounds = normal(17, 3, 4, 16).requires_grad_(), starts(LENGTHS_Q)
    q, k, v = qkv.unbind(1)
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": causal, "return_attn_probs": True}
    wanted = flash_attn_varlen_func(q, k, v, bounds, bounds, 9, 9, **options)
    kv_packed = flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], bounds, bounds, 9, 9, **options)
    given = upstream(wanted[0])
    expected = gradients(wanted[0], (qkv,), given)[0]
    for got in (flash_attn_varlen_qkvpacked_func(qkv, bounds, 9, **options), kv_packed):
        assert got[2] is None
        for x, y in zip(got[:2], wanted[:2], strict=True):
            assert_bitwise_equal(x, y)
        assert_bitwise_equal(gradients(got[0], (qkv,), given)[0], expected)


# Bits, and what is refused


@both
@every_dtype
def test_a_sequence_has_its_bits_through_every_function(dtype: torch.dtype, causal: bool) -> None:
    qkv = q, k, v = tuple(x.detach() for x in inputs(9, 9, (2, 2), dtype=dtype))
    one = tuple(x[1:2] for x in qkv)
    wanted = cuattn.attention(*one, "causal" if causal else "full", layout="bshd")[0]
    bounds = (starts([9, 9, 9]), starts([9, 9, 9]), 9, 9)
    flat = tuple(x.flatten(0, 1) for x in qkv)
    for got in (
        flash_attn_func(*qkv, causal=causal)[1],
        flash_attn_varlen_func(*flat, *bounds, causal=causal)[9:18],
        flash_attn_with_kvcache(q, k.clone(), v.clone(), cache_seqlens=9, causal=causal)[1],
    ):
        assert_bitwise_equal(got, wanted)
    with pytest.raises(BitwiseMismatch):  # the control: another sequence
        assert_bitwise_equal(flash_attn_func(*qkv, causal=causal)[0], wanted)


def calls(**options: Any) -> list[Callable[[], Any]]:
    """Every function, with these options."""
    q, k, v = normal(1, 3, 2, 8), normal(1, 3, 2, 8), normal(1, 3, 2, 8)
    kv, qkv, bounds = torch.stack([k, v], 2), torch.stack([q, k, v], 2), starts([3])
    return [
        lambda: flash_attn_func(q, k, v, **options),
        lambda: flash_attn_kvpacked_func(q, kv, **options),
        lambda: flash_attn_qkvpacked_func(qkv, **options),
        lambda: flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 3, 3, **options),
        lambda: flash_attn_varlen_kvpacked_func(q[0], kv[0], bounds, bounds, 3, 3, **options),
        lambda: flash_attn_varlen_qkvpacked_func(qkv[0], bounds, 3, **options),
        lambda: flash_attn_with_kvcache(q, k, v, **options),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p: got 0.1, expected 0.0"),
        ({"window_size": (3, 0)}, "window_size: got (3, 0), expected (-1, -1)"),
        ({"softcap": 30.0}, "softcap: got 30.0, expected 0.0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: got Tensor, expected None"),
        ({"rotary_cos": torch.ones(3, 4)}, "rotary_cos: got Tensor, expected None"),
        ({"rotary_sin": torch.ones(3, 4)}, "rotary_sin: got Tensor, expected None"),
        ({"cache_leftpad": torch.zeros(1).int()}, "cache_leftpad: got Tensor, expected None"),
        (
            {"cache_batch_idx": torch.zeros(1).int(), "block_table": torch.zeros(1, 1).int()},
            "cache_batch_idx: got a tensor beside block_table, expected None",
        ),
    ],
)
def test_not_computed(options: dict[str, Any], message: str) -> None:
    functions = calls(**options)
    if "dropout_p" in options:
        functions = functions[:-1]
    elif any(name.startswith(("rotary", "cache")) for name in options):
        functions = functions[-1:]
    for function in functions:
        with pytest.raises(NotImplementedError) as caught:
            function()
        assert str(caught.value) == message


def test_defaults_compute() -> None:
    for function in calls():
        assert function().shape[-2:] == (2, 8)


def test_wrong_arguments() -> None:
    q, k, v = normal(1, 3, 2, 8), normal(1, 3, 2, 8), normal(1, 3, 2, 8)
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: flash_attn_func(q.numpy(), k, v), TypeError, "q: got ndarray, expected a torch tensor"),
        (lambda: flash_attn_kvpacked_func(q, k), ValueError, "kv: got shape (1, 3, 2, 8), expected (batch, seqlen, 2,"),
        (lambda: flash_attn_varlen_qkvpacked_func(q[0], starts([3]), 3), ValueError, "qkv: got shape (3, 2, 8), exp"),
        (lambda: flash_attn_with_kvcache(q, k, v, k, v), ValueError, "cache_seqlens: got None beside k, expected"),
        (lambda: flash_attn_func(q, k[..., :4], v), ValueError, "k: got head dim 4, expected"),
        (lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=4), ValueError, "cache_lengths: got [4], expected"),
    ]
    for function, kind, message in refused:
        with pytest.raises(kind) as caught:
            function()
        assert str(caught.value).startswith(message)


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    qkv = inputs()
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    assert_bitwise_equal(compiled(*qkv, causal=True), flash_attn_func(*qkv, causal=True))
    arguments = (*packed(), starts(LENGTHS_Q), starts(LENGTHS_K), 9, 6)
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="eager")
    assert_bitwise_equal(compiled(*arguments, causal=True), flash_attn_varlen_func(*arguments, causal=True))
