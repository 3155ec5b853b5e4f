"""Remembered calls are known in one step where torch has it, and without it; no other call is taken for one."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from remembered_calls import CALLS, Machine, normal, qkv, stand_in

import cuattn
from cuattn import env, forms, replay

STARTS = torch.tensor([0, 30, 70], dtype=torch.int32)


@pytest.fixture(params=["in one step", "one by one"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """With torch's private functions, and with a torch that has none of them."""
    if request.param == "one by one":
        for name in ("TensorGuards", "_empty_strided_cpu"):
            monkeypatch.delattr(torch._C._dynamo.guards, name)
    with stand_in() as made:
        yield made


@pytest.mark.parametrize(
    "other", [lambda shape, strides: torch.empty(shape), lambda shape, strides, dtype: torch.empty(shape)]
)
def test_an_allocator_is_tried_first(monkeypatch: pytest.MonkeyPatch, other: Callable[..., Any]) -> None:
    assert replay._empty(torch, torch.device("cpu")) is torch._C._dynamo.guards._empty_strided_cpu
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", other)
    made = replay._empty(torch, torch.device("cpu"))((2, 4), (8, 1), torch.float16)
    assert (made.shape, made.stride(), made.dtype, made.device) == ((2, 4), (8, 1), torch.float16, torch.device("cpu"))


@contextlib.contextmanager
def in_one_step() -> Iterator[None]:
    """Inside it no form is looked up."""
    with patch.object(forms, "forms", side_effect=AssertionError("a form is looked up")):
        yield


def replayed(machine: Machine, call: Callable[[], Any]) -> bool:
    """Whether a call launches what is remembered; False if it is planned anew or refused."""
    machine.launched.clear()
    planned = len(machine.planned)
    with contextlib.suppress(TypeError, ValueError):
        call()
    assert not (machine.launched and len(machine.planned) > planned)
    return bool(machine.launched)


@pytest.mark.parametrize("name", CALLS)
def test_the_third_call_is_known_in_one_step(name: str) -> None:
    with stand_in() as machine:
        for _ in range(2):
            CALLS[name]()
        with in_one_step():
            assert replayed(machine, CALLS[name])


def test_arrays_that_are_one_are_known_in_one_step() -> None:
    def packed() -> Any:
        starts = STARTS.clone()
        return cuattn.attention_varlen(normal(70, 2, 64), normal(70, 2, 64), normal(70, 2, 64), starts, starts)

    with stand_in() as machine:
        for _ in range(2):
            packed()
        with in_one_step():
            assert replayed(machine, packed)


def test_several_forms_take_turns() -> None:
    several = [qkv(rows) for rows in range(65, 65 + replay.MOST_RECENT)]
    with stand_in() as machine:
        for _ in range(2):
            for arrays in several:
                cuattn.attention(*arrays)
        with in_one_step():
            for arrays in several:
                assert replayed(machine, lambda arrays=arrays: cuattn.attention(*arrays))
        for rows in (3, 4, 3, 4):  # of another kernel
            cuattn.attention(*qkv(rows))
        for arrays in several:
            assert replayed(machine, lambda arrays=arrays: cuattn.attention(*arrays))
        (situation,) = {situation for situation, _ in replay._remembered}
        assert len(situation.recent) == replay.MOST_RECENT


def displaced(x: torch.Tensor, elements: int) -> torch.Tensor:
    """The same, so many elements behind a multiple of 64 bytes."""
    memory = torch.empty(x.numel() + 64, dtype=x.dtype)
    start = -memory.data_ptr() % 64 // x.element_size() + elements
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


class Subclass(torch.Tensor):
    pass


