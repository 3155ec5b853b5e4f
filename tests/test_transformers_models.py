"""Whole models with ``attn_implementation="cuattn"``: logits, generated tokens and gradients are those of "eager"."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cuattn[transformers]'")

import torch
from tiny_models import LENGTHS, SIZES, build, every_model, padded
from transformers.masking_utils import create_bidirectional_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right", None])
@every_model
def test_logits_are_those_of_eager(name: str, side: str | None, dtype: torch.dtype) -> None:
    tokens, rows = padded(side or "left")
    rows = torch.ones_like(rows) if side is None else rows
    with torch.no_grad():
        got, want = (build(name, x, dtype)(tokens, attention_mask=rows).logits for x in ("cuattn", "eager"))
    precision = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got[rows.bool()], want[rows.bool()], **precision)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_model
def test_generate(name: str, cache: str) -> None:
    tokens, rows = padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got, want = (
        build(name, implementation).generate(tokens, attention_mask=rows, cache_implementation=kind, **options)
        for implementation, kind in (("cuattn", cache), ("eager", "dynamic"))
    )
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_training_has_the_gradients_of_eager(side: str | None) -> None:
    tokens, rows = padded(side or "left")
    labels = tokens.masked_fill(rows == 0, -100)
    if side == "left":
        labels[rows.diff(dim=1, prepend=0 * rows[:, :1]) == 1] = -100  # what the padding before it would predict
    gradients = []
    for implementation in ("cuattn", "eager"):
        model = build("llama", implementation).train()
        model(tokens, attention_mask=None if side is None else rows, labels=labels).loss.backward()
        gradients.append({key: x.grad for key, x in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, got in gradients[0].items():
        torch.testing.assert_close(got, gradients[1][key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: key + text)


def test_packed_rows_train_like_eager() -> None:
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None].repeat(2, 1)
    tokens = torch.randint(1, 50, places.shape, generator=torch.Generator().manual_seed(3))
    got, want = (
        build("qwen3", x).train()(tokens, position_ids=places, labels=tokens, use_cache=False)
        for x in ("cuattn", "eager")
    )
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


def test_bidirectional_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    tokens, rows = padded("left")
    with torch.no_grad():
        got, want = (
            build("llama", x)(tokens, attention_mask=rows, is_causal=False, use_cache=False).logits
            for x in ("cuattn", "eager")
        )
    torch.testing.assert_close(got[rows.bool()], want[rows.bool()], atol=1e-5, rtol=1e-5)
    embeddings = torch.empty(*rows.shape, SIZES["hidden_size"])
    assert create_bidirectional_mask(model.config, embeddings, torch.ones_like(rows)) is None


def test_windows_longer_than_the_sequence_do_nothing() -> None:
    tokens, rows = padded("left")
    changes = {"use_sliding_window": True, "max_window_layers": 1}
    options = {"max_new_tokens": 4, "do_sample": False}
    got, want = (
        build("qwen3", x, sliding_window=32, **changes).generate(tokens, attention_mask=rows, **options)
        for x in ("cuattn", "eager")
    )
    assert got.tolist() == want.tolist()
    model = build("qwen3", sliding_window=14, **changes)
    with pytest.raises(NotImplementedError, match="a sliding window or chunk of 14 keys over 15"):
        model.generate(tokens, attention_mask=rows, **options)
