"""``cuattn workload``: the same bits everywhere, by hash, in a file, and what attention makes of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import usage_error

import cuattn
from cuattn import env, testing
from cuattn.cli import main
from cuattn.config import DTYPES
from cuattn.testing.arrays import values_of
from cuattn.testing.workload import normal_numbers

pytestmark = pytest.mark.usefixtures("cpu_only")

ROOT = Path(__file__).resolve().parents[1]
#: SHA-256 of the inputs; docs/testing.md prints those of bfloat16.
HASHES = {
    "bfloat16": {
        "q": "982d2ded1394e245395dc8377f089b58bb2fb7a5233e5fc3842cd4b93dd8d2c6",
        "k": "4238c29d3d420de2e5be5a14f8cc1c41624aa6dd016e11aae12c82db92171d83",
        "v": "dc179588b85272fc013542427c40691e7181218945edd14bb7ddab8faafcde31",
        "dout": "d484675b45428fb15f9a6841888b48c12c5011f3a92a8ecbecb0331c46653c52",
    },
    "float16": {
        "q": "73680d5ed34888405b55c1334ddc840a1045f37edd4e8aa0e10e507858043b44",
        "k": "6e1584c6f62529c9e1e6b7d8931dafb2b9edce831e506168564b53dc3e5568da",
        "v": "d91ba691155baf34cfcaca5893f1b830879d45691883681b5f598d1d2c9db6bf",
        "dout": "262d9502e0fb7bec781fd50be23c478ab1d868c583aff511c3b89a3bbd09df49",
    },
    "float32": {
        "q": "63c45d08a94421840cb732bb9b3facaf87d1a5b0a3028f5578e890a9b7ad11fc",
        "k": "0d255129820086be9f73bc06b986b4868b00234af22db2bca532dcac7d4f6f0b",
        "v": "5c93e7b7cf3009926ee343f22fb48fe9cb84eb4bef8036ed0a356433b0332d1b",
        "dout": "827725758955ce35426237300a82b637fe2fcfe7955ba7987e8f7a5edd462ebc",
    },
}
LENGTHS = "f774ec2698f7930ee6f1ee8cb81fef180e30e125c5b20eaecf6eea2f81d30ec3"
INPUTS = ("q", "k", "v", "dout", "cu_seqlens")


def philox(key: tuple[int, int], blocks: int) -> Iterator[int]:
    """Words of Philox 4x64 with 10 rounds (Salmon et al., SC 2011), of the counters 1, 2, ... as in NumPy."""
    mask = 2**64 - 1
    for counter in range(1, blocks + 1):
        words, (key_0, key_1) = [counter, 0, 0, 0], key
        for _ in range(10):
            product_0, product_1 = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
            words = [
                product_1 >> 64 ^ words[1] ^ key_0,
                product_1 & mask,
                product_0 >> 64 ^ words[3] ^ key_1,
                product_0 & mask,
            ]
            key_0, key_1 = (key_0 + 0x9E3779B97F4A7C15) & mask, (key_1 + 0xBB67AE8584CAA73B) & mask
        yield from words


class TestInputs:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_hashes_are_pinned(self, dtype: str) -> None:
        inputs = testing.workload_inputs(dtype)
        assert tuple(inputs) == INPUTS
        assert {name: testing.sha256(bits) for name, bits in inputs.items()} == {**HASHES[dtype], "cu_seqlens": LENGTHS}

    def test_the_shape_is_that_of_the_case(self) -> None:
        case, inputs = testing.WORKLOAD, testing.workload_inputs()
        assert {name: inputs[name].shape for name in "qkv"} == {
            "q": (59, 32, 128),
            "k": (59, 8, 128),
            "v": (59, 8, 128),
        }
        assert (case.heads, case.kv_heads, case.head_dim, case.dtype) == (32, 8, 128, "bfloat16")
        assert inputs["cu_seqlens"].tolist() == [0, 11, 27, 40, 59]

    def test_numbers_are_made_of_words_by_integers(self) -> None:
        """Worked out here with Python's integers alone."""
        words = list(philox((5, 7), 6))  # 24 words for 4 numbers, those of each number 4 apart
        for number, got in enumerate(normal_numbers((4,), (5, 7))):
            halves = [half for word in words[number::4] for half in (word >> 32, word & (2**32 - 1))]
            assert len(halves) == 12
            assert got == np.float32((sum(halves) - 6 * (2**32 - 1)) / 2**32)

    def test_numbers_are_about_normal(self) -> None:
        numbers = normal_numbers((100_000,), (0, 9)).astype(np.float64)
        assert abs(numbers.mean()) < 0.01
        assert abs(numbers.std() - 1) < 0.01
        assert 2.8 < (numbers**4).mean() < 3.0  # 3 of normal ones
        assert 4 < abs(numbers).max() <= 6

    def test_sha256_is_of_little_endian_bytes(self) -> None:
        bits = np.arange(5, dtype=np.uint32)
        assert testing.sha256(bits) == testing.sha256(bits.astype(">u4"))
        assert testing.sha256(bits) == testing.sha256(np.repeat(bits, 2)[::2])


