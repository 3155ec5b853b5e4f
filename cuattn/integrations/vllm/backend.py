"""The three classes that vLLM asks of an attention backend, over `cuattn.attention_kvcache`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from cuattn.cache import attention_kvcache
from cuattn.config import HEAD_DIMS


class CuattnBackend(AttentionBackend):  # type: ignore[misc]
    """Decoder attention over vLLM's paged cache, in float16, bfloat16 or float32, on compute capability 8.0 and newer.

    The cache is vLLM's: (blocks, kv heads, block size, 2 * head size), values behind keys, of any block size and memory
    layout. Batches may mix prefill, chunked prefill, speculative and plain decode.

    Guarantee: that of `cuattn.attention_kvcache`. The attention output of a token depends, bit for bit, on its query
    and on the keys and values of its own request, not on the batch, the scheduler's chunks, the blocks, the prefix
    cache or the degree of tensor parallelism, as heads are computed one by one.

    Not supported, and refused by vLLM or with NotImplementedError: sliding windows, ALiBi, soft-capped scores, sinks,
    quantised caches and outputs, encoder and cross attention, non-causal requests, context parallelism, MLA. Full CUDA
    graphs are not claimed, vLLM's piecewise ones leave attention out.
    """

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["CuattnImpl"]:
        return CuattnImpl

    @staticmethod
    def get_builder_cls() -> type["CuattnMetadataBuilder"]:
        return CuattnMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_DIMS

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


@dataclass
class CuattnMetadata:
    """A batch, the same for all layers. int32, on the device.

    starts: (requests + 1,), where the queries of each request start. lengths: (requests,), keys with those of this
    step; cached: (requests,), keys before it. block_table: (requests, max blocks).
    """

    tokens: int
    starts: Tensor
    lengths: Tensor
    cached: Tensor
    block_table: Tensor


class CuattnMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Takes from vLLM's description of a batch what `CuattnMetadata` holds."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> CuattnMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("cuattn in vLLM: non-causal requests are not supported")
        starts, lengths = batch.query_start_loc, batch.seq_lens
        cached = (lengths - starts.diff()).clamp_min(0)  # 0 for a dummy batch, whose lengths may be anything
        return CuattnMetadata(batch.num_actual_tokens, starts, lengths, cached, batch.block_table_tensor)


class CuattnImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer. The signatures are vLLM's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        """Raises NotImplementedError, which names it, for what `CuattnBackend` does not support."""
        given = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": None if attn_type == "decoder" else attn_type,
            "kv_cache_dtype": None if kv_cache_dtype == "auto" else kv_cache_dtype,
            **others,
        }
        for name, value in given.items():
            if isinstance(value, Tensor) or value:
                raise NotImplementedError(f"cuattn in vLLM: {name} is not supported, got {value}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.shares_cache = kv_sharing_target_layer_name is not None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: CuattnMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes new keys and values into the cache, unless another layer has, and the attention into ``output``.

        query: (tokens, heads, head size); key, value: (tokens, kv heads, head size); kv_cache: (blocks, kv heads, block
            size, 2 * head size); output: (tokens, heads, head size). Rows behind the batch's tokens are padding.
        attn_metadata: None in vLLM's profiling run, whose output is zero.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("cuattn in vLLM: quantised outputs are not supported")
        if attn_metadata is None:
            return output.fill_(0)
        batch, rows = attn_metadata, slice(attn_metadata.tokens)
        k_cache, v_cache = kv_cache.transpose(1, 2).split([self.head_size, kv_cache.shape[-1] - self.head_size], -1)
        if self.shares_cache or key is None or value is None:
            lengths, new = batch.lengths, {}
        else:
            lengths, new = batch.cached, {"k_new": key[rows], "v_new": value[rows]}
        attention_kvcache(
            query[rows],
            k_cache,
            v_cache,
            lengths,
            block_table=batch.block_table,
            cu_seqlens_q=batch.starts,
            scale=self.scale,
            out=output[rows],
            **new,
        )
        return output
