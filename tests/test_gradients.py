"""torch's autograd and the tensor that ``out`` names: what is written there is not recorded, so autograd is told."""

import re

import pytest
import torch
from backends import REFERENCE, attention_on, on_every_backend

import cuattn
from cuattn.testing.subject import Operation


def ones(**options: bool) -> torch.Tensor:
    return torch.ones(1, 2, 5, 64, dtype=torch.float16, **options)


@pytest.mark.parametrize("leaf", [True, False])
def test_tensors_that_require_grad_are_refused(leaf: bool) -> None:
    q, out = ones(), ones(requires_grad=True)
    message = "out: got a tensor that requires grad, expected one that does not, or torch.no_grad()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cuattn.attention(q, q, q, out=out if leaf else out * 1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_gradients_flow_through_it(name: str) -> None:
    """As for torch's own functions."""
    inputs = {"q": ones(), "k": ones(), "v": ones()} | {name: ones(requires_grad=True)}
    out = ones() * 2
    message = f"out: got a tensor beside {name}, which requires grad, expected None or torch.no_grad()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cuattn.attention(**inputs, out=out)
    assert (out == 2).all()
    with torch.no_grad():
        assert cuattn.attention(**inputs, out=out) is out
    assert (out == 1).all()


@on_every_backend
def test_without_gradients_they_are_written_to(attention: Operation) -> None:
    q, out = ones(requires_grad=True), (ones() * 2).requires_grad_()
    with torch.no_grad():
        assert attention(q, q, q, out=out) is out
    assert (out == 1).all()


@on_every_backend
def test_autograd_learns_of_the_write(attention: Operation) -> None:
    """It refuses a backward pass through a tensor that was overwritten after it was saved."""
    q, weight, out = ones(), ones(requires_grad=True), ones() * 2
    product, versions = (weight * out).sum(), (q._version, out._version)
    attention(q, q, q, out=out)
    assert q._version == versions[0]
    assert out._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_packed_sequences_too() -> None:
    q, starts = ones()[0].transpose(0, 1).contiguous(), torch.tensor([0, 5], dtype=torch.int32)
    out = torch.zeros_like(q)
    before = out._version
    cuattn.attention_varlen(q, q, q, starts, starts, out=out)
    assert out._version > before
    with pytest.raises(ValueError, match=r"^out: got a tensor beside k, which requires grad"):
        cuattn.attention_varlen(q, q.clone().requires_grad_(), q, starts, starts, out=out)
    with pytest.raises(ValueError, match=r"^out: got a tensor that requires grad"):
        cuattn.attention_varlen(q, q, q, starts, starts, out=out.requires_grad_())


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        q, out = ones(), ones() * 2
    assert attention_on(REFERENCE)(q, q, q, out=out) is out
    assert (out == 1).all()
