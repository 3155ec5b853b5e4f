"""`cuattn.compat.sdpa` against torch's own scaled_dot_product_attention: results, gradients, masks, refusals; bits."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as original
from training import gradients, normal, upstream

import cuattn
from cuattn.compat.sdpa import scaled_dot_product_attention
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

LENGTHS = [(5, 5), (1, 1), (3, 7), (1, 7), (7, 3), (7, 1), (20, 33), (33, 20)]
DTYPES = (torch.float32, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_length = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def inputs(rows: int = 5, keys: int = 7, leading: tuple[int, ...] = (2, 4), **options: Any) -> tuple[Tensor, ...]:
    shapes = (*leading, rows, 16), (*leading, keys, 16), (*leading, keys, 24)
    return tuple(normal(*shape, seed=i, **options).requires_grad_() for i, shape in enumerate(shapes))


def assert_accurate(got: Tensor, peer: Tensor, gold: Tensor) -> None:
    """Of torch's shape and dtype; at most three times its error: on a CPU it keeps weights in float32."""
    assert (got.shape, got.dtype, got.device) == (peer.shape, peer.dtype, peer.device)
    error, allowed = ((x.double() - gold).norm() for x in (got, peer))
    assert error <= 3 * allowed + 1e-6 * gold.norm(), (error, allowed)


def check(qkv: tuple[Tensor, ...], mask: Tensor | None = None, peer_mask: Tensor | None = None, **options: Any) -> None:
    """Against torch, which gets ``peer_mask`` instead of a mask and is_causal where one is given."""
    got = scaled_dot_product_attention(*qkv, mask, **options)
    if peer_mask is not None:
        mask, options = peer_mask, options | {"is_causal": False}
    exact = tuple(x.detach().double().requires_grad_() for x in qkv)
    peer, gold = (original(*arrays, mask, **options) for arrays in (qkv, exact))
    assert_accurate(got, peer, gold)
    (given,) = upstream(peer)
    computed = gradients(got, qkv, given), gradients(peer, qkv, given), gradients(gold, exact, given.double())
    for results in zip(*computed, strict=True):
        assert_accurate(*results)


def test_signature_is_that_of_torch() -> None:
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    documented = "(" + ", ".join(str(p.replace(annotation=p.empty)) for p in parameters.values()) + ")"
    assert original.__doc__ is not None
    assert re.sub(r"\s+", " ", original.__doc__).startswith("scaled_dot_product_attention" + documented)
    by_position = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    for function in (original, scaled_dot_product_attention):
        with pytest.raises(TypeError, match="positional"):
            function(*inputs(), None, 0.0, False, 0.5)


@pytest.mark.parametrize("is_causal", [False, True])
@every_dtype
@every_length
def test_lengths(lengths: tuple[int, int], dtype: torch.dtype, is_causal: bool) -> None:
    check(inputs(*lengths, dtype=dtype), is_causal=is_causal)


@every_length
def test_causal_is_aligned_top_left(lengths: tuple[int, int]) -> None:
    check(inputs(*lengths), is_causal=True, peer_mask=torch.ones(lengths, dtype=torch.bool).tril())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 2), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_leading_dimensions(lengths: tuple[int, int], leading: tuple[int, ...]) -> None:
    check(inputs(*lengths, leading), is_causal=True)
    check(inputs(*lengths, leading), torch.arange(lengths[1]).expand(1, lengths[1]) != 2)


def test_leading_dimensions_are_broadcast() -> None:
    q, k, v = inputs(leading=(2, 4))
    one_head, one_batch = (tuple(x[part] for x in (k, v)) for part in ((slice(None), slice(1)), (0,)))
    for others in (one_head, one_batch):
        check(tuple(x.detach().requires_grad_() for x in (q, *others)))
    for one in (q[:1, :1], q[0], q[0, 0]):
        check(tuple(x.detach().requires_grad_() for x in (one, k, v)))


