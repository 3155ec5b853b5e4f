"""vLLM's engine on a CPU with cuattn as its attention. Run by test_vllm_engine.py, in a process of its own.

vLLM's CPU platform knows one attention backend, so cuattn takes its name. Every call of the layers is compared, bit for
bit, with `cuattn.attention` over the keys and values of each request alone, read from vLLM's cache. The tokens that the
engine generates are printed.
"""

import json
import sys
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import cuattn
from cuattn.testing import assert_bitwise_equal

PROMPTS = [[(i * 7 + j) % 60 + 1 for j in range(length)] for i, length in enumerate((5, 40, 70, 1))]
calls: list[tuple[int, bool]] = []


def compare(impl: Any, query: torch.Tensor, kv_cache: torch.Tensor, batch: Any, output: torch.Tensor) -> None:
    k_cache, v_cache = kv_cache.transpose(1, 2).split(impl.head_size, -1)
    starts = batch.starts.tolist()
    for row, (first, end) in enumerate(pairwise(starts)):
        if first == end:
            continue
        blocks, length = batch.block_table[row].long(), int(batch.lengths[row])
        k, v = (x[blocks].flatten(0, 1)[None, :length] for x in (k_cache, v_cache))
        alone = cuattn.attention(query[None, first:end], k, v, "causal", scale=impl.scale, layout="bshd")
        assert_bitwise_equal(output[None, first:end], alone)
    calls.append((len(starts) - 1, len({end - first for first, end in pairwise(starts)}) > 1))


def install() -> None:
    from cuattn.integrations.vllm.backend import CuattnImpl

    register_backend(AttentionBackendEnum.CPU_ATTN, "cuattn.integrations.vllm.backend.CuattnBackend")
    forward = CuattnImpl.forward

    def compared(impl: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, batch: Any, **options: Any) -> Any:
        output = forward(impl, layer, q, k, v, cache, batch, **options)
        if batch is not None:
            compare(impl, q, cache, batch, output)
        return output

    CuattnImpl.forward = compared


def main(folder: str, attention: str) -> None:
    if attention == "cuattn":
        install()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=64, num_hidden_layers=2, head_dim=32, initializer_range=0.2, max_position_embeddings=256
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        block_size=32,
        max_num_batched_tokens=48,  # cuts the longest prompt into chunks
    )
    options = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], options, use_tqdm=False)
    if attention == "cuattn":
        assert max(requests for requests, _ in calls) == len(PROMPTS)
        assert any(mixed for _, mixed in calls)
    print(json.dumps({"tokens": [list(output.outputs[0].token_ids) for output in outputs], "calls": len(calls)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
