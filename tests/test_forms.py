"""Forms of arrays: whatever makes tensors differ for a call makes them differ for a check."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cuattn import forms


class Subclass(torch.Tensor):
    pass


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def empty_as_strided(strides: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.empty_strided(x.shape, strides, dtype=x.dtype)


#: Tensors that differ from that of `tensor(2, 3, 8)` in one way.
OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "extent": lambda x: tensor(2, 4, 8).as_strided((2, 4, 8), x.stride()),
    "rank": lambda x: x[None],
    "strides": empty_as_strided((8, 16, 1)),
    "a stride": empty_as_strided((32, 8, 1)),
    "dtype": lambda x: x.bfloat16(),
    "device": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "negated": torch._neg_view,
    "Parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Subclass),
    "functional": torch._to_functional_tensor,
    "no tensor": lambda x: x.numpy(),
    "None": lambda x: None,
}


def check() -> forms.Check:
    made = forms.check_of(torch, [tensor(2, 3, 8), torch.zeros(5, dtype=torch.int32)])
    assert made is not None, "torch has such a check"
    return made


@pytest.mark.parametrize("name", OTHERS)
def test_a_check_knows_each_difference(name: str) -> None:
    check_both, x, numbers = check(), tensor(2, 3, 8), torch.zeros(5, dtype=torch.int32)
    assert check_both(x, numbers)
    assert not check_both(OTHERS[name](x), numbers)
    assert not check_both(x, OTHERS[name](x))
    assert check_both(x, numbers)


def test_a_negated_tensor_cannot_hide() -> None:
    """Bits that a thread's state excludes are not compared."""
    negative = torch._C.DispatchKey.Negative
    x = tensor(2, 3, 8)
    made = forms.check_of(torch, [x])
    assert made is not None
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(negative)):
        unwitnessed = torch._C._dynamo.guards.TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        assert unwitnessed.check(torch._neg_view(x)), "the control: torch's own check says that they are alike"
        assert not made(torch._neg_view(x))
        assert not made(x), "a miss, no more"
        assert forms.check_of(torch, [x]) is None
    with torch._C._IncludeDispatchKeyGuard(negative):
        assert not made(x)
        assert forms.check_of(torch, [x]) is None
    assert made(x)


def test_a_check_serves_the_state_that_it_was_made_in() -> None:
    x = tensor(2, 3, 8)
    for context in (torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")):
        with context():
            made = forms.check_of(torch, [x])
            assert made is not None
            assert made(x)
            assert not made(torch._neg_view(x))


def test_a_check_keeps_no_tensor() -> None:
    x = tensor(2, 3, 8)
    alive = weakref.ref(x)
    made = forms.check_of(torch, [x])
    del x
    assert alive() is None
    assert made is not None
    assert made(tensor(2, 3, 8))


class Unlike:
    """In the place of torch's check: its constructor or its answers are others."""

    def __init__(self, *tensors: torch.Tensor, dynamic_dims_sizes: None, dynamic_dims_strides: None) -> None: ...

    def check(self, *tensors: torch.Tensor) -> bool:
        return True


class Never(Unlike):
    def check(self, *tensors: torch.Tensor) -> bool:
        return False


class Positional(Unlike):
    def __init__(self, tensors: list[torch.Tensor]) -> None: ...


class Unmade(Unlike):
    def __init__(self, *tensors: torch.Tensor, **dims: None) -> None:
        raise RuntimeError("not on this machine")


@pytest.mark.parametrize("other", [None, Unlike, Never, Positional, Unmade])
def test_a_torch_without_such_a_check_has_none(other: type | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if other is None:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", other)
    assert forms.check_of(torch, [tensor(2, 3, 8)]) is None


def test_no_tensors_have_no_check() -> None:
    assert forms.check_of(torch, []) is None


def test_survey() -> None:
    x, y = tensor(2, 3, 8), tensor(4)
    assert forms.survey(torch, (x, None, y)) == ([x.data_ptr(), None, y.data_ptr()], [x, y])
    nested = torch.nested.nested_tensor([x[0], x[1]])
    for other in (x.numpy(), x.as_subclass(Subclass), torch.nn.Parameter(x), nested):
        assert forms.survey(torch, (x, other)) is None
    with pytest.raises(RuntimeError, match="storage"):
        forms.survey(torch, (x.to_sparse(),))


def test_outline() -> None:
    assert forms.outline([160, None, 328, 160, None]) == (0, None, 40, 0, None)
    assert forms.outline([160, 328, None, 160, None]) == (0, 24, None, 0, None)
    assert forms.outline([164, None, 328, 160, None]) == (4, None, 40, 48, None)
    assert forms.outline([160, None, 320, 328, None]) == (0, None, 32, 56, None)


def test_each_once() -> None:
    x, y = tensor(2, 3, 8), tensor(4)
    assert [*map(id, forms.each_once([x, y, x]))] == [id(x), id(y)]
    assert forms.each_once([x, y, x[0]]) == []


def test_forms() -> None:
    x = tensor(2, 3, 8)
    assert forms.forms((x, None)) == ((x.shape, x.stride(), x.dtype, x.device, False), None)
    different = [OTHERS[name](x) for name in ("extent", "rank", "strides", "dtype", "device", "requires_grad")]
    assert len({forms.forms((y,)) for y in (x, *different)}) == 1 + len(different)
    assert forms.forms((x, torch._neg_view(x))) is None
    assert forms.forms((torch.eye(3).to_sparse_csr(),)) is None