@every_dtype
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_grouped_heads(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    q, _, _ = inputs(leading=(*leading, 4), dtype=dtype)
    _, k, v = inputs(leading=(*leading, 2), dtype=dtype)
    check((q, k, v), is_causal=True, enable_gqa=True)
    check((q, k, v), torch.arange(28).view(4, 1, 7) % 3 > 0, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.3, -1.0, 0.0])
def test_scale(scale: float) -> None:
    check(inputs(), scale=scale)


@every_dtype
@pytest.mark.parametrize("dims", [(20, 12), (1, 1), (16, 3), (7, 16)], ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    shapes = (2, 4, 5, dims[0]), (2, 4, 7, dims[0]), (2, 4, 7, dims[1])
    qkv = tuple(normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))
    check(qkv)
    check(qkv, is_causal=True, scale=0.4)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "rows": lambda x: torch.cat([x, x[..., :1]], 3)[..., :-1],
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_memory_of_any_form(form: Callable[[Tensor], Tensor]) -> None:
    qkv = inputs()
    assert_bitwise_equal(scaled_dot_product_attention(*map(form, qkv)), scaled_dot_product_attention(*qkv))
    check(tuple(form(x.detach()).requires_grad_() for x in qkv))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_see_or_to_compute(is_causal: bool, lengths: tuple[int, int]) -> None:
    rows, keys = lengths
    for leading in ((2, 3), (0, 3), (2, 0)):
        qkv = inputs(rows, keys, leading)
        for mask in (None, torch.ones(1, 1, rows, keys, dtype=torch.bool)):
            out = scaled_dot_product_attention(*qkv, mask, is_causal=is_causal)
            assert_bitwise_equal(out, torch.zeros(*leading, rows, 24))
            assert all((x == 0).all() for x in gradients(out, qkv, upstream(out)))


# Masks

