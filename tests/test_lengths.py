"""Lengths that are wrong: refused where the host can read them, and harmless where it cannot."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import SM_80, attention_on, on_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import Packed, numbers

import cuattn
from cuattn import dispatch, env, testing
from cuattn.errors import EmulatorError
from cuattn.interop import Device, import_tensor
from cuattn.testing import NumpyLibrary, assert_bitwise_equal

NUMPY = NumpyLibrary()
LARGE, SMALL = 2**31 - 1, -(2**31)
ASCENDING = "ascending numbers from 0 to the {total} tokens"


def touches_nothing_else(call: Callable[[], Any]) -> None:
    """The emulator has nothing to say, but of rows of no sequence or of two, or of new keys that go to one place."""
    said = ""
    try:
        call()
    except EmulatorError as error:
        said = str(error)
    unwritten, twice = (
        r"(out|lse): \d+ elements were not written, .*",
        r".*: (out|lse|k_cache|v_cache) has been written there before",
    )
    assert re.fullmatch(f"({unwritten}|{twice})?", said), said


class TestWrongNumbers:
    """Cumulative lengths that are not checked, as on a GPU: never a touch of other memory, never an endless loop."""

    LISTS = (
        [0, 0, 0, 0],
        [7, 7, 7, 7],
        [0, 200, 100, 150],
        [150, 100, 50, 0],
        [-5, 3, -70, 150],
        [64, 64, -1000, 150],
        [0, 151, 152, 153],
        [0, LARGE, LARGE, LARGE],
        [SMALL, SMALL, SMALL, SMALL],
        [LARGE, SMALL, LARGE, SMALL],
        [SMALL, LARGE, SMALL, LARGE],
        [100, SMALL, 0, LARGE],
        [0, 100, SMALL, 150],
    )

    def run(
        self, arch: str, starts_q: Sequence[int], starts_k: Sequence[int], mask: str, splits: int | None = None
    ) -> None:
        case = Packed([150], [150], heads=1)
        lengths = {"cu_seqlens_q": numbers(*starts_q), "cu_seqlens_k": numbers(*starts_k)}
        attention = attention_on(("emulator", arch))
        touches_nothing_else(lambda: attention(*case.arrays(NUMPY), mask, num_splits=splits, **lengths))

    @pytest.fixture(autouse=True)
    def _unchecked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cuattn.checks.dense.check_starts", lambda *args: None)

    @pytest.mark.parametrize(("arch", "splits"), [("sm_80", None), ("sm_86", None), ("sm_80", 3)])
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_wrong_numbers(self, arch: str, splits: int | None, mask: str) -> None:
        for starts_q, starts_k in product(self.LISTS, ([0, 50, 100, 150], [150, 3, 90, 20])):
            self.run(arch, starts_q, starts_k, mask, splits)
        for starts_k in self.LISTS:
            self.run(arch, [0, 50, 100, 150], starts_k, mask, splits)

    @settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), mask=st.sampled_from(["causal", "full"]), splits=st.sampled_from([None, 1, 4]))
    def test_any_numbers(self, data: st.DataObject, mask: str, splits: int | None) -> None:
        number = st.integers(-200, 400) | st.integers(SMALL, LARGE) | st.sampled_from([0, 64, -64])
        count = data.draw(st.integers(1, 5) | st.integers(30, 70))
        lists = st.lists(number, min_size=count + 1, max_size=count + 1)
        self.run("sm_80", data.draw(lists), data.draw(lists), mask, splits)

    @pytest.mark.parametrize("splits", [None, 2])
    def test_rows_of_no_sequence_are_not_written(self, splits: int | None) -> None:
        """And those of a sequence are right, whatever the others."""
        case = Packed([150], [150], heads=1)
        q, k, v = case.arrays(NUMPY)
        out = testing.poisoned_empty_like(q)
        lengths = {"cu_seqlens_q": numbers(20, 50), "cu_seqlens_k": numbers(0, 999)}
        with pytest.raises(EmulatorError, match="were not written"):
            attention_on(SM_80)(q, k, v, "full", out=out, num_splits=splits, **lengths)
        assert np.isnan(out[:20]).all()
        assert np.isnan(out[50:]).all()
        alone = attention_on(SM_80)(q[None, 20:50], k[None], v[None], layout="bshd")
        assert_bitwise_equal(out[20:50], alone[0])

    @pytest.mark.parametrize("splits", [None, 2])
    def test_the_emulator_sees_what_is_outside(
        self, splits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The control: a kernel that trusts the numbers touches other memory."""
        folder = tmp_path / "kernels"
        shutil.copytree(env.kernel_dir(), folder)
        file, bound = folder / "attn" / "sequence.cuh", "min(ptx::load_global_s32(starts + 1), total)"
        assert bound in file.read_text()
        file.write_text(file.read_text().replace(bound, "ptx::load_global_s32(starts + 1)"))
        monkeypatch.setenv(env.KERNEL_DIR, str(folder))
        with pytest.raises(AssertionError, match="outside of every tensor"):
            self.run("sm_80", [0, 50, 100, 150], [0, 50, 100, 200], "full", splits)


