"""The backend for vLLM over stand-ins for vLLM's modules: paged cache, mixed batches, tensor parallelism."""

import importlib
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_interface

import cuattn
from cuattn.integrations import vllm as plugin
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 32, 16
SCALE = SIZE**-0.5


@pytest.fixture(scope="module")
def backend() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        vllm_interface.put_in_place(patch)
        yield importlib.import_module("cuattn.integrations.vllm.backend")
        patch.delitem(sys.modules, "cuattn.integrations.vllm.backend")


@dataclass(frozen=True)
class Request:
    """All tokens of a request so far: q (tokens, heads, size), k and v; and its blocks."""

    qkv: tuple[torch.Tensor, ...]
    blocks: tuple[int, ...]

    def expected(self) -> torch.Tensor:
        q, k, v = (x[None] for x in self.qkv)
        return cuattn.attention(q, k, v, "causal", scale=SCALE, layout="bshd")[0]


def requests(dtype: torch.dtype, lengths: tuple[int, ...] = (50, 3, 17, 40)) -> list[Request]:
    """Requests whose blocks are strewn over a cache of 20."""
    generator = torch.Generator().manual_seed(0)
    order = iter(torch.randperm(19, generator=generator).tolist())
    return [
        Request(
            tuple(torch.randn(n, heads, SIZE, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)),
            tuple(next(order) + 1 for _ in range(-(-n // BLOCK))),
        )
        for n in lengths
    ]


def empty_cache(dtype: torch.dtype, inner: str = "head") -> torch.Tensor:
    """(blocks, kv heads, block size, 2 * size), in either order of memory, full of NaN."""
    if inner == "head":
        return torch.full((20, KV_HEADS, BLOCK, 2 * SIZE), torch.nan, dtype=dtype)
    return torch.full((20, BLOCK, KV_HEADS, 2 * SIZE), torch.nan, dtype=dtype).transpose(1, 2)


def described(batch: list[tuple[Request, int, int]], padding: int = 0) -> vllm_interface.CommonAttentionMetadata:
    """What vLLM says of a batch of requests, each with the tokens ``first`` to ``end`` - 1 to compute."""
    starts = torch.tensor([0, *(end - first for _, first, end in batch)]).cumsum(0).to(torch.int32)
    table = torch.zeros(len(batch), 6, dtype=torch.int32)
    for row, (request, _, _) in zip(table, batch, strict=True):
        row[: len(request.blocks)] = torch.tensor(request.blocks)
    slots = [r.blocks[i // BLOCK] * BLOCK + i % BLOCK for r, first, end in batch for i in range(first, end)]
    return vllm_interface.CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([end for _, _, end in batch], dtype=torch.int32),
        num_reqs=len(batch),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=max(end for _, _, end in batch),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padding),
    )


def step(backend: Any, impl: Any, batch: list[tuple[Request, int, int]], cache: torch.Tensor) -> torch.Tensor:
    """One step of the engine, with rows of padding behind the batch's tokens."""
    padding = 3
    builder = backend.CuattnBackend.get_builder_cls()(None, ["layer"], SimpleNamespace(), torch.device("cpu"))
    metadata = builder.build(0, described(batch, padding))
    arrays = []
    for i in range(3):
        rows = torch.cat([request.qkv[i][first:end] for request, first, end in batch])
        arrays.append(torch.cat((rows, torch.full((padding, *rows.shape[1:]), torch.nan, dtype=rows.dtype))))
    output = torch.full_like(arrays[0], 7)
    assert impl.forward(None, *arrays, cache, metadata, output) is output
    assert (output[-padding:] == 7).all()
    return output[:-padding]


def layer(backend: Any, **options: Any) -> Any:
    return backend.CuattnBackend.get_impl_cls()(HEADS, SIZE, SCALE, KV_HEADS, **options)


#: Tokens computed before and after each step, of each request; None where it takes no part.
STEPS = (
    ((0, 30), None, (0, 17), None),
    ((30, 49), (0, 2), None, (0, 16)),
    ((49, 50), (2, 3), None, (16, 39)),
    (None, None, None, (39, 40)),
)


@pytest.mark.parametrize("inner", ["head", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_batches_have_the_bits_of_requests_alone(backend: Any, dtype: torch.dtype, inner: str) -> None:
    all_requests, cache, impl = requests(dtype), empty_cache(dtype, inner), layer(backend)
    for parts in STEPS:
        batch = [(r, *part) for r, part in zip(all_requests, parts, strict=True) if part is not None]
        expected = torch.cat([request.expected()[first:end] for request, first, end in batch])
        assert_bitwise_equal(step(backend, impl, batch, cache), expected)


def test_new_keys_go_where_the_slot_mapping_says(backend: Any) -> None:
    all_requests, cache = requests(torch.float32), empty_cache(torch.float32)
    batch = [(request, 0, len(request.qkv[0])) for request in all_requests]
    step(backend, layer(backend), batch, cache)
    slots = described(batch).slot_mapping
    for i, half in ((1, cache[..., :SIZE]), (2, cache[..., SIZE:])):
        written = half.transpose(1, 2).flatten(0, 1)
        assert_bitwise_equal(written[slots], torch.cat([request.qkv[i] for request in all_requests]))
        others = torch.ones(len(written), dtype=torch.bool)
        others[slots] = False
        assert written[others].isnan().all()


def test_a_wrong_page_is_found_out(backend: Any) -> None:
    """The control: with another request's page the comparison fails."""
    request, other = requests(torch.float32)[::3]
    cache = empty_cache(torch.float32)
    step(backend, layer(backend), [(request, 0, 49), (other, 0, 40)], cache)
    wrong = replace(request, blocks=(other.blocks[0], *request.blocks[1:]))
    with pytest.raises(BitwiseMismatch):
        assert_bitwise_equal(step(backend, layer(backend), [(wrong, 49, 50)], cache), request.expected()[49:])


def test_a_layer_that_shares_a_cache_writes_nothing(backend: Any) -> None:
    request = requests(torch.float32)[0]
    cache = empty_cache(torch.float32)
    step(backend, layer(backend), [(request, 0, 50)], cache)
    other = Request((request.qkv[0], *(torch.full_like(x, torch.nan) for x in request.qkv[1:])), request.blocks)
    before = cache.clone()
    out = step(backend, layer(backend, kv_sharing_target_layer_name="layer"), [(other, 20, 50)], cache)
    assert_bitwise_equal(out, request.expected()[20:])
    assert_bitwise_equal(cache, before)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_head_do_not_depend_on_tensor_parallelism(dtype: torch.dtype, degree: int) -> None:
    """A rank has some of the heads; where there are more ranks than key heads, ranks share one."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 2, 8, SIZE, generator=generator).to(dtype)
    caches = [torch.randn(9, BLOCK, 2, SIZE, generator=generator).to(dtype) for _ in range(2)]
    table = torch.arange(9, dtype=torch.int32).reshape(3, 3)
    lengths = torch.tensor([48, 5, 31], dtype=torch.int32)
    whole = cuattn.attention_kvcache(q, *caches, lengths, block_table=table)
    for rank in range(degree):
        heads, key = 8 // degree, rank * 2 // degree
        mine = slice(rank * heads, (rank + 1) * heads)
        part = cuattn.attention_kvcache(
            q[:, :, mine], *(x[:, :, key : key + 1] for x in caches), lengths, block_table=table
        )
        assert_bitwise_equal(part, whole[:, :, mine])


def test_what_the_backend_says_of_itself(backend: Any) -> None:
    own = backend.CuattnBackend
    assert own.get_name() == "CUSTOM"
    assert own.supports_batch_invariance()
    assert own.forward_includes_kv_cache_update
    assert [size for size in (0, 4, 8, 80, 128, 256, 264) if own.supports_head_size(size)] == [8, 80, 128, 256]
    assert own.supports_compute_capability(SimpleNamespace(major=8, minor=0))
    assert not own.supports_compute_capability(SimpleNamespace(major=7, minor=5))


def test_the_profiling_run_has_no_metadata(backend: Any) -> None:
    output = torch.ones(2, HEADS, SIZE)
    assert (layer(backend).forward(None, output, output, output, torch.empty(0), None, output) == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": [1.0]},
        {"sliding_window": 8},
        {"kv_cache_dtype": "fp8"},
        {"logits_soft_cap": 30.0},
        {"attn_type": "encoder_only"},
        {"sinks": torch.zeros(HEADS)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_supported_is_named(backend: Any, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"{next(iter(options))} is not supported"):
        layer(backend, **options)


def test_other_refusals(backend: Any) -> None:
    builder = backend.CuattnMetadataBuilder(None, [], None, torch.device("cpu"))
    batch = described([(requests(torch.float32)[0], 0, 5)])
    for causal in (False, torch.ones(1, dtype=torch.bool)):
        with pytest.raises(NotImplementedError, match="non-causal"):
            builder.build(0, replace(batch, causal=causal))
    x = torch.zeros(1, HEADS, SIZE)
    with pytest.raises(NotImplementedError, match="quantised outputs"):
        layer(backend).forward(None, x, x, x, x, None, x, output_scale=torch.ones(1))


def test_the_plugin_registers_the_backend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_interface.put_in_place(monkeypatch)
    custom = vllm_interface.AttentionBackendEnum.CUSTOM
    plugin.register()
    plugin.register()
    path = "cuattn.integrations.vllm.backend.CuattnBackend"
    assert path == vllm_interface.REGISTERED[custom]
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    vllm_interface.REGISTERED[custom] = "another.Backend"
    plugin.register()
    assert vllm_interface.REGISTERED[custom] == "another.Backend"


def test_the_entry_point_names_the_function() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(r'^\[project\.entry-points\."vllm\.general_plugins"\]\ncuattn = "(.*)"$', text, re.MULTILINE)
    module, _, function = target.partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register
