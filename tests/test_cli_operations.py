"""``cuattn check --op``: another operation, by its name and in its form."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import usage_error
from torch.nn import functional

import cuattn
from cuattn import testing
from cuattn.cli import check, libraries, main
from cuattn.testing import (
    JUDGMENTS,
    Case,
    Cases,
    CupyLibrary,
    NumpyLibrary,
    TorchLibrary,
    from_flash,
    from_sdpa,
    make_inputs,
)

pytestmark = pytest.mark.usefixtures("cpu_only")

CASES = Cases((Case(9, 80, batch=2, heads=4, kv_heads=2),), (Case(16, 128),), (Case(66, 80),))
#: Operations of others, as a file in the folder where the command runs.
MODULE = """
import cuattn

NUMBER = 3

def attention(q, k, v, mask, *, scale=None, return_lse=False):
    return cuattn.attention(q, k, v, mask, scale=scale, return_lse=return_lse)

class Of:
    @staticmethod
    def gradients(dout, q, k, v, out, lse, mask, *, scale=None):
        return cuattn.attention_backward(dout, q, k, v, out, lse, mask, scale=scale)

def by_batch(q, k, v, mask, *, scale=None):
    out = cuattn.attention(q, k, v, mask, scale=scale)
    return out if len(q) == 1 else (out * 1.0009765625).astype(out.dtype)

def sdpa(q, k, v, is_causal=False, scale=None):
    return attention(q, k, v, "causal" if is_causal else "full", scale=scale)
"""
NAME = "attention_of_somebody"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.py").write_text(MODULE)
    (tmp_path / "raising.py").write_text("raise RuntimeError('not today')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in (NAME, "raising"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(check.Cases, "standard", lambda **variants: CASES)


def grouped(q: Any, k: Any, v: Any, *, scale: float, enable_gqa: bool = False, **masks: Any) -> Any:
    """Insists on a scale, so that one is passed on."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa, **masks)


def repeated(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **scale: float) -> Any:
    """Without head groups; a scale is given only if there is one."""
    assert q.shape[1] == k.shape[1]
    assert scale.get("scale", 0) is not None
    return functional.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, **scale)


