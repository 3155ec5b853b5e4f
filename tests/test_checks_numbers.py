"""Wrong lengths and pages of a cache: always refused on a CPU, on a GPU in checked mode."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cache_arguments import dense, keys_alone, numbers, packed, paged, refusal, refusal_of_both, table
from refusals import assert_says, refused, short_id, zeros

import cuattn
from cuattn import dispatch, env
from cuattn.interop import Device, Tensor, import_tensor
from cuattn.interop.numpy_ import NumpyFramework

SMALL, LARGE = -(2**31), 2**31 - 1
#: (array, exception, got, expected) for two sequences.
NO_LENGTHS = [
    (np.array([7, 0]), TypeError, "dtype int64", "int32"),
    (numbers(7, 0)[:, None], ValueError, "shape (2, 1)", "1 dimension"),
    (numbers(7, 9, 0, 9)[::2], ValueError, "strides (2,)", "(1,) (contiguous)"),
    (numbers(7), ValueError, "shape (1,)", "(sequences,) (2,)"),
    (torch.zeros(2, dtype=torch.int32), TypeError, "a torch array", "an array of q's library"),
    ([7, 0], TypeError, "list", "a torch, CuPy or NumPy array"),
    (numbers(8, 0), ValueError, "[8, 0]", "numbers from 0 to the capacity 9 less the [2, 2] new keys"),
    (numbers(0, -1), ValueError, "[0, -1]", "numbers from 0 to the capacity 9 less the [2, 2] new keys"),
    (numbers(SMALL, LARGE), ValueError, f"[{SMALL}, {LARGE}]", "the capacity 9 less"),
]
NO_TABLES = [
    (np.array([[0, 1, 2], [3, 4, 5]]), TypeError, "dtype int64", "int32"),
    (numbers(0, 1), ValueError, "shape (2,)", "2 dimensions"),
    (table([0, 1, 2]), ValueError, "shape (1, 3)", "(sequences, pages) (2, ...)"),
    (table([0, 1, 2, 9], [3, 4, 5, 9])[:, :3], ValueError, "strides (4, 1)", "(3, 1) (contiguous)"),
    (torch.zeros(2, 3, dtype=torch.int32), TypeError, "a torch array", "an array of q's library"),
    (table([0, 1, 8], [3, 4, 5]), ValueError, "8 at (0, 2)", "pages from 0 to 7"),
    (table([0, 1, 2], [-1, 4, 5]), ValueError, "-1 at (1, 0)", "pages from 0 to 7"),
    (table([0, 1, 3], [3, 4, 5]), ValueError, "one page for new keys of two sequences", "pages of their own"),
]


class TestNumbers:
    @pytest.mark.parametrize(("array", "kind", "got", "expected"), NO_LENGTHS, ids=short_id)
    def test_lengths(self, array: Any, kind: type[Exception], got: str, expected: str) -> None:
        for arguments in (dense(), paged()):
            assert_says(refusal_of_both(arguments, cache_lengths=array), kind, "cache_lengths", got, expected)

    def test_lengths_without_new_keys(self) -> None:
        read = dense() | {"k_new": None, "v_new": None}
        error = refusal(read, cache_lengths=numbers(10, 0))
        assert_says(error, ValueError, "cache_lengths", "[10, 0]", "numbers from 0 to the capacity 9")
        assert cuattn.attention_kvcache(**read | {"cache_lengths": numbers(9, 0)}).shape == (2, 2, 4, 32)

    @pytest.mark.parametrize(("array", "kind", "got", "expected"), NO_TABLES, ids=short_id)
    def test_tables(self, array: Any, kind: type[Exception], got: str, expected: str) -> None:
        lengths = numbers(7, 0)
        if "two sequences" in got:
            lengths = numbers(6, 0)  # both to the first places of their pages
        arguments = paged() | {"cache_lengths": lengths}
        assert_says(refusal_of_both(arguments, block_table=array), kind, "block_table", got, expected)

    def test_pages_that_are_not_used_are_not_looked_at(self) -> None:
        arguments = paged() | {"block_table": table([7, 1, 2], [3, -1, LARGE])}
        assert cuattn.attention_kvcache(**arguments).shape == (2, 2, 4, 32)

    def test_shared_pages_may_be_read(self) -> None:
        arguments = paged() | {"block_table": table([7, 1, 2], [7, 1, 3]), "cache_lengths": numbers(6, 6)}
        assert cuattn.attention_kvcache(**arguments).shape == (2, 2, 4, 32)

    @pytest.mark.parametrize(
        ("starts", "kind", "got", "expected"),
        [
            (np.array([0, 1, 4]), TypeError, "dtype int64", "int32"),
            (numbers(), ValueError, "shape (0,)", "(sequences + 1,)"),
            (numbers(0), ValueError, "no sequence", "4 tokens in sequences"),
            (numbers(0, 1, 3), ValueError, "[0, 1, 3]", "ascending numbers from 0 to the 4 tokens"),
            (numbers(0, 5, 4), ValueError, "[0, 5, 4]", "ascending numbers from 0 to the 4 tokens"),
            (numbers(1, 1, 4), ValueError, "[1, 1, 4]", "ascending numbers from 0 to the 4 tokens"),
        ],
        ids=short_id,
    )
    def test_starts(self, starts: Any, kind: type[Exception], got: str, expected: str) -> None:
        error = refusal_of_both(packed(), cu_seqlens_q=starts)
        assert_says(error, kind, str(error).partition(":")[0], got, expected)
        assert str(error).startswith("cu_seqlens")

    def test_new_keys_of_packed_sequences(self) -> None:
        error = refusal_of_both(packed(), cache_lengths=numbers(7, 7))
        assert_says(error, ValueError, "cache_lengths", "[7, 7]", "the capacity 9 less the [1, 3] new keys")


class TestCheckedMode:
    """Numbers on a GPU: NumPy arrays that say they are there, on a backend that does nothing."""

    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The dtypes of what is brought to the host."""
        dtypes: list[str] = []
        real = NumpyFramework.to_host

        def to_host(self: NumpyFramework, tensor: Tensor) -> Any:
            dtypes.append(tensor.dtype)
            return real(self, tensor)

        def on_cuda(array: Any, name: str) -> Tensor:
            return replace(import_tensor(array, name), device=Device("cuda", 0))

        for module in ("arrays", "lengths"):
            monkeypatch.setattr(f"cuattn.checks.{module}.import_tensor", on_cuda)
        monkeypatch.setattr(NumpyFramework, "to_host", to_host)
        for name in ("execute", "execute_append"):
            monkeypatch.setattr(dispatch, name, lambda *args: None)
        return dtypes

    @pytest.mark.parametrize("function", [cuattn.attention_kvcache, cuattn.append_kv])
    @pytest.mark.parametrize("variable", ["", "0", "1"])
    @pytest.mark.parametrize("check", [None, False, True])
    def test_when(
        self, reads: list[str], monkeypatch: pytest.MonkeyPatch, function: Any, variable: str, check: bool | None
    ) -> None:
        monkeypatch.setenv(env.CHECK, variable)
        wrong = packed() | {"cache_lengths": numbers(LARGE, 0)}
        arguments = wrong if function is cuattn.attention_kvcache else keys_alone(wrong)
        if variable == "1" if check is None else check:
            with pytest.raises(ValueError, match=rf"^cache_lengths: got \[{LARGE}, 0\], expected numbers from 0"):
                function(**arguments, check=check)
            assert set(reads) == {"int32"}
        else:
            function(**arguments, check=check)
            assert reads == []

    def test_other_calls_follow_the_variable(self, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        q = zeros(1, 1, 5, 64)
        for variable, wrong in (("0", 0), ("1", 1)):
            monkeypatch.setenv(env.CHECK, variable)
            errors = []
            for function, arguments in (
                (cuattn.attention, (q, q, q)),
                (cuattn.attention_varlen, (q[0], q[0], q[0], numbers(0, 9), numbers(0, 1))),
            ):
                options = {"kv_lengths": numbers(6)} if function is cuattn.attention else {}
                try:
                    function(*arguments, **options)
                except ValueError as error:
                    errors.append(str(error).partition(":")[0])
            assert errors == ["kv_lengths", "cu_seqlens_q"] * wrong

    @pytest.mark.parametrize("check", [1, "1", np.True_])
    def test_no_bool(self, check: Any) -> None:
        error = refusal_of_both(dense(), check=check)
        assert_says(error, TypeError, "check", type(check).__name__, "None or a bool")

    def test_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.CHECK, "yes")
        error = refused(cuattn.append_kv, **keys_alone(dense()))
        assert_says(error, ValueError, "CUATTN_CHECK", "'yes'", "'0' or '1'")