class TestWrongKeyLengths:
    """kv_lengths that are not checked count as the nearest number that is possible."""

    @pytest.mark.parametrize("mask", ["causal", "full"])
    @pytest.mark.parametrize(("arch", "splits"), [("sm_80", None), ("sm_86", None), ("sm_80", 3)])
    def test_wrong_numbers(self, arch: str, splits: int | None, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cuattn.checks.lengths.numbers_to_check", lambda tensor, checked: None)
        q, k, v = (np.ascontiguousarray(x[None].repeat(3, axis=0)) for x in Packed([50], [70]).arrays(NUMPY))
        attention = attention_on(("emulator", arch))

        def run(*lengths: int) -> np.ndarray:
            return attention(q, k, v, mask, layout="bshd", kv_lengths=numbers(*lengths), num_splits=splits)

        assert_bitwise_equal(run(LARGE, 71, 10**6), run(70, 70, 70))
        assert_bitwise_equal(run(SMALL, -1, -70), run(0, 0, 0))
        assert not run(SMALL, -1, -70).any()
        assert run(5, SMALL, LARGE)[2].any()


class TestWrongCaches:
    """Lengths and pages of a cache that are not checked: one launch for many rows of a sequence, one for few."""

    PAGES, PAGE_SIZE = 40, 4

    @pytest.fixture(autouse=True)
    def _unchecked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cuattn.checks.cache._check_numbers", lambda *args: None)

    def run(self, starts: Sequence[int], lengths: Sequence[int], pages: Sequence[int], new: bool) -> None:
        q, k, v = Packed([150], [150], heads=1).arrays(NUMPY)
        cache = np.zeros((2, self.PAGES, self.PAGE_SIZE, 1, 64), np.float16)
        table = np.resize(np.array(pages, np.int32), (len(lengths), 12))
        options = {"block_table": table, "cu_seqlens_q": numbers(*starts), "check": False}
        options |= {"k_new": k, "v_new": v} if new else {}
        attention = on_backend(cuattn.attention_kvcache, SM_80)
        touches_nothing_else(lambda: attention(q, *cache, numbers(*lengths), **options))

    @pytest.mark.parametrize("new", [False, True])
    def test_wrong_numbers(self, new: bool) -> None:
        right = list(range(36))
        for starts in TestWrongNumbers.LISTS:
            self.run(starts, [3, 40, 20], right, new)
        for lengths in ([49, 48, -1], [LARGE, SMALL, LARGE], [SMALL, 0, -5], [LARGE - 10, LARGE - 100, 47]):
            self.run([0, 100, 120, 150], lengths, right, new)
        for pages in ([self.PAGES], [-1, 3], [LARGE, SMALL], [7]):
            self.run([0, 100, 120, 150], [3, 40, 20], pages, new)

    @settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), new=st.booleans())
    def test_any_numbers(self, data: st.DataObject, new: bool) -> None:
        number = st.integers(-200, 400) | st.integers(SMALL, LARGE)
        count = data.draw(st.integers(1, 5) | st.integers(30, 70))
        starts, lengths = (st.lists(number, min_size=n, max_size=n) for n in (count + 1, count))
        pages = st.lists(number | st.integers(0, self.PAGES), min_size=1, max_size=40)
        self.run(data.draw(starts), data.draw(lengths), data.draw(pages), new)

    def test_the_emulator_sees_what_is_outside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control: a kernel that trusts the pages touches other memory."""
        folder = tmp_path / "kernels"
        shutil.copytree(env.kernel_dir(), folder)
        file, bound = folder / "attn" / "sequence.cuh", ", sequences.page_count - 1u)"
        assert bound in file.read_text()
        file.write_text(file.read_text().replace(bound, ", ~0u)"))
        monkeypatch.setenv(env.KERNEL_DIR, str(folder))
        with pytest.raises(AssertionError, match="outside of every tensor"):
            self.run([0, 100, 120, 150], [3, 40, 20], [self.PAGES], new=False)


@pytest.fixture(autouse=True)
def _nothing_is_launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        pytest.fail("launched something", pytrace=False)

    if request.cls is TestRefusals:
        monkeypatch.setattr(dispatch, "execute", fail)


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


def refusal(function: Any, arguments: dict[str, Any], changed: dict[str, Any]) -> Exception:
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        function(**(arguments | changed))
    return caught.value


def packed_refusal(**changed: Any) -> Exception:
    """Five rows and seven keys in two sequences, but for what is changed."""
    lengths = {"cu_seqlens_q": numbers(0, 2, 5), "cu_seqlens_k": numbers(0, 3, 7)}
    arrays = {"q": zeros(5, 2, 64), "k": zeros(7, 2, 64), "v": zeros(7, 2, 64)}
    return refusal(cuattn.attention_varlen, arrays | lengths, changed)


def padded_refusal(**changed: Any) -> Exception:
    """Two sequences of five rows and seven keys."""
    arrays = {"q": zeros(2, 2, 5, 64), "k": zeros(2, 2, 7, 64), "v": zeros(2, 2, 7, 64)}
    return refusal(cuattn.attention, arrays | {"kv_lengths": numbers(7, 3)}, changed)


def assert_says(error: Exception, kind: type[Exception], argument: str, got: str, expected: str) -> None:
    assert type(error) is kind
    pattern = rf"{argument}: got [^\n]*{re.escape(got)}[^\n]*, expected [^\n]*{re.escape(expected)}[^\n]*"
    assert re.fullmatch(pattern, str(error)), error


#: Of an array of lengths: (array, exception, got, expected).
NO_LENGTHS = [
    (np.array([0, 2, 5]), TypeError, "dtype int64", "int32"),
    (np.float32([0, 2, 5]), TypeError, "dtype float32", "int32"),
    (np.uint32([0, 2, 5]), TypeError, "dtype uint32", "int32"),
    (np.array([0, 2, 5], ">i4"), TypeError, "dtype >i4", "int32"),
    (numbers(0, 2, 5)[:, None], ValueError, "shape (3, 1)", "1 dimension"),
    (np.array(5, np.int32), ValueError, "shape ()", "1 dimension"),
    (numbers(0, 9, 2, 9, 5)[::2], ValueError, "strides (2,)", "(1,) (contiguous)"),
    (numbers(5, 2, 0)[::-1], ValueError, "strides (-1,)", "(1,) (contiguous)"),
    (torch.tensor([0, 2, 5], dtype=torch.int32), TypeError, "a torch array", "an array of q's library"),
    ([0, 2, 5], TypeError, "list", "a torch, CuPy or NumPy array"),
]


class TestRefusals:
    """A message names the argument, what it got and what was expected, and nothing has been launched."""

    @pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
    @pytest.mark.parametrize(
        ("value", "kind", "got", "expected"),
        [
            *NO_LENGTHS,
            (None, TypeError, "NoneType", "a torch, CuPy or NumPy array"),
            (numbers(), ValueError, "shape (0,)", "(sequences + 1,)"),
            (numbers(0), ValueError, "no sequence", "{total} tokens in sequences"),
            (numbers(0, 2, 4), ValueError, "[0, 2, 4]", ASCENDING),
            (numbers(0, 2, 9), ValueError, "[0, 2, 9]", ASCENDING),
            (numbers(1, 2, 0), ValueError, "[1, 2, 0]", ASCENDING),
            (numbers(0, 9, 0), ValueError, "[0, 9, 0]", ASCENDING),
            (numbers(0, -1, 0), ValueError, "[0, -1, 0]", ASCENDING),
            (numbers(-2, 2, 0), ValueError, "[-2, 2, 0]", ASCENDING),
            (numbers(0, SMALL, 0), ValueError, f"[0, {SMALL}, 0]", ASCENDING),
        ],
        ids=str,
    )
    def test_cumulative_lengths(self, name: str, value: Any, kind: type[Exception], got: str, expected: str) -> None:
        total = {"cu_seqlens_q": 5, "cu_seqlens_k": 7}[name]
        if isinstance(value, np.ndarray) and value.shape == (3,) and value[-1] == 0 and value.flags.c_contiguous:
            value = value + numbers(0, 0, total)  # wrong before the end alone
            got = str(value.tolist())
        assert_says(packed_refusal(**{name: value}), kind, name, got, expected.format(total=total))

    def test_numbers_of_sequences(self) -> None:
        error = packed_refusal(cu_seqlens_k=numbers(0, 3, 5, 7))
        assert_says(error, ValueError, "cu_seqlens_k", "shape (4,)", "cu_seqlens_q's (3,)")
        error = packed_refusal(q=zeros(0, 2, 64), cu_seqlens_q=numbers(0))
        assert_says(error, ValueError, "cu_seqlens_k", "shape (3,)", "cu_seqlens_q's (1,)")

    def test_devices_of_lengths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moved: list[str] = []

        def on_cuda(array: Any, name: str) -> Any:
            tensor = import_tensor(array, name)
            return replace(tensor, device=Device("cuda", 0)) if name in moved else tensor

        monkeypatch.setattr("cuattn.checks.lengths.import_tensor", on_cuda)
        for name, call in (
            ("cu_seqlens_q", packed_refusal),
            ("cu_seqlens_k", packed_refusal),
            ("kv_lengths", padded_refusal),
        ):
            moved[:] = [name]
            assert_says(call(), ValueError, name, "device cuda:0", "q's cpu")

    @pytest.mark.parametrize("value", [1.0, True, "7", numbers(7), [7], -1], ids=str)
    def test_counts(self, value: Any) -> None:
        for call, name, least in (
            (packed_refusal, "max_seqlen_q", 0),
            (packed_refusal, "max_seqlen_k", 0),
            (packed_refusal, "num_splits", 1),
            (padded_refusal, "num_splits", 1),
        ):
            kind, got = (ValueError, "-1") if type(value) is int else (TypeError, type(value).__name__)
            assert_says(call(**{name: value}), kind, name, got, f"None or an int of at least {least}")
        assert_says(packed_refusal(num_splits=0), ValueError, "num_splits", "0", "None or an int of at least 1")

    @pytest.mark.parametrize(
        ("changed", "kind", "argument", "got", "expected"),
        [
            ({"q": zeros(1, 5, 2, 64)}, ValueError, "q", "shape (1, 5, 2, 64)", "3 dimensions (T, H, D)"),
            ({"v": zeros(7, 64)}, ValueError, "v", "shape (7, 64)", "3 dimensions (T, H, D)"),
            ({"q": zeros(5, 3, 64)}, ValueError, "q", "3 heads", "a multiple of the 2 heads of k and v"),
            ({"v": zeros(6, 2, 64)}, ValueError, "v", "6", "k's"),
            ({"q": zeros(5, 2, 128)}, ValueError, "k", "head dim 64", "q's 128"),
            ({"k": zeros(7, 2, 64, dtype=np.float64)}, TypeError, "k", "dtype float64", "bfloat16 or float32"),
            ({"k": torch.zeros(7, 2, 64).half()}, TypeError, "k", "a torch array", "an array of q's library"),
            ({"q": zeros(5, 2, 65)[:, :, :64]}, ValueError, "q", "a stride of 65 elements", "a multiple of 8"),
            ({"mask": "window"}, ValueError, "mask", "'window'", "one of 'full', 'causal'"),
            ({"scale": float("nan")}, ValueError, "scale", "nan", "None or a finite float"),
            ({"out": zeros(5, 2, 128)}, ValueError, "out", "shape (5, 2, 128)", "(5, 2, 64)"),
            ({"out": zeros(1, 5, 2, 64)}, ValueError, "out", "shape (1, 5, 2, 64)", "(5, 2, 64)"),
            ({"out": zeros(5, 2, 64, dtype=np.float32)}, TypeError, "out", "dtype float32", "float16"),
            ({"out": np.broadcast_to(zeros(1, 2, 64), (5, 2, 64))}, ValueError, "out", "read-only", "memory to write"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arrays(
        self, changed: dict[str, Any], kind: type[Exception], argument: str, got: str, expected: str
    ) -> None:
        assert_says(packed_refusal(**changed), kind, argument, got, expected)

    def test_out_in_the_memory_of_an_input(self) -> None:
        fused = zeros(5, 3, 2, 64)
        q, k, v = (fused[:, i] for i in range(3))
        starts = numbers(0, 5)
        for name, out in (("q", q), ("k", k), ("v", v)):
            error = packed_refusal(q=q, k=k, v=v, out=out, cu_seqlens_q=starts, cu_seqlens_k=starts)
            assert_says(error, ValueError, "out", f"the memory of {name}", "memory of its own")

    @pytest.mark.parametrize(
        ("value", "kind", "got", "expected"),
        [
            *NO_LENGTHS,
            (numbers(7), ValueError, "shape (1,)", "(batch,) (2,)"),
            (numbers(7, 7, 7), ValueError, "shape (3,)", "(batch,) (2,)"),
            (numbers(), ValueError, "shape (0,)", "(batch,) (2,)"),
            (numbers(7, -1), ValueError, "[7, -1]", "numbers from 0 to k's length 7"),
            (numbers(8, 7), ValueError, "[8, 7]", "numbers from 0 to k's length 7"),
            (numbers(SMALL, LARGE), ValueError, f"[{SMALL}, {LARGE}]", "numbers from 0 to k's length 7"),
        ],
        ids=str,
    )
    def test_key_lengths(self, value: Any, kind: type[Exception], got: str, expected: str) -> None:
        assert_says(padded_refusal(kv_lengths=value), kind, "kv_lengths", got, expected)
