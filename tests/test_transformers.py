"""``attn_implementation="cuattn"`` in transformers' own Llama and Qwen3, tiny and with random weights.

torch's matrix products are not batch-invariant, so two runs of a model cannot be compared bit for bit. What the runs of
single sequences hand to attention can: it is handed to the registered function again, padded, in a batch, through the
caches of transformers, with the masks that transformers makes then.
"""

from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cuattn[transformers]'")

import torch
from tiny_models import LENGTHS, SIZES, build, every_model, padded
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from cuattn.integrations import transformers as integration
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal


@dataclass
class Layer:
    """A call of the attention function for one sequence alone: (1, H, L, D) in, (1, L, H, D) out."""

    module: Any
    qkv: tuple[torch.Tensor, ...]
    options: dict[str, Any]
    out: torch.Tensor


def captured(model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    """The attention of each layer in a forward pass of one sequence."""
    layers = []

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        assert mask is None
        out, weights = integration.attention(module, q, k, v, mask, **options)
        layers.append(Layer(module, (q, k, v), options, out))
        return out, weights

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(AttentionInterface._global_mapping, "cuattn", spy)
        model(tokens[None], use_cache=False)
    assert len(layers) == model.config.num_hidden_layers
    return layers


def call(layer: Layer, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    out, weights = AttentionInterface()["cuattn"](layer.module, q, k, v, mask, scaling=layer.options["scaling"])
    assert weights is None
    assert out.is_contiguous()
    return out


def batched(layers: list[Layer], rows: torch.Tensor, noise: float) -> tuple[torch.Tensor, ...]:
    """One layer of all sequences as a padded batch; ``rows`` is its attention mask, the padding is noise and NaN."""
    made = []
    for i in range(3):
        heads, _, width = layers[0].qkv[i].shape[1:]
        x = torch.full((*rows.shape, heads, width), noise if i == 0 else torch.nan, dtype=layers[0].out.dtype)
        x[rows.bool()] = torch.cat([layer.qkv[i][0].transpose(0, 1) for layer in layers])
        made.append(x.transpose(1, 2))
    return tuple(made)


def mask_of(model: Any, rows: torch.Tensor | None, length: int, cache: Any = None, batch: int = len(LENGTHS)) -> Any:
    embeddings = torch.empty(batch, length, model.config.hidden_size)
    return create_causal_mask(model.config, inputs_embeds=embeddings, attention_mask=rows, cache=cache)


def alone(model: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Layer]], torch.Tensor]:
    """Layers of each sequence run alone, and the attention mask that puts them into one batch."""
    tokens, mask = padded(side)
    return [captured(model, row[real.bool()], monkeypatch) for row, real in zip(tokens, mask, strict=True)], mask


# Bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@every_model
def test_padded_batches_have_the_bits_of_single_sequences(
    name: str, side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, dtype=dtype)
    runs, rows = alone(model, side, monkeypatch)
    mask = mask_of(model, rows, rows.shape[1])
    assert mask.shape == rows.shape
    for layers in zip(*runs, strict=True):
        qkv = batched(layers, rows, noise=3.0)
        out = call(layers[0], *qkv, mask)
        assert_bitwise_equal(out[rows.bool()], torch.cat([layer.out[0] for layer in layers]))
        if side == "left":
            assert (out[~rows.bool()] == 0).all()
        with pytest.raises((BitwiseMismatch, AssertionError)):  # the control: the mask is what makes it so
            assert_bitwise_equal(call(layers[0], *qkv, None)[rows.bool()], torch.cat([x.out[0] for x in layers]))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(12,), (5, 3, 1, 2, 1), (1,) * 12], ids=["prefill", "mixed", "tokens"])
def test_caches_have_the_bits_of_one_prefill(
    chunks: tuple[int, ...], static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A left-padded batch that goes through transformers' cache in pieces, down to one token at a time."""
    model = build("llama")
    runs, rows = alone(model, "left", monkeypatch)
    cache = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    end = 0
    for length in chunks:
        first, end = end, end + length
        piece = slice(first, end)
        mask = mask_of(model, rows[:, :end], length, cache)
        for i, layers in enumerate(zip(*runs, strict=True)):
            q, k, v = (x[:, :, piece].nan_to_num(7.0) for x in batched(layers, rows, noise=3.0))
            out = call(layers[0], q, *cache.update(k, v, i), mask)
            real = rows[:, piece].bool()
            expected = batched_out(layers, rows)[:, piece]
            assert_bitwise_equal(out[real], expected[real])


def batched_out(layers: Any, rows: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*rows.shape, *layers[0].out.shape[2:], dtype=layers[0].out.dtype)
    out[rows.bool()] = torch.cat([layer.out[0] for layer in layers])
    return out


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_have_the_bits_of_single_ones(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    runs, _ = alone(model, "left", monkeypatch)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    options, mask = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}, None
    if how == "position_ids":
        places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        embeddings = torch.empty(1, sum(LENGTHS), SIZES["hidden_size"])
        options, mask = {}, create_causal_mask(model.config, embeddings, None, None, position_ids=places)
        assert mask.tolist() == starts.tolist()
    for layers in zip(*runs, strict=True):
        q, k, v = (torch.cat([layer.qkv[i] for layer in layers], 2) for i in range(3))
        out, _ = integration.attention(layers[0].module, q, k, v, mask, scaling=16**-0.5, **options)
        assert_bitwise_equal(out[0], torch.cat([layer.out[0] for layer in layers]))


def test_gradients_have_the_bits_of_single_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    runs, rows = alone(model, "left", monkeypatch)
    layers = [run[0] for run in runs]
    upstream = torch.randn(batched_out(layers, rows).shape, generator=torch.Generator().manual_seed(2))
    upstream[~rows.bool()] = 0

    def gradients(qkv: Any, mask: Any, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in qkv]
        return torch.autograd.grad(call(layers[0], *leaves, mask), leaves, given)

    together = gradients(batched(layers, rows, noise=3.0), mask_of(model, rows, rows.shape[1]), upstream)
    for row, layer in enumerate(layers):
        real = rows[row].bool()
        for got, want in zip(together, gradients(layer.qkv, None, upstream[row, real][None]), strict=True):
            assert_bitwise_equal(got[row, :, real], want[0])


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "attention dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "position bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"sliding_window": 2}, "a sliding window of 2 keys over 3"),
        ({"block_table": torch.zeros(1, 1)}, "block_table"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "a 4-D attention mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_named(options: dict[str, Any], message: str) -> None:
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match=message):
        integration.attention(torch.nn.Module(), q, kv, kv, **{"attention_mask": None} | options)


def test_masks_that_are_not_supported_are_named() -> None:
    config, embeddings = build("llama").config, torch.empty(1, 5, SIZES["hidden_size"])

    def everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query >= 0

    with pytest.raises(NotImplementedError, match="or_mask_function"):
        create_causal_mask(config, embeddings, None, None, or_mask_function=everything)
    with pytest.raises(NotImplementedError, match="later ones"):
        create_causal_mask(config, embeddings, None, None, block_sequence_ids=torch.tensor([[-1, 0, 0, -1, -1]]))