ROWS, KEYS = 5, 7
PADDING = torch.tensor([[1, 1, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
OF_HEADS = (torch.arange(2 * 4 * KEYS).reshape(2, 4, 1, KEYS) * 5) % 3 > 0
SQUARE = torch.ones(ROWS, KEYS, dtype=torch.bool)
MASKS = {
    "keys": PADDING[0],
    "one row": PADDING[:1],
    "padding": PADDING[:, None, None],
    "expanded": PADDING[:, None, None].expand(2, 4, ROWS, KEYS),
    "expanded rows": PADDING[:, None, None].expand(2, 1, ROWS, KEYS),
    "a column": torch.tensor([True, False]).view(2, 1, 1, 1),
    "of heads": OF_HEADS,
    "of heads, expanded": OF_HEADS.expand(2, 4, ROWS, KEYS),
    "all": SQUARE,
    "none": ~SQUARE,
    "rows of padding": PADDING[:, None, None].expand(2, 4, ROWS, KEYS).contiguous(),
    "top left": SQUARE.tril(),
    "bottom right": SQUARE.tril(KEYS - ROWS),
    "top left, padding": SQUARE.tril() & PADDING[:, None, None],
    "bottom right, padding": SQUARE.tril(KEYS - ROWS) & PADDING[:, None, None],
    "bottom right, of heads": SQUARE.tril(KEYS - ROWS) & OF_HEADS,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@every_dtype
def test_masks(dtype: torch.dtype, mask: Tensor) -> None:
    check(inputs(dtype=dtype), mask, peer_mask=torch.atleast_2d(mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_beside_is_causal(mask: Tensor) -> None:
    check(inputs(), mask, is_causal=True, peer_mask=mask & SQUARE.tril())


def test_masks_of_more_queries_than_keys() -> None:
    causal = torch.ones(9, 4, dtype=torch.bool)
    padding = torch.tensor([True, False, True, True])
    for mask in (causal.tril(), causal.tril(-5), causal.tril() & padding, causal.tril(-5) & padding):
        check(inputs(9, 4), mask)
        check(inputs(9, 4), mask, is_causal=True, peer_mask=mask & causal.tril())


def test_a_row_without_keys_is_zero() -> None:
    mask = torch.ones(2, 1, 1, KEYS, dtype=torch.bool)
    mask[1] = False
    qkv = inputs()
    out = scaled_dot_product_attention(*qkv, mask)
    assert_bitwise_equal(out[1], torch.zeros(4, ROWS, 24))
    assert all((x[1] == 0).all() for x in gradients(out, qkv, upstream(out)))


# Bits


@pytest.mark.parametrize("is_causal", [False, True])
@every_dtype
@every_length
def test_every_row_has_the_bits_of_its_keys_alone(
    lengths: tuple[int, int], dtype: torch.dtype, is_causal: bool
) -> None:
    qkv = q, k, v = tuple(x.detach() for x in inputs(*lengths, dtype=dtype))
    out = scaled_dot_product_attention(*qkv, is_causal=is_causal)
    for i in range(lengths[0]):
        end = i + 1 if is_causal else lengths[1]
        one = cuattn.attention(q[1:, :, i : i + 1], k[1:, :, :end], v[1:, :, :end], "causal" if is_causal else "full")
        assert_bitwise_equal(out[1:, :, i : i + 1], one)


@pytest.mark.parametrize("is_causal", [False, True])
@every_dtype
def test_alone_in_a_batch_and_padded(dtype: torch.dtype, is_causal: bool) -> None:
    rows = keys = 40
    qkv = q, k, v = tuple(x.detach() for x in inputs(rows, keys, dtype=dtype))
    alone = tuple(scaled_dot_product_attention(*(x[i : i + 1] for x in qkv), is_causal=is_causal) for i in (0, 1))
    assert_bitwise_equal(scaled_dot_product_attention(*qkv, is_causal=is_causal), torch.cat(alone))

    mask = (torch.arange(keys + 9) < keys).expand(2, 1, 1, -1)
    behind = torch.full((2, 4, 9, 24), torch.nan, dtype=dtype)
    padded = q, torch.cat([k, behind[..., :16]], 2), torch.cat([v, behind], 2)
    for form in (mask, mask.expand(2, 4, rows, -1), mask.expand(2, 4, rows, -1).contiguous()):
        assert_bitwise_equal(scaled_dot_product_attention(*padded, form, is_causal=is_causal), torch.cat(alone))
    one_less = mask.roll(-1, 3)  # the control: the last key is missing
    with pytest.raises(BitwiseMismatch):
        assert_bitwise_equal(scaled_dot_product_attention(*padded, one_less, is_causal=is_causal), torch.cat(alone))


def test_gradients_do_not_depend_on_the_batch() -> None:
    for options in ({}, {"is_causal": True}, {"attn_mask": PADDING[1]}, {"is_causal": True, "attn_mask": PADDING[1]}):
        qkv = inputs()
        out = scaled_dot_product_attention(*qkv, **options)
        (dout,) = upstream(out)
        one = tuple(x[1:].detach().requires_grad_() for x in qkv)
        alone = gradients(scaled_dot_product_attention(*one, **options), one, dout[1:])
        for got, wanted in zip(gradients(out, qkv, dout), alone, strict=True):
            assert_bitwise_equal(got[1:], wanted)


@pytest.mark.parametrize(("lengths", "masked"), [((7, 3), False), ((3, 7), True)], ids=str)
def test_compiled_without_a_break(lengths: tuple[int, int], masked: bool) -> None:
    """Of a padding mask this shows too that nothing reads it."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager", dynamic=True)
    qkv = inputs(*lengths)
    mask = PADDING[:, None, None] if masked else None
    results = [function(*qkv, mask, is_causal=True) for function in (compiled, scaled_dot_product_attention)]
    assert_bitwise_equal(*results)
    (given,) = upstream(results[0])
    for got, wanted in zip(*(gradients(out, qkv, given) for out in results), strict=True):
        assert_bitwise_equal(got, wanted)


def test_transforms() -> None:
    q, k, v = (x.detach() for x in inputs())
    out = scaled_dot_product_attention(q, k, v, PADDING[:, None, None], is_causal=True)
    mapped = torch.func.vmap(lambda *x: scaled_dot_product_attention(*x, is_causal=True))(q, k, v, PADDING[:, None])
    assert_bitwise_equal(mapped, out)
    wanted = gradients(scaled_dot_product_attention(q.requires_grad_(), k, v), (q,), torch.ones_like(out))[0]
    got = torch.func.grad(lambda q: scaled_dot_product_attention(q, k, v).sum())(q.detach())
    assert_bitwise_equal(got, wanted)


def test_autocast() -> None:
    qkv = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(*qkv, is_causal=True)
    assert_bitwise_equal(out, scaled_dot_product_attention(*(x.bfloat16() for x in qkv), is_causal=True))


# What is refused

KIND = "expected bool that is a padding of keys, a causal mask or both"
READ = "expected is_causal=True, a padding such as (B, 1, 1, S), or both, none of which has to be read here"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p: got 0.1, expected 0.0"),
        ({"attn_mask": torch.zeros(ROWS, KEYS)}, f"attn_mask: got dtype float32, {KIND}"),
        ({"attn_mask": SQUARE.triu()}, f"attn_mask: got another bool mask, {KIND}"),
        ({"attn_mask": SQUARE.tril(1)}, f"attn_mask: got another bool mask, {KIND}"),
        (
            {"attn_mask": torch.empty(ROWS, KEYS, dtype=torch.bool, device="meta")},
            f"attn_mask: got shape (5, 7), a row for each query, on meta, {READ}",
        ),
    ],
)
def test_not_computed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        scaled_dot_product_attention(*inputs(), **options)
    assert str(caught.value) == message


def test_a_compiled_function_does_not_read_a_mask() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"a row for each query, on cpu, expected is_causal=True"):  # of torch's kinds
        compiled(*inputs(), SQUARE.tril())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: got list, expected a torch tensor"),
        ({"query": torch.ones(16)}, ValueError, "query: got shape (16,), expected at least 2 dimensions (L, E)"),
        ({"value": torch.ones(2, 4, 6, 16)}, ValueError, "value: got length 6, expected key's 7"),
        (
            {"key": torch.ones(2, 2, KEYS, 16), "value": torch.ones(2, 2, KEYS, 16)},
            ValueError,
            "key, value: got leading dimensions (2, 2), (2, 2), expected ones that broadcast with query's (2, 4) "
            "(enable_gqa=True shares heads)",
        ),
        (
            {"key": torch.ones(2, 3, KEYS, 16), "value": torch.ones(2, 3, KEYS, 16), "enable_gqa": True},
            ValueError,
            "q: got 4 heads, expected a multiple of the 3 heads of k and v",
        ),
        (
            {"key": torch.ones(3, 4, KEYS, 16), "enable_gqa": True},
            ValueError,
            "key, value: got leading dimensions (3,), (2,), expected ones that broadcast with query's (2,)",
        ),
        ({"key": torch.ones(2, 4, KEYS, 24)}, ValueError, "k: got head dim 24, expected q's 16"),
        ({"key": torch.ones(2, 4, KEYS, 16).half()}, TypeError, "k: got dtype float16, expected q's float32"),
        ({"attn_mask": True}, TypeError, "attn_mask: got bool, expected a torch tensor"),
        (
            {"attn_mask": SQUARE[:, :4]},
            ValueError,
            "attn_mask: got shape (5, 4), expected one that broadcasts to (2, 4, 5, 7)",
        ),
        ({"scale": float("inf")}, ValueError, "scale: got inf, expected None or a finite float"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        scaled_dot_product_attention(**(dict(zip(("query", "key", "value"), inputs(), strict=True)) | change))
    assert str(caught.value) == message


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    qkv = tuple(x.detach() for x in inputs(leading=(2, 4), device="cuda", dtype=torch.float16))
    mask = PADDING[:, None, None].cuda()
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask, "is_causal": True}]
    wanted = [scaled_dot_product_attention(*qkv, **choice) for choice in options]  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [scaled_dot_product_attention(*qkv, **choice) for choice in options]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(results, wanted, strict=True):
        assert_bitwise_equal(got, want)
    with pytest.raises(NotImplementedError, match="a row for each query, on cuda"):
        scaled_dot_product_attention(*qkv, mask.expand(2, 4, ROWS, KEYS).contiguous())
