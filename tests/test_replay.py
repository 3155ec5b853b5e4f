"""Remembered calls: what is launched again is what would be planned anew, and what differs is noticed."""

import array
import ctypes
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from remembered_calls import CALLS, Machine, normal, qkv, stand_in

import cuattn
from cuattn import dispatch, replay
from cuattn.interop import import_tensor
from cuattn.launches import Launch
from cuattn.params import ForwardSm90Params, TensorMapBytes, mapped
from cuattn.problem import Problem
from cuattn.tensor_map import BYTES, TensorMap, encode_emulated


@pytest.fixture
def machine() -> Iterator[Machine]:
    with stand_in() as made:
        yield made


def remembered() -> replay._Call:
    (only,) = replay._remembered.values()
    return only


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_the_same_form_is_launched_as_planned(machine: Machine, name: str) -> None:
    first = CALLS[name]()
    planned, known = machine.planned.copy(), remembered()
    second = CALLS[name]()
    assert machine.planned == planned, "the second call is not planned"
    assert [(x.config, x.grid, x.stream, x.cluster) for x in machine.launched] == [
        (x.config, x.grid, 7, x.cluster) for x in planned
    ]
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, second)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    replay.forget()
    CALLS[name]()
    assert vars(remembered()) == vars(known), "planned anew for other arrays, it is the same but for their addresses"


@pytest.mark.parametrize("name", CALLS)
def test_every_pointer_is_that_of_the_call(machine: Machine, name: str) -> None:
    CALLS[name]()
    known = remembered()
    given = len(known.spans)
    arrays = tuple(torch.zeros(1) if span else None for span in known.spans)
    results = known.run(torch, arrays, [None if x is None else x.data_ptr() for x in arrays])
    results = results if isinstance(results, tuple) else (results,)
    workspace: dict[int, set[int]] = {}
    for launch, prepared in zip(machine.launched, known.launches, strict=True):
        rest = array.array("Q", bytes(8) + launch.argument)
        for place, number in prepared.pointers:
            pointer, rest[place] = rest[place], 0
            if number < given:
                assert pointer == arrays[number].data_ptr()
            elif number < given + len(results):
                assert pointer == results[number - given].data_ptr()
            else:
                workspace.setdefault(number - given - len(results), set()).add(pointer)
        for part, number, words_at in prepared.maps:
            assert rest[part] == words_at((*arrays, *results)[number].data_ptr())
            rest[part] = array.array("Q", bytes(BYTES))
        assert rest == prepared.words
    starts = {min(addresses) - known.offsets[number] for number, addresses in workspace.items()}
    assert all(len(addresses) == 1 for addresses in workspace.values())
    assert len(starts) == (1 if known.offsets else 0), "one allocation, in which each array has its place"
    assert sorted(workspace) == list(range(len(known.offsets)))


class MappedParams(ctypes.Structure):
    """Arguments of a kernel that reads keys through the copy engine."""

    _fields_ = mapped([("key_map", TensorMapBytes), ("value_map", TensorMapBytes), ("out", ctypes.c_void_p)])


def with_maps(planned: list[Launch], problem: Problem) -> list[Launch]:
    """The launches, each with maps in front; rows of a box as many as the launch's number, counted from 1."""
    maps = [
        {"key_map": TensorMap.of(problem.key, i + 1), "value_map": TensorMap.of(problem.value, i + 1)}
        for i in range(len(planned))
    ]
    params = [MappedParams(out=one.outputs["out"].pointer) for one in planned]
    return [replace(x, params=p, tensor_maps=m) for x, p, m in zip(planned, params, maps, strict=True)]


def test_maps_are_those_of_the_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dispatch.plan_forward
    monkeypatch.setattr(dispatch, "plan_forward", lambda problem, *rest: with_maps(plan(problem, *rest), problem))
    first, second = qkv(), qkv()
    cuattn.attention(*first)
    (planned,) = machine.planned
    out = cuattn.attention(*second)
    assert len(machine.planned) == 1
    (launched,) = machine.launched
    maps = [
        planned.tensor_maps[name].at(x.data_ptr()) for name, x in (("key_map", second[1]), ("value_map", second[2]))
    ]
    assert maps[0].dims == (64, 700, 2, 2)
    assert launched.argument[:256] == b"".join(map(encode_emulated, maps))
    assert launched.argument[256:] == struct.pack("=Q", out.data_ptr()) + bytes(56)


def test_a_map_of_an_unknown_array_is_not_remembered(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, elsewhere = dispatch.plan_forward, import_tensor(normal(2, 2, 700, 64), "k")

    def planned(problem: Problem, *rest: Any) -> list[Launch]:
        return with_maps(plan(problem, *rest), replace(problem, key=elsewhere))

    monkeypatch.setattr(dispatch, "plan_forward", planned)
    cuattn.attention(*qkv())
    assert replay._remembered == {}


def test_another_form_is_another_call(machine: Machine) -> None:
    q, k, v = qkv()
    calls = [
        lambda: cuattn.attention(q, k, v),
        lambda: cuattn.attention(q, k, v, "causal"),
        lambda: cuattn.attention(q, k, v, scale=1),
        lambda: cuattn.attention(q, k, v, scale=1.0),
        lambda: cuattn.attention(q, k, v, return_lse=True),
        lambda: cuattn.attention(q[:1], k[:1], v[:1]),
        lambda: cuattn.attention(q, k[:, :, ::2], v[:, :, ::2]),
        lambda: cuattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()),
        lambda: cuattn.attention(q, k, v, num_splits=1),
    ]
    for number, one in enumerate(calls):
        one()
        assert len(replay._remembered) == number + 1
    assert machine.launched == []
    with pytest.raises(TypeError, match="num_splits: got bool"):
        cuattn.attention(q, k, v, num_splits=True)  # which equals 1