def in_numpy(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
    assert isinstance(k, np.ndarray)
    seen = np.tri(q.shape[2], k.shape[2], dtype=bool) if is_causal else attn_mask
    scores = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    weights = np.exp(scores if seen is None else np.where(seen, scores, np.float32(-np.inf)))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def flash(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False) -> Any:
    return cuattn.attention(q, k, v, "causal" if causal else "full", scale=softmax_scale, layout="bshd")


OPERATIONS = {
    "torch": from_sdpa(functional.scaled_dot_product_attention),
    "repeated": from_sdpa(repeated),
    "numpy": from_sdpa(in_numpy),
    "flash": from_flash(flash),
}


class TestCheck:
    def test_all_is_well(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["check", "--op", f"{NAME}:attention", "--backward", f"{NAME}:Of.gradients", "--library", "numpy"]
        assert main([*argv, "--json", "-", "--junit", "report.xml"]) == 0
        out, err = capsys.readouterr()
        assert f": {NAME}:attention, numpy arrays on cpu\n" in err
        report = json.loads(out)
        assert (report["passed"], report["operation"], report["backend"]) == (True, f"{NAME}:attention", None)
        suites = ElementTree.parse("report.xml").getroot()
        assert tuple(suite.attrib["name"] for suite in suites) == JUDGMENTS
        assert {(suite.attrib["failures"], suite.attrib["errors"]) for suite in suites} == {("0", "0")}

    def test_bits_that_move_are_exit_code_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["check", "--op", f"{NAME}:by_batch", "--library", "numpy", "--forward-only", "--junit", "report.xml"]
        assert main(argv) == 1
        text = capsys.readouterr().out
        assert "without return_lse: no LSE is judged\n" in text
        assert "forward invariance, batch size, float16 d64 causal 2x4/2x9x80: batch 1 against 2: out: " in text
        assert "\ngradient" not in text
        failed = [case.attrib["name"] for case in ElementTree.parse("report.xml").iter("testcase") if len(case)]
        assert "batch size, float16 d64 causal 2x4/2x9x80" in failed

    def test_gradients_that_nobody_gave_are_exit_code_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["check", "--op", f"{NAME}:attention", "--library", "numpy"]
        assert main(argv) == 1
        assert "gradient accuracy, gradients: no gradient operation was given\n" in capsys.readouterr().out
        assert main([*argv, "--forward-only"]) == 0

    def test_an_operation_that_raises_is_exit_code_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        """torch tensors have no `astype`."""
        assert main(["check", "--op", f"{NAME}:by_batch", "--library", "torch", "--forward-only"]) == 1
        assert "AttributeError: 'Tensor' object has no attribute 'astype'" in capsys.readouterr().out

    def test_torch_is_found_out(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Its CPU kernels are accurate; a row's bits depend on the rows beside it."""
        cases = replace(CASES, invariance=(Case(17, 80, dtype="float32", batch=2, heads=4, kv_heads=2),))
        monkeypatch.setattr(check.Cases, "standard", lambda **variants: cases)
        name = "torch.nn.functional:scaled_dot_product_attention"
        assert main(["check", "--op", name, "--convention", "sdpa", "--backward", "autograd", "--json", "-"]) == 1
        report = json.loads(capsys.readouterr().out)
        verdicts = {judgment: verdict["passed"] for judgment, verdict in report["judgments"].items()}
        assert (verdicts["forward accuracy"], verdicts["forward invariance"]) == (True, False)
        failed = {entry["check"] for entry in report["invariance"] if not entry["passed"]}
        assert {"chunked prefill", "decode against prefill"} <= failed
        assert all(entry["passed"] for entry in report["invariance"] if entry["control"])

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--op", "attention"], "--op: got 'attention', expected module:function"),
            (["--op", "attention:"], "--op: got 'attention:', expected module:function"),
            (["--op", ":attention"], "--op: got ':attention', expected module:function"),
            (["--op", "nowhere:f"], "--op: got 'nowhere:f'; importing nowhere: ModuleNotFoundError: No module named"),
            (["--op", "raising:f"], "--op: got 'raising:f'; importing raising: RuntimeError: not today"),
            (["--op", f"{NAME}:f"], f"--op: got '{NAME}:f'; module '{NAME}' has no attribute 'f'"),
            (["--op", f"{NAME}:NUMBER"], f"--op: got '{NAME}:NUMBER', a int, expected a function"),
            (
                ["--op", f"{NAME}:sdpa"],
                "with (q, k, v, is_causal=False, scale=None), expected (q, k, v, mask,",
            ),
            (["--op", f"{NAME}:sdpa"], "--convention sdpa or flash is for other forms"),
            (["--op", f"{NAME}:sdpa", "--convention", "flash"], "expected (q, k, v, *, softmax_scale, causal)"),
            (
                ["--op", f"{NAME}:attention", "--convention", "sdpa"],
                "expected (q, k, v, *, attn_mask, is_causal,",
            ),
            (["--op", f"{NAME}:attention", "--convention", "jax"], "invalid choice: 'jax'"),
            (
                ["--op", "torch.nn.functional:scaled_dot_product_attention"],
                "whose arguments Python cannot read,",
            ),
            (["--op", f"{NAME}:attention", "--backward", "gradients"], "--backward: got 'gradients', expected module:"),
            (
                ["--op", f"{NAME}:attention", "--backward", f"{NAME}:attention"],
                "expected (dout, q, k, v, out, lse, mask, *, scale)",
            ),
            (
                ["--op", f"{NAME}:attention", "--backward", "autograd", "--library", "numpy"],
                "--backward: got autograd for numpy arrays, expected it with --library torch",
            ),
            (
                ["--op", f"{NAME}:attention", "--backward", "autograd", "--forward-only"],
                "--backward: got it with --forward-only",
            ),
            (["--op", f"{NAME}:attention", "--backend", "cuda"], "--backend: got it with --op, expected --device in"),
            (["--op", f"{NAME}:attention", "--arch", "sm_80"], "--arch: got it with --op, expected --device in its"),
            (["--op", f"{NAME}:attention", "--device", "tpu"], "--device: got tpu, expected cpu, cuda or cuda:INDEX"),
            (["--op", f"{NAME}:attention", "--device", "cuda"], "--device: got cuda, where torch finds no GPU"),
        ],
    )
    def test_wrong_usage(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        usage_error("check", *argv)
        assert message in capsys.readouterr().err


class TestDevices:
    def test_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert libraries.on_device(None, None) == TorchLibrary()
        assert libraries.on_device("numpy", "cpu") == NumpyLibrary()
        monkeypatch.setattr(libraries, "installed", lambda package: package == "numpy")
        assert libraries.on_device(None, None) == NumpyLibrary()

    def test_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "_torch_has_gpu", lambda: True)
        monkeypatch.setattr(libraries, "device_count", lambda: 2)
        assert libraries.on_device(None, None) == TorchLibrary(device="cuda:0")
        assert libraries.on_device(None, "cpu") == TorchLibrary()
        assert libraries.on_device("torch", "cuda:1") == TorchLibrary(device="cuda:1")
        assert libraries.on_device("cupy", "cuda") == CupyLibrary()
        assert libraries.on_device("numpy", None) == NumpyLibrary()

    @pytest.mark.parametrize(
        ("name", "device", "message"),
        [
            (None, "cpu:1", "--device: got cpu:1, expected cpu, cuda or cuda:INDEX"),
            (None, "cuda:", "--device: got cuda:, expected cpu"),
            (None, "cuda:one", "--device: got cuda:one, expected cpu"),
            ("numpy", "cuda", "--device: got cuda, where numpy finds no GPU"),
            ("cupy", "cpu", "--library: got cupy for cpu, expected it with a GPU"),
            ("cupy", None, "--library: got cupy for cpu, expected it with a GPU"),
        ],
    )
    def test_wrong_ones(self, name: str | None, device: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            libraries.on_device(name, device)

    def test_a_library_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "installed", lambda package: False)
        with pytest.raises(ValueError, match="--library: got torch, which is not installed"):
            libraries.on_device("torch", None)


class TestConventions:
    """Adapted functions compute what the contract says, whatever the shape, with the head groups and the scale."""

    @pytest.mark.parametrize("mask", ["causal", "full"])
    @pytest.mark.parametrize(("rows", "keys"), [(16, 16), (1, 40), (9, 40), (40, 40)])
    @pytest.mark.parametrize("scale", [None, 0.3])
    @pytest.mark.parametrize("form", OPERATIONS)
    def test_results(self, form: str, mask: str, rows: int, keys: int, scale: float | None) -> None:
        """How accurate the others are depends on the processor; conventions, on nothing."""
        case = Case(rows, keys, mask, "float32", heads=4, kv_heads=2, scale=scale)
        library = NumpyLibrary() if form == "numpy" else TorchLibrary()
        inputs = make_inputs(case)
        arrays = [library.array(bits, case.dtype) for bits in (inputs.q, inputs.k, inputs.v)]
        got, expected = (op(*arrays, mask, scale=scale) for op in (OPERATIONS[form], cuattn.attention))
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=1e-5)

    def test_head_groups_are_left_to_a_function_that_knows_them(self) -> None:
        testing.assert_accurate(from_sdpa(grouped), Case(9, 40, heads=4, kv_heads=2, scale=0.3), TorchLibrary())
        testing.assert_accurate(from_sdpa(grouped), Case(9, 40, heads=4, kv_heads=4, scale=0.3), TorchLibrary())
