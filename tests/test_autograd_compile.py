"""Attention as an operator: torch.library's own checks, torch.compile, tracing, tensors without data."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from training import (
    assert_all_equal,
    assert_trains,
    both,
    causal,
    expected,
    expected_packed,
    gradients,
    inputs,
    normal,
    packed,
    upstream,
)

import cuattn
from cuattn.autograd import operators

LENGTHS = torch.tensor([4, 0], dtype=torch.int32)
PADDING = torch.arange(14).reshape(2, 7) % 3 > 0


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [(None, None), (PADDING, None), (None, LENGTHS)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout: str, options: tuple[Any, ...]) -> None:
    qkv = inputs(layout=layout)
    torch.library.opcheck(torch.ops.cuattn.attention, (*qkv, *options, "causal", None, layout, None))
    results = operators.ATTENTION(*(x.detach() for x in qkv), *options, "causal", None, layout, None)
    dout, dlse = upstream(*results)
    plain = (dout, *(x.detach() for x in qkv), *results, dlse, *options, "causal", 0.3, layout)
    torch.library.opcheck(torch.ops.cuattn.attention_backward, plain)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_packed_sequences() -> None:
    qkv, starts = packed()
    torch.library.opcheck(torch.ops.cuattn.attention_varlen, (*qkv, *starts, "full", 0.2, 3))
    plain = tuple(x.detach() for x in qkv)
    out, lse = operators.VARLEN(*plain, *starts, "full", 0.2, 3)
    arguments = (out, *plain, out, lse, None, *starts, "full", 0.2)
    torch.library.opcheck(torch.ops.cuattn.attention_varlen_backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_functions_have_the_same_bits(compiler: str, dynamic: bool) -> None:
    compiled = torch.compile(both, fullgraph=True, backend=compiler, dynamic=dynamic)
    assert_trains(compiled, inputs())
    if dynamic and compiler == "aot_eager":
        for options in ({"kv_lengths": LENGTHS}, {"key_padding_mask": PADDING}, {"scale": 0.3, "num_splits": 2}):
            wanted = {name: value for name, value in options.items() if name != "num_splits"}
            assert_trains(functools.partial(compiled, **options), inputs(), **wanted)
        assert_trains(compiled, inputs(3, 9, 12))
        assert_trains(functools.partial(compiled, layout="bshd"), inputs(layout="bshd"), layout="bshd")


def test_compiled_packed_sequences() -> None:
    def function(*arrays: Tensor, bound: int) -> Any:
        return cuattn.attention_varlen(*arrays, "causal", return_lse=True, max_seqlen_q=bound, max_seqlen_k=bound)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (((3, 6), (0, 2), (5, 5)), ((4, 4), (9, 10))):
        qkv, starts = packed(lengths)
        results = compiled(*qkv, *starts, bound=max(max(pair) for pair in lengths))
        given = upstream(*results)
        assert_all_equal(gradients(results, qkv, given), expected_packed(qkv, starts, "causal", *given))


def test_operations_around_it_are_compiled_with_it() -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).unbind(2)
        return cuattn.attention(q, k, v, "causal", layout="bshd").flatten(2)

    x, weight = normal(2, 6, 32), normal(32, 192, seed=1).requires_grad_()
    out = torch.compile(step, fullgraph=True, backend="inductor")(x, weight)
    dout = upstream(out)[0]
    wanted = step(x, weight)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(out, (weight,), dout), gradients(wanted, (weight,), dout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_without_autograd_can_be_compiled() -> None:
    qkv = tuple(x.detach() for x in inputs())
    results = both(*qkv)
    given = upstream(*results)
    compiled = torch.compile(
        lambda dout, dlse: cuattn.attention_backward(dout, *qkv, *results, "causal", dlse=dlse),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_all_equal(compiled(*given), expected(qkv, "causal", *given))


def test_the_first_call_may_be_compiled() -> None:
    """The operators are then defined while torch traces."""
    program = (
        "import torch, cuattn, sys; assert 'cuattn.autograd' not in sys.modules\n"
        "f = torch.compile(lambda x: cuattn.attention(x, x, x), fullgraph=True, backend='aot_eager')\n"
        "x = torch.ones(1, 1, 3, 8, requires_grad=True); f(x).sum().backward(); print(round(x.grad.sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "24\n", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "triangle"}, "mask: got 'triangle', expected one of 'full', 'causal'"),
        ({"mask": torch.ones(2)}, "mask: got "),
        ({"layout": "sbhd"}, "layout: got 'sbhd', expected"),
        ({"scale": float("nan")}, "scale: got nan, expected None or a finite float"),
        ({"num_splits": 0}, "num_splits: got 0, expected None or an int of at least 1"),
        ({"q": torch.ones(4, 5, 16)}, "q: got shape (4, 5, 16), expected 4 dimensions (B, H, L, D)"),
        ({"k": torch.ones(2, 3, 7, 16)}, "q: got 4 heads, expected a multiple of the 3 heads of k and v"),
        ({"kv_lengths": LENGTHS.long()}, "kv_lengths: got dtype int64, expected int32"),
        ({"out": torch.ones(2, 4, 5, 24)}, "out: got a tensor beside q, which requires grad"),
    ],
)
def test_errors_of_compiled_functions_are_readable(options: dict[str, Any], message: str) -> None:
    arguments = dict(zip("qkv", inputs(), strict=True)) | options
    if options.keys() == {"k"}:
        arguments["v"] = options["k"]
    with pytest.raises(Exception) as caught:  # torch's own kinds, around ours
        torch.compile(lambda a: cuattn.attention(**a), fullgraph=True, backend="aot_eager")(arguments)
    assert message in str(caught.value)


def test_a_compiled_function_fills_out() -> None:
    qkv = tuple(x.detach() for x in inputs())
    out = torch.zeros(2, 4, 5, 24)
    compiled = torch.compile(lambda *qkv, out: causal(*qkv, out=out), fullgraph=True, backend="aot_eager")
    assert compiled(*qkv, out=out) is out
    assert_all_equal([out], [causal(*qkv)])
    for wrong in (torch.zeros(2, 4, 1, 24), torch.zeros(2, 4, 5, 24, dtype=torch.float16)):
        with pytest.raises(Exception, match="out: got shape, dtype and device"):
            compiled(*qkv, out=wrong)


def test_compiled_autograd() -> None:
    qkv = inputs()
    results = both(*qkv)
    given = upstream(*results)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = gradients(results, qkv, given)
    assert_all_equal(got, expected(qkv, "causal", *given))


def test_traced_and_exported_graphs_hold_the_operator() -> None:
    qkv = tuple(x.detach() for x in inputs())
    assert "torch.ops.cuattn.attention.default" in make_fx(lambda q, k, v: both(q, k, v))(*qkv).code
    module = torch.nn.Module()
    module.forward = both
    exported = torch.export.export(module, qkv)
    assert "torch.ops.cuattn.attention.default" in exported.graph_module.code
    assert_all_equal(exported.module()(*qkv), both(*qkv))
    assert_all_equal(torch.func.functionalize(both)(*qkv), both(*qkv))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_tensors_without_data_have_shapes(layout: str) -> None:
    qkv = tuple(x.detach() for x in inputs(dtype=torch.float16, layout=layout))
    real = both(*qkv, layout=layout)
    with FakeTensorMode() as mode:
        fake = both(*map(mode.from_tensor, qkv), layout=layout)
    for made in (fake, both(*(x.to("meta") for x in qkv), layout=layout)):
        for got, want in zip(made, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_subclasses_of_tensor() -> None:
    class Marked(Tensor):
        pass

    qkv = tuple(x.detach().as_subclass(Marked) for x in inputs())
    results = both(*qkv)
    assert all(type(x) is Marked for x in results)
    assert_all_equal(results, both(*(x.as_subclass(Tensor) for x in qkv)))
