"""Stand-ins for the modules of vLLM 0.33.0 that the backend imports, with the names and fields that it relies on."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch

NAMES = (
    "vllm",
    "vllm.v1",
    "vllm.v1.attention",
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends",
    "vllm.v1.attention.backends.registry",
)


class AttentionBackend(ABC):
    forward_includes_kv_cache_update = True

    @staticmethod
    @abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type: ...

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False


class AttentionMetadataBuilder(ABC):
    @abstractmethod
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None: ...

    @abstractmethod
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...


class AttentionImpl(ABC):
    @abstractmethod
    def __init__(self, num_heads: int, head_size: int, scale: float) -> None: ...

    @abstractmethod
    def forward(self, *args: Any) -> torch.Tensor: ...


@dataclass
class CommonAttentionMetadata:
    """The fields without a default, and ``causal``."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True


class AttentionBackendEnum(Enum):
    CUSTOM = None

    def is_overridden(self) -> bool:
        return self in REGISTERED


REGISTERED: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    REGISTERED[backend] = class_path


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where vLLM's modules would be, and takes the backend's module away, which then loads anew."""
    modules = {name: ModuleType(name) for name in NAMES}
    for own in (AttentionBackend, AttentionMetadataBuilder, AttentionImpl):
        setattr(modules["vllm.v1.attention.backend"], own.__name__, own)
    for other in (AttentionBackendEnum, register_backend):
        setattr(modules["vllm.v1.attention.backends.registry"], other.__name__, other)
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, "cuattn.integrations.vllm.backend", raising=False)
    patch.setattr(sys.modules[__name__], "REGISTERED", {})