def other_tensor(change: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    return lambda q, k, v, numbers: cuattn.attention(q, change(k), v, kv_lengths=numbers)


def other_numbers(change: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    return lambda q, k, v, numbers: cuattn.attention(q, k, v, kv_lengths=change(numbers))


def other_options(**options: Any) -> Callable[..., Any]:
    return lambda q, k, v, numbers: cuattn.attention(q, k, v, kv_lengths=numbers, **options)


def inside(context: Callable[[], Any]) -> Callable[..., Any]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, numbers: torch.Tensor) -> Any:
        with context():
            return cuattn.attention(q, k, v, kv_lengths=numbers)

    return call


#: Calls that differ from ``attention(q, k, v, kv_lengths=numbers)`` in one way.
OTHERS: dict[str, Callable[..., Any]] = {
    "extent": lambda q, k, v, n: cuattn.attention(q, k[:, :, :600], v[:, :, :600], kv_lengths=n),
    "strides": other_tensor(lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)),
    "dtype": lambda q, k, v, n: cuattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), kv_lengths=n),
    "dtype of one": other_tensor(torch.Tensor.bfloat16),
    "device of one": other_numbers(lambda numbers: numbers.to("meta")),
    "requires_grad": inside(torch.no_grad),
    "alignment": other_numbers(lambda numbers: displaced(numbers, 1)),
    "too little alignment": other_tensor(lambda k: displaced(k, 1)),
    "arrays that are one": lambda q, k, v, n: cuattn.attention(q, k, k, kv_lengths=n),
    "arrays with one start": lambda q, k, v, n: cuattn.attention(q, k, k.view(k.shape), kv_lengths=n),
    "None": other_numbers(lambda numbers: None),
    "another is None": lambda q, k, v, n: cuattn.attention(q, k, v, key_padding_mask=n),
    "mask": other_options(mask="causal"),
    "a number's type": other_options(num_splits=True),
    "a number": other_options(num_splits=2),
    "CUATTN_CHECK": inside(lambda: patch.dict("os.environ", {env.CHECK: "1"})),
    "CUATTN_ARCH": inside(lambda: patch.dict("os.environ", {env.ARCH: "sm_90"})),
    "CUATTN_BACKEND": inside(lambda: patch.dict("os.environ", {env.BACKEND: "reference"})),
    "backend": inside(lambda: cuattn.use_backend("emulator", "sm_80")),
    "grad mode": inside(torch.no_grad),
    "current device": inside(lambda: patch.object(replay, "_current_device", lambda torch: 1)),
    "Parameter": other_tensor(lambda k: torch.nn.Parameter(k, requires_grad=False)),
    "subclass": other_tensor(lambda k: k.as_subclass(Subclass)),
    "negated": other_tensor(torch._neg_view),
    "nested": other_tensor(lambda k: torch.nested.nested_tensor([k[0], k[1]])),
    "sparse": other_tensor(torch.Tensor.to_sparse),
    "another library": other_tensor(torch.Tensor.numpy),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_not_taken_for_a_known_one(machine: Machine, name: str) -> None:
    q, k, v = qkv()
    numbers = displaced(torch.tensor([3, 700], dtype=torch.int32), 0)

    def known() -> Any:
        return cuattn.attention(q, k, v, kv_lengths=numbers, num_splits=1 if "number" in name else None)

    for _ in range(3):
        known()
    assert replayed(machine, known)
    if name == "requires_grad":  # of one, while torch records no gradients
        with torch.no_grad():
            known()
            assert replayed(machine, known)
            k.requires_grad_()
    assert not replayed(machine, lambda: OTHERS[name](q, k, v, numbers))
    k.requires_grad_(False)
    assert replayed(machine, known), "what came between has changed nothing"


def of_one_start(pattern: str) -> Callable[[], Any]:
    """A call whose q, k and v start at one place, each in the form x or s."""
    x = normal(70, 2, 64)
    given = {"x": x, "s": x.as_strided((70, 2, 64), (64, 64, 1))}
    return lambda: cuattn.attention_varlen(*(given[form] for form in pattern), STARTS, STARTS)


PATTERNS = ("xxx", "xxs", "xsx", "xss", "sxx", "sss")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_which_arrays_are_one_is_part_of_what_is_known(machine: Machine, pattern: str) -> None:
    known = of_one_start(pattern)
    for _ in range(3):
        known()
    for other in PATTERNS:
        call = of_one_start(other)
        assert replayed(machine, call) == (other == pattern), other
        assert replayed(machine, call), other
        assert replayed(machine, known), other


def test_a_known_call_goes_to_the_stream_of_the_moment(machine: Machine) -> None:
    arrays = qkv()
    kept = [cuattn.attention(*arrays) for _ in range(3)]
    for stream in (8, 7, 8):
        with patch.object(replay, "_stream", lambda torch, index, stream=stream: stream):
            machine.launched.clear()
            kept[-1] = cuattn.attention(*arrays)
            assert [x.stream for x in machine.launched] == [stream]


def test_threads_make_the_same_call_each_with_its_own_arrays(machine: Machine) -> None:
    wrong: list[int] = []

    def repeat() -> None:
        q, k, v = qkv()
        with cuattn.use_backend("emulator", "sm_90a"):
            for _ in range(50):
                out = cuattn.attention(q, k, v)
                pointers = [x.data_ptr().to_bytes(8, "little") for x in (q, k, v, out)]
                mine = [x for x in machine.launched if all(pointer in x.argument for pointer in pointers)]
                if not mine:
                    wrong.append(out.data_ptr())

    cuattn.attention(*qkv())
    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(machine.launched) == 200
