"""Calls that are remembered, and a GPU that computes nothing, for the tests of both."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import cuattn
from cuattn import dispatch, replay
from cuattn.config import KernelConfig
from cuattn.launch import ReadyLaunch, Words
from cuattn.launches import Launch
from cuattn.tensor_map import encode_emulated


class Launched(NamedTuple):
    config: KernelConfig
    grid: int
    argument: bytes
    stream: int
    cluster: int


class Stub:
    """In the place of a loaded kernel."""

    def __init__(self, config: KernelConfig, launched: list[Launched]) -> None:
        self.config, self.launched = config, launched

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stub) and self.config == other.config

    __hash__ = None  # type: ignore[assignment]

    def ready(self, grid: int, words: Words, stream: int, cluster: int) -> ReadyLaunch:
        launched = Launched(self.config, grid, words[1:].tobytes(), stream, cluster)
        return ReadyLaunch(grid, self.config.threads, self.launched.append, (launched,), (words,))  # type: ignore[arg-type]


class Machine:
    """A GPU that computes nothing: ``planned`` are launches of ordinary calls, ``launched`` those of the others."""

    def __init__(self) -> None:
        self.planned: list[Launch] = []
        self.launched: list[Launched] = []

    def run(self, launches: Sequence[Launch]) -> None:
        self.planned += launches


@contextlib.contextmanager
def stand_in() -> Iterator[Machine]:
    """Inside it tensors of the CPU take the part of tensors on such a GPU."""
    made = Machine()
    with (
        patch.multiple(replay, BACKENDS=("emulator",), _is_on_device=lambda x: True, encode=encode_emulated),
        patch.multiple(replay, _current_device=lambda torch: None, _stream=lambda torch, index: 7),
        patch.object(replay, "_bind", lambda index: None),
        patch.object(replay, "loaded", lambda config, index: Stub(config, made.launched)),
        patch.object(dispatch.emulator, "run", made.run),
        cuattn.use_backend("emulator", "sm_90a"),
    ):
        replay.forget()
        yield made
        replay.forget()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16)


def qkv(rows: int = 70, keys: int = 700) -> tuple[torch.Tensor, ...]:
    return normal(2, 4, rows, 64), normal(2, 2, keys, 64), normal(2, 2, keys, 64)


def padded() -> Any:
    return cuattn.attention(*qkv(), "causal", key_padding_mask=torch.rand(2, 700) < 0.5)


def lengths() -> Any:
    return cuattn.attention(*qkv(), kv_lengths=torch.tensor([3, 700], dtype=torch.int32), return_lse=True)


def packed() -> Any:
    starts = (torch.tensor([0, 30, 70], dtype=torch.int32), torch.tensor([0, 200, 700], dtype=torch.int32))
    return cuattn.attention_varlen(normal(70, 4, 64), normal(700, 2, 64), normal(700, 2, 64), *starts, "causal")


def cached() -> Any:
    caches = normal(9, 16, 2, 64), normal(9, 16, 2, 64)
    table = torch.tensor([[7, 0], [4, 2]], dtype=torch.int32)
    new = normal(2, 1, 2, 64), normal(2, 1, 2, 64)
    numbers = torch.tensor([5, 20], dtype=torch.int32)
    versions = [x._version for x in caches]
    out = cuattn.attention_kvcache(normal(2, 1, 4, 64), *caches, numbers, block_table=table, k_new=new[0], v_new=new[1])
    assert all(x._version > before for x, before in zip(caches, versions, strict=True))
    return out


def gradients() -> Any:
    arrays = qkv()
    return cuattn.attention_backward(
        normal(2, 4, 70, 64), *arrays, normal(2, 4, 70, 64), torch.randn(2, 4, 70), "causal", dlse=torch.randn(2, 4, 70)
    )


def packed_gradients() -> Any:
    starts = (torch.tensor([0, 30, 70], dtype=torch.int32), torch.tensor([0, 200, 700], dtype=torch.int32))
    arrays = normal(70, 4, 64), normal(700, 2, 64), normal(700, 2, 64)
    return cuattn.attention_varlen_backward(normal(70, 4, 64), *arrays, normal(70, 4, 64), torch.randn(4, 70), *starts)


CALLS: dict[str, Callable[[], Any]] = {
    "many rows": lambda: cuattn.attention(*qkv(), "causal"),
    "few rows": lambda: cuattn.attention(*qkv(1, 3000), scale=-0.5, return_lse=True),
    "splits": lambda: cuattn.attention(*qkv(), num_splits=3),
    "padded": padded,
    "lengths": lengths,
    "packed": packed,
    "cached": cached,
    "gradients": gradients,
    "packed gradients": packed_gradients,
}