def test_another_target_is_another_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = qkv()
    for target in ("sm_90a", "sm_90", None):
        if target:
            monkeypatch.setenv("CUATTN_ARCH", target)
        else:
            monkeypatch.delenv("CUATTN_ARCH")
        cuattn.attention(*arrays)
    assert len(machine.planned) == len(replay._remembered) == 3
    cuattn.attention(*arrays)
    assert len(machine.planned) == 3


def test_what_a_remembered_call_cannot_know_is_checked_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    cuattn.attention(q, k, v)
    planned = len(machine.planned)
    monkeypatch.setenv("CUATTN_CHECK", "1")
    cuattn.attention(q, k, v)
    monkeypatch.delenv("CUATTN_CHECK")
    cuattn.attention(torch._neg_view(q), k, v)
    cuattn.attention(torch.nn.Parameter(q, requires_grad=False), k, v)
    with pytest.raises(ValueError, match=r"q: got memory at a multiple of 2 bytes"):
        cuattn.attention(torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape), k, v)
    assert len(machine.planned) == 4 * planned
    cuattn.attention(q, k, v)
    assert len(machine.planned) == 4 * planned
    with cuattn.use_backend("emulator", "sm_80"):
        cuattn.attention(q, k, v)
    assert len(machine.planned) == 5 * planned


def test_what_has_no_form_is_refused_as_ever(machine: Machine) -> None:
    q, k, v = qkv()
    cuattn.attention(q, k, v)
    with pytest.raises(TypeError, match=r"q: got a tensor of layout torch\.sparse_coo"):
        cuattn.attention(q.to_sparse(), k, v)
    with pytest.raises(TypeError, match="k: got a nested tensor"):
        cuattn.attention(q, torch.nested.nested_tensor([k[0], k[1]]), v)
    with pytest.raises((TypeError, ValueError), match="layout: got "):
        cuattn.attention(q, k, v, layout=["bhsd"])
    assert len(replay._remembered) == 1


def test_empty_arrays_are_not_remembered(machine: Machine) -> None:
    q, k, v = qkv()
    for _ in range(2):
        cuattn.attention(q, k[:, :, :0], v[:, :, :0])
        cuattn.attention(q[:0], k[:0], v[:0])
    assert replay._remembered == {}


def test_arrays_that_are_one_are_remembered_as_one(machine: Machine) -> None:
    """As lengths of packed queries and keys often are: such a call is none with two arrays, and the other way round."""
    q, k, v = (normal(70, 2, 64) for _ in range(3))
    starts = torch.tensor([0, 30, 70], dtype=torch.int32)
    pairs = (starts, starts), (starts.clone(), starts.clone())
    for pair in pairs:
        cuattn.attention_varlen(q, k, v, *pair)
    assert (len(machine.planned), len(replay._remembered)) == (2, 2)
    for pair in pairs:
        cuattn.attention_varlen(q, k, v, *pair)
    assert len(machine.planned) == 2
    for launched, pair in zip(machine.launched, pairs, strict=True):
        sequences = ForwardSm90Params.from_buffer_copy(launched.argument).call.forward.sequences
        assert [sequences.query_starts, sequences.key_starts] == [x.data_ptr() for x in pair]


def test_caches_that_overlap_are_refused_each_time(machine: Machine) -> None:
    numbers = torch.tensor([5], dtype=torch.int32)
    memory = normal(3, 64, 2, 64)
    q, new = normal(1, 1, 4, 64), (normal(1, 1, 2, 64), normal(1, 1, 2, 64))
    for _ in range(2):
        cuattn.attention_kvcache(q, memory[:1], memory[1:2], numbers, k_new=new[0], v_new=new[1])
    assert machine.launched
    overlapping = memory.view(-1)[64 * 2 * 64 - 128 :][: 64 * 2 * 64].view(1, 64, 2, 64)
    with pytest.raises(ValueError, match="got the memory of"):
        cuattn.attention_kvcache(q, memory[:1], overlapping, numbers, k_new=new[0], v_new=new[1])


def test_memory_is_bounded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LARGEST_MEMORY", 2)
    for rows in (65, 66, 67):
        cuattn.attention(*qkv(rows))
    assert len(replay._remembered) == 1


@pytest.mark.gpu
def test_on_a_device_remembered_calls_have_the_same_bits() -> None:
    q, k, v, dout = (torch.randn(2, 4, 130, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    replay.forget()

    def step() -> tuple[torch.Tensor, ...]:
        out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
        return out, lse, *cuattn.attention_backward(dout, q, k, v, out, lse, "causal")

    first = step()
    assert len(replay._remembered) == 2
    for _ in range(3):  # looked up, and then known in one step
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            again = step()
            torch.cuda.current_stream().synchronize()
        assert len(replay._remembered) == 2
        for a, b in zip(first, again, strict=True):
            cuattn.testing.assert_bitwise_equal(a, b)
    q.add_(1)
    with pytest.raises(cuattn.testing.BitwiseMismatch):  # the control
        cuattn.testing.assert_bitwise_equal(step()[0], first[0])
