"""The generated unit: what it says, and what cannot be in it."""

import inspect
import re
from dataclasses import replace

import cuattn.config
from cuattn import contract, jit
from cuattn.config import KernelConfig, select_config

CONFIG = select_config(64, "causal", "bfloat16", "sm_80")


def test_the_unit_names_the_configuration_and_its_constants() -> None:
    source = jit.kernel_source(CONFIG)
    assert source.startswith(f"// {CONFIG.name}, contract version {contract.CONTRACT_VERSION}\n")
    assert source.endswith("#include <forward_sm80.cuh>\n")
    constants = dict(re.findall(r"constexpr \w+ (\w+) = (\w+);", source))
    assert constants.pop("causal") == constants.pop("bfloat16") == "true"
    assert constants.pop("ragged") == "false"
    assert {name: int(value) for name, value in constants.items()} == {
        "contract_version": contract.CONTRACT_VERSION,
        **{
            name: getattr(CONFIG, name)
            for name in (
                "head_dim",
                "tile_dim",
                "key_tile",
                "warps",
                "blocks_per_multiprocessor",
                "query_tile",
                "ring_slots",
                "shared_bytes",
            )
        },
    }
    assert "bool causal = false" in jit.kernel_source(replace(CONFIG, mask="full"))


def test_the_unit_has_the_chunk_table_of_the_contract() -> None:
    (expression,) = re.findall(r"return (.*);", jit.kernel_source(CONFIG))
    for start in (0, 1, 2047, 2048, 16383, 16384, 65535, 65536, 10**9):
        chosen = next(
            int(length)
            for first, length in re.findall(r"(?:start >= (\d+) \? )?(\d+)(?: : |$)", expression)
            if not first or start >= int(first)
        )
        assert chosen == contract.chunk_length(start)


def sees_the_batch(source: str) -> bool:
    return re.search(r"batch|split|sm_?count|seq|num_|length(?!\(int start\))", source, re.IGNORECASE) is not None


def test_nothing_of_the_batch_can_reach_a_unit() -> None:
    assert list(inspect.signature(jit.kernel_source).parameters) == ["config"]
    assert set(KernelConfig.__dataclass_fields__) == {"head_dim", "mask", "dtype", "arch", "ragged", "kernel"}
    for arch in cuattn.config.ARCHITECTURES:
        for config in cuattn.config.all_configs(arch):
            assert not sees_the_batch(jit.kernel_source(config))
    assert sees_the_batch(jit.kernel_source(CONFIG).replace("int warps", "int num_splits"))