class TestCommand:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_inputs_in_a_file(self, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "inputs"  # as it is called, without .npz behind
        assert main(["workload", "--dtype", dtype, "--out", str(path)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert {name: digest for digest, name, *_ in lines} == {**HASHES[dtype], "cu_seqlens": LENGTHS}
        assert lines[0][2:] == [dtype, "59x32x128"]
        assert lines[-1][2:] == ["int32", "5"]
        with np.load(path) as file:
            assert tuple(file.files) == INPUTS
            assert file["q"].dtype == ("uint16" if dtype == "bfloat16" else dtype)
            assert file["cu_seqlens"].tolist() == [0, 11, 27, 40, 59]
            words = file["q"].view(f"u{file['q'].itemsize}")
            assert testing.sha256(words) == HASHES[dtype]["q"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_results(self, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Each prompt alone has the bits that it has in the file, and so do its gradients."""
        paths = [tmp_path / "one.npz", tmp_path / "other.npz"]
        printed = []
        for path in paths:
            assert main(["workload", "--run", "--dtype", dtype, "--out", str(path)]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        assert [line.split()[1] for line in printed[0].splitlines()] == [*INPUTS, "out", "lse", "dq", "dk", "dv"]
        with np.load(paths[0]) as file:
            arrays = {name: file[name] for name in file.files}
        assert arrays["lse"].shape == (32, 59)
        for first, last in ((0, 11), (11, 27), (27, 40), (40, 59)):
            self.check_alone(arrays, first, last, dtype)

    @staticmethod
    def check_alone(arrays: dict[str, np.ndarray], first: int, last: int, dtype: str) -> None:
        own = {
            name: testing.TorchLibrary().array(x[None, first:last].view(np.uint16), dtype)
            for name, x in arrays.items()
            if name not in ("lse", "cu_seqlens")
        }
        inputs = [own[name] for name in "qkv"]
        out, lse = cuattn.attention(*inputs, "causal", return_lse=True, layout="bshd")
        testing.assert_bitwise_equal(out, own["out"])
        testing.assert_bitwise_equal(lse, arrays["lse"][None, :, first:last])
        results = cuattn.attention_backward(own["dout"], *inputs, out, lse, "causal", layout="bshd")
        for name, gradient in zip(("dq", "dk", "dv"), results, strict=True):
            testing.assert_bitwise_equal(gradient, own[name], name)

    def test_the_backend_is_that_of_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(env.BACKEND, "cuda")
        usage_error("workload", "--run")
        assert "--backend: got cuda, expected it where CuPy can use a CUDA device" in capsys.readouterr().err

    def test_without_a_library_for_bfloat16(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("cuattn.testing.arrays.installed", lambda package: False)
        monkeypatch.setattr("cuattn.cli.libraries.installed", lambda package: False)
        assert main(["workload"]) == 0
        usage_error("workload", "--run")
        assert "--dtype: got bfloat16, which numpy cannot hold: pip install ml_dtypes" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--dtype", "float64"], "invalid choice: 'float64'"),
            (["--out", "/nonexistent/x.npz"], "--out: got '/nonexistent/x.npz', expected a file in an existing folder"),
            (["--out", "/"], "--out: got '/', expected a file in an existing folder"),
        ],
    )
    def test_wrong_usage(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        usage_error("workload", *argv)
        assert message in capsys.readouterr().err

    def test_the_page_prints_these_hashes(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["workload"])
        assert capsys.readouterr().out in (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def test_float16_values_are_those_of_float32_rounded() -> None:
    wide, narrow = (testing.workload_inputs(dtype)["q"] for dtype in ("float32", "float16"))
    np.testing.assert_array_equal(values_of(wide, "float32").astype(np.float16), values_of(narrow, "float16"))
