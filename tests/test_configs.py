"""Which kernels there are: every one fits its architecture, and calls ask for those that are compiled ahead of time."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import config as configs
from cuattn import emulator
from cuattn.config import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    ForwardSm90Config,
    KernelConfig,
    KeysConfig,
    backward_configs,
    columns,
    many_rows,
)
from cuattn.config.columns import ColumnsConfig
from cuattn.launches import Launch


def check_fit(config: KernelConfig, arch: str, blocks: int = 1) -> None:
    """That many blocks share a multiprocessor's memory, of which each takes 1 KiB more than it asks for."""
    memory = ARCHITECTURES[arch]
    assert 0 < config.shared_bytes <= memory, config
    assert blocks * (config.shared_bytes + 1024) <= memory + 1024, config
    assert config.threads % 32 == 0
    assert config.threads <= 1024


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_of_columns_has_a_shape_for_everything(arch: str) -> None:
    for head_dim, value_dim, dtype in product(HEAD_DIMS, HEAD_DIMS, DTYPES):
        for split, paged in product((False, True), repeat=2):
            config = columns(head_dim, value_dim, "causal", dtype, arch, paged, split)
            check_fit(config, arch, config.blocks_per_multiprocessor)
            assert config.ring_slots >= 2
            assert config.key_tile % config.slot_keys == 0
    largest = ColumnsConfig(256, 256, "causal", "float32", arch, split=True)
    with pytest.raises(AssertionError):  # the control: a device with less memory
        check_fit(largest, arch, ARCHITECTURES[arch] // largest.shared_bytes + 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_of_many_rows_fits(arch: str) -> None:
    lengths = ((False, False), (True, False), (True, True))
    for head_dim, dtype, (ragged, paged) in product(HEAD_DIMS, DTYPES, lengths):
        config = many_rows(head_dim, head_dim, "causal", dtype, arch, ragged, paged)
        check_fit(config, arch)
        assert config.ring_slots >= 2


def test_hopper_keeps_queries_in_registers_where_they_fit() -> None:
    for head_dim, value_dim, paged in product(HEAD_DIMS, HEAD_DIMS, (False, True)):
        config = ForwardSm90Config(head_dim, value_dim, "causal", "float16", "sm_90a", paged, paged)
        assert config.ring_slots >= 4, config  # two warpgroups half a step apart use as many
        kept = 4 * config.held_queries  # beside outputs, scores and packed weights
        assert kept + config.value_columns // 2 + config.key_tile * 3 // 4 <= config.consumer_registers, config
        assert not kept or not (paged or head_dim < value_dim), config
    held = {d: ForwardSm90Config(d, d, "full", "bfloat16", "sm_90a").held_queries for d in (64, 96, 128, 192, 256)}
    assert held == {64: 0, 96: 6, 128: 8, 192: 12, 256: 4}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_of_the_backward_pass_fit(arch: str) -> None:
    for head_dim, value_dim, dtype in product(HEAD_DIMS, HEAD_DIMS, DTYPES):
        for config in backward_configs(head_dim, "causal", dtype, arch, value_dim):
            if config.shared_bytes:
                check_fit(config, arch, config.constants["blocks_per_multiprocessor"])
    largest = KeysConfig(256, 256, "float32", arch)
    with pytest.raises(AssertionError):  # the control: a device with less memory
        check_fit(largest, arch, ARCHITECTURES[arch] // largest.shared_bytes + 1)


ASKED = [(64, 64, "float16"), (192, 192, "float16"), (192, 128, "float16"), (64, 64, "float32"), (64, 128, "float32")]


@pytest.mark.parametrize(("head_dim", "value_dim", "dtype"), ASKED)
def test_calls_ask_for_the_kernels_that_are_compiled_ahead_of_time(
    head_dim: int, value_dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[KernelConfig] = set()

    def note(launches: Sequence[Launch]) -> None:
        asked.update(launch.config for launch in launches)

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, dtype)

    monkeypatch.setattr(emulator, "run", note)
    k, v = zeros(2, 2, 1200, head_dim), zeros(2, 2, 1200, value_dim)
    lengths, mask = np.full(2, 700, np.int32), np.ones((2, 1200), bool)
    with cuattn.use_backend("emulator", "sm_80"):
        for rows in (1, 150):
            q = zeros(2, 4, rows, head_dim)
            out = zeros(2, 4, rows, value_dim), np.zeros((2, 4, rows), np.float32)
            cuattn.attention_backward(out[0], q, k, v, *out, "causal")
            cuattn.attention_backward(out[0], q, k, v, *out, "causal", key_padding_mask=mask)
            cuattn.attention(q, k, v, "causal")
            cuattn.attention(q, k, v, "causal", kv_lengths=lengths)
            cuattn.attention(q, k, v, "causal", key_padding_mask=mask)
            cuattn.attention(q, k, v, "causal", num_splits=2)
            cuattn.attention_kvcache(q, k, v, lengths, layout="bhsd")
            new = zeros(2, 2, rows, head_dim), zeros(2, 2, rows, value_dim)
            pages = {"block_table": np.arange(200, dtype=np.int32).reshape(2, 100), "layout": "bhsd"}
            paged = zeros(200, 2, 16, head_dim), zeros(200, 2, 16, value_dim)
            cuattn.attention_kvcache(q, *paged, lengths, **pages, k_new=new[0], v_new=new[1])
            cuattn.append_kv(*new, *paged, lengths, **pages)
            cuattn.combine(cuattn.attention_partials(q, k, v, "causal"), dtype=dtype)
            starts = np.array([0, rows], np.int32), np.array([0, 1200], np.int32)
            cuattn.attention_varlen(*(x[0].swapaxes(0, 1) for x in (q, k, v)), *starts, "causal")
    compiled = configs.attention_configs(head_dim, "causal", dtype, "sm_80", value_dim)
    assert len(set(compiled)) == len(compiled)
    compiled += configs.backward_configs(head_dim, "causal", dtype, "sm_80", value_dim)
    assert asked == {*compiled, *configs.helper_configs("sm_80")}


def test_the_portable_kernels_are_tuned_for_hopper_whatever_its_target_is_called() -> None:
    plain = configs.helper_configs("sm_90")
    for head_dim, dtype, mask in product(HEAD_DIMS, DTYPES, configs.MASKS):
        plain += configs.attention_configs(head_dim, mask, dtype, "sm_90")
        plain += backward_configs(head_dim, mask, dtype, "sm_90")
    for one in plain:
        own = replace(one, arch="sm_90a")
        assert (own.constants, own.threads, own.shared_bytes) == (one.constants, one.threads, one.shared_bytes)
