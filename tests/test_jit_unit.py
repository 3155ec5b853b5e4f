"""The generated unit: what it says, and what cannot be in it."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from cuattn import config as configs
from cuattn import contract, jit
from cuattn.config import (
    AppendConfig,
    ColumnsConfig,
    CombineConfig,
    CompactConfig,
    DecodeConfig,
    ForwardConfig,
    ForwardSm90Config,
    KernelConfig,
    KeysConfig,
    QueriesConfig,
    RowsConfig,
    ScanConfig,
    few_rows,
    many_rows,
)

CONFIG = many_rows(64, 64, "causal", "bfloat16", "sm_80", ragged=False, paged=False)
EXAMPLES = [
    CONFIG,
    many_rows(128, 128, "full", "float16", "sm_90a", ragged=True, paged=True),
    many_rows(192, 128, "causal", "float32", "sm_86", ragged=False, paged=False),
    few_rows(256, 256, "full", "bfloat16", "sm_80", paged=True),
    CombineConfig(64, "float32", "sm_80"),
    AppendConfig("sm_80"),
    ScanConfig("sm_80"),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.name)
def test_the_unit_names_the_configuration_and_its_constants(config: KernelConfig) -> None:
    source = jit.kernel_source(config)
    assert source.startswith(f"// {config.name}, contract version {contract.CONTRACT_VERSION}\n")
    assert source.endswith(f"#include <{config.kernel}.cuh>\n")
    expected = {
        "contract_version": contract.CONTRACT_VERSION,
        **config.constants,
        "shared_bytes": config.shared_bytes,
    }
    constants = re.findall(r"^constexpr (\w+) (\w+) = (\w+);$", source, re.MULTILINE)
    assert [name for _, name, _ in constants] == list(expected)
    for kind, name, value in constants:
        assert (kind, value) == (type(expected[name]).__name__, str(expected[name]).lower())
    # every field but the architecture, which the compiler's flag has, is in the constants
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "mask":
            assert config.constants["causal"] == (value == "causal")
        elif field.name == "dtype":
            is_dtype = {name: config.constants.get(name, False) for name in ("bfloat16", "float32")}
            assert is_dtype == {name: name == value for name in is_dtype}
        elif field.name != "arch":
            assert config.constants[field.name] == value


def test_the_unit_follows_the_configuration() -> None:
    assert "bool causal = true" in jit.kernel_source(CONFIG)
    assert "bool causal = false" in jit.kernel_source(replace(CONFIG, mask="full"))


def evaluate(source: str, function: str, value: int) -> int:
    """What a function of the unit returns."""
    found = re.search(rf"int {function}\(int (\w+)\) {{\n    return (.*);\n", source)
    assert found, f"no {function}"
    for case in found[2].replace("/", "//").split(" : "):
        *condition, result = case.split(" ? ")
        if not condition or eval(condition[0], {found[1]: value}):
            return eval(result, {found[1]: value, "larger": max, "smaller": min})
    raise AssertionError(found[2])


def test_the_unit_has_the_chunk_table_of_the_contract() -> None:
    source = jit.kernel_source(CONFIG)
    edges = [first + step for first, _ in contract.CHUNK_TABLE for step in (-513, -512, -511, -1, 0, 1, 511, 512, 513)]
    for keys in (*(edge for edge in edges if edge >= 0), 10**9):
        assert evaluate(source, "chunk_length", keys) == contract.chunk_length(keys)
        assert evaluate(source, "chunk_count", keys) == contract.chunk_count(keys)
    for chunk in (0, 1, 3, 4, 5, 17, 18, 19, 41, 42, 43, 500_000):
        assert evaluate(source, "chunk_start", chunk) == contract.chunk_start(chunk)
    assert evaluate(source.replace("start >= 2048", "start >= 1024"), "chunk_length", 1024) != 512  # the control


#: What a configuration may depend on.
FACTS = {
    "head_dim",
    "value_dim",
    "mask",
    "dtype",
    "arch",
    "ragged",
    "paged",
    "split",
    "few",
    "rows",
    "row_blocks",
    "boxes",
    "out_boxes",
}


def all_configs() -> Iterator[KernelConfig]:
    for arch in configs.ARCHITECTURES:
        for head_dim, mask, dtype in product(configs.HEAD_DIMS, configs.MASKS, configs.DTYPES):
            yield from configs.attention_configs(head_dim, mask, dtype, arch)
            yield from configs.backward_configs(head_dim, mask, dtype, arch)
        yield from configs.attention_configs(192, "causal", "bfloat16", arch, 128)
        yield from configs.helper_configs(arch)


def sees_the_batch(source: str) -> bool:
    """Whether a unit names something of a call; whether a kernel can split chunks over blocks is none of that."""
    words = r"batch|splits|num_|sm_?count|processor_count|seq|(?<!chunk_)length"
    return re.search(words, source, re.IGNORECASE) is not None


def test_nothing_of_the_batch_can_reach_a_unit() -> None:
    assert list(inspect.signature(jit.kernel_source).parameters) == ["config"]
    for choice in (many_rows, few_rows):
        assert set(inspect.signature(choice).parameters) <= FACTS
    kinds = set()
    for config in all_configs():
        kinds.add(type(config))
        assert not sees_the_batch(jit.kernel_source(config))
    assert kinds == {
        *(ForwardConfig, ForwardSm90Config, DecodeConfig, ColumnsConfig, CombineConfig, AppendConfig, ScanConfig),
        *(RowsConfig, CompactConfig, KeysConfig, QueriesConfig),
    }
    for kind in kinds:
        fields = {field.name for field in dataclasses.fields(kind)}
        assert fields <= FACTS, kind
    for name in ("num_splits", "batch", "key_length", "seqlen"):
        assert sees_the_batch(jit.kernel_source(CONFIG).replace("int warps", f"int {name}"))
