"""Tiny models of transformers with random weights, and padded batches for them."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cuattn.integrations import transformers as integration

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
LENGTHS = (7, 12, 1)
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, implementation: str = "cuattn", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with the same weights for every implementation."""
    integration.register()
    config, model = MODELS[name]
    torch.manual_seed(0)
    made = model._from_config(config(**SIZES | changes), attn_implementation=implementation, dtype=dtype)
    assert made.config._attn_implementation == implementation
    return made.eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask (sequences, longest length) of sequences padded on one side."""
    generator = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    tokens, mask = torch.zeros(2, len(LENGTHS), longest, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        place = slice(longest - length, None) if side == "left" else slice(length)
        tokens[row, place] = torch.randint(1, 50, (length,), generator=generator)
        mask[row, place] = 1
    return tokens, mask
