"""`cuattn.testing`, the sweep: every check passes what is invariant and fails its negative control."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stand_ins import moving_chunks, row_by_row, with_keywords

import cuattn
from cuattn import testing
from cuattn.errors import MissingDependencyError
from cuattn.testing import CHECKS, BitwiseMismatch, Case, Check, Library, NumpyLibrary, Subject, TorchLibrary, seen
from cuattn.testing.arrays import values_of
from cuattn.testing.controls import depends_on
from cuattn.testing.invariance import boundaries
from cuattn.testing.sequences import spans

CONTROL_CASE = Case(21, 90, "causal", batch=2, heads=4, kv_heads=2)
CHECK_NAMES = [check.name for check in CHECKS]


def _check(name: str) -> Check:
    return CHECKS[CHECK_NAMES.index(name)]


class TestChecks:
    """Every check passes an invariant operation and fails its negative control."""

    @pytest.mark.parametrize("name", CHECK_NAMES)
    @pytest.mark.parametrize("library", [NumpyLibrary(), TorchLibrary()], ids=lambda library: library.name)
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_check_and_control(self, name: str, library: Library, mask: str) -> None:
        check, case = _check(name), replace(CONTROL_CASE, mask=mask)
        if not check.applies(case):
            assert (name, mask) == ("unseen keys", "full")  # all keys are seen
            return
        check.run(Subject(with_keywords, library, case))
        with pytest.raises(BitwiseMismatch):
            check.run(Subject(check.control(with_keywords), library, case))

    @pytest.mark.parametrize("name", CHECK_NAMES)
    def test_controls_are_right_within_rounding(self, name: str) -> None:
        subject = Subject(_check(name).control(with_keywords), NumpyLibrary(), CONTROL_CASE)
        result, expected = subject.baseline, Subject(with_keywords, NumpyLibrary(), CONTROL_CASE).baseline
        out, gold = (values_of(r.out, "float16").astype(np.float32) for r in (result, expected))
        np.testing.assert_allclose(out, gold, rtol=0, atol=2.0**-9)
        np.testing.assert_allclose(values_of(result.lse, "float32"), values_of(expected.lse, "float32"), atol=1e-6)

    @pytest.mark.parametrize(
        ("number", "blind"),
        [
            ("batch_size", ("batch position", "strides", "repeated runs", "head slices")),
            ("position", ("head slices", "mask type", "layout", "num_splits")),
            ("rows", ("batch size", "permutation", "repeated key heads", "repeated runs")),
            ("strides", ("batch size", "permutation", "num_splits", "decode against prefill")),
            ("garbage", ("strides", "batch size", "repeated runs", "unseen keys")),
        ],
    )
    def test_controls_depend_on_one_thing(self, number: str, blind: tuple[str, ...]) -> None:
        op = depends_on(getattr(seen, number))(with_keywords)
        for name in blind:
            _check(name).run(Subject(op, NumpyLibrary(), CONTROL_CASE))

    def test_a_leak_from_neighbours_is_found(self) -> None:
        def leaking(q: Any, k: Any, v: Any, mask: str, **options: Any) -> Any:
            out, lse = row_by_row(q, k, v, mask, **options)
            return out + 0 * v.sum(), lse  # 0 * NaN

        with pytest.raises(BitwiseMismatch, match="between sequences of NaN: out"):
            _check("neighbours").run(Subject(leaking, NumpyLibrary(), CONTROL_CASE))

    def test_an_ignored_output_array_is_found(self) -> None:
        def ignoring(q: Any, k: Any, v: Any, mask: str, *, out: Any = None, **options: Any) -> Any:
            return row_by_row(q, k, v, mask, **options)

        with pytest.raises(BitwiseMismatch, match="the array given as out"):
            _check("given output").run(Subject(ignoring, NumpyLibrary(), CONTROL_CASE))

    def test_results_of_another_shape_are_no_mismatch(self) -> None:
        subject = Subject(
            lambda *a, **o: (np.zeros(3, np.float16), np.zeros(3, np.float32)), NumpyLibrary(), Case(2, 2)
        )
        with pytest.raises(AssertionError, match=r"out and LSE: got shapes and dtypes \(\(3,\), 'float16'"):
            _ = subject.baseline

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 113, 1023])
    def test_boundaries_cover_all_rows(self, length: int) -> None:
        sets = list(boundaries(length))
        assert bool(sets) == (length > 1)
        for cuts in sets:
            assert (cuts[0], cuts[-1]) == (0, length)
            assert cuts == sorted(set(cuts))


class TestSweep:
    def test_an_invariant_operation_passes(self) -> None:
        testing.assert_invariant(with_keywords, testing.standard_cases("tiny", head_dims=(64,)), TorchLibrary())

    def test_a_non_invariant_operation_fails_where_it_must(self) -> None:
        results = list(testing.invariance_sweep(moving_chunks, [CONTROL_CASE]))
        failed = {r.trial.check.name for r in results if not r.passed and not r.trial.control}
        assert failed == {
            "batch size",
            "neighbours",
            "chunked prefill",
            "decode against prefill",
            "mask type",
            "head slices",
        }
        with pytest.raises(AssertionError, match="6 trials failed"):
            testing.assert_invariant(moving_chunks, [CONTROL_CASE])

    def test_every_usable_check_has_one_control(self) -> None:
        trials = testing.plan_sweep(with_keywords, testing.standard_cases("tiny"))
        controls = [trial.check.name for trial in trials if trial.control]
        assert sorted(controls) == sorted(CHECK_NAMES)
        assert {trial.check.name for trial in trials} == set(CHECK_NAMES)

    @pytest.mark.parametrize("size", testing.SIZES)
    def test_every_size_reaches_every_check(self, size: str) -> None:
        trials = testing.plan_sweep(with_keywords, testing.standard_cases(size, dtypes=("float16",), head_dims=(64,)))
        assert {trial.check.name for trial in trials if trial.control} == set(CHECK_NAMES)

    def test_keywords_that_an_operation_lacks_are_not_checked(self) -> None:
        names = {trial.check.name for trial in testing.plan_sweep(row_by_row, [CONTROL_CASE])}
        assert set(CHECK_NAMES) - names == {
            "layout",
            "num_splits",
            "given output",
            "key lengths",
            "key padding",
            "packed sequences",
            "contiguous cache",
            "paged cache",
            "key shards",
        }

    def test_a_check_that_its_control_passes_is_a_failure(self) -> None:
        harmless = replace(_check("repeated runs"), control=lambda op: op)
        results = list(testing.invariance_sweep(row_by_row, [CONTROL_CASE], checks=[harmless]))
        assert [(r.trial.control, r.passed) for r in results] == [(False, True), (True, False)]
        assert results[1].detail == "a non-invariant operation passed"

    def test_a_crash_is_a_failure_also_of_a_control(self) -> None:
        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("no")

        crashing = replace(_check("repeated runs"), control=lambda op: broken)
        results = list(testing.invariance_sweep(row_by_row, [CONTROL_CASE], checks=[crashing]))
        assert [(r.passed, r.detail) for r in results] == [(True, ""), (False, "RuntimeError: no")]
        (result,) = testing.invariance_sweep(broken, [Case(1, 1)], checks=[_check("strides")])
        assert (result.passed, result.detail) == (False, "RuntimeError: no")

    def test_a_missing_package_ends_the_sweep(self) -> None:
        def unequipped(*args: Any, **options: Any) -> Any:
            raise MissingDependencyError("pip install it")

        with pytest.raises(MissingDependencyError):
            list(testing.invariance_sweep(unequipped, [Case(1, 1)]))
        with pytest.raises(MissingDependencyError):
            list(testing.measure_accuracy(unequipped, [Case(1, 1)]))

    def test_results_come_one_by_one(self) -> None:
        calls = []

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return row_by_row(*args, **options)

        sweep = testing.invariance_sweep(counted, [CONTROL_CASE])
        assert not calls
        next(sweep)
        assert len(calls) < 10

    @pytest.mark.parametrize(
        "case",
        [
            CONTROL_CASE,
            Case(3, 1100, heads=2, kv_heads=2, value_dim=32),
            Case(9, 90, dtype="float32", batch=2, heads=4, kv_heads=2, lengths=(40, 11)),
        ],
        ids=str,
    )
    def test_attention_takes_part_with_all_its_keywords(self, case: Case) -> None:
        attention = testing.with_packed(cuattn.attention, cuattn.attention_varlen)
        attention = testing.with_cache(attention, cuattn.attention_kvcache)
        attention = testing.with_shards(attention, cuattn.attention_partials, cuattn.combine, cuattn.chunk_starts)
        names = {trial.check.name for trial in testing.plan_sweep(attention, [case])}
        assert names == {check.name for check in CHECKS if check.applies(case)}
        testing.assert_invariant(attention, [case], TorchLibrary())

    def test_what_needs_another_operation(self) -> None:
        needing = {"packed sequences", "contiguous cache", "paged cache", "key shards"}
        names = {trial.check.name for trial in testing.plan_sweep(cuattn.attention, [CONTROL_CASE])}
        assert set(CHECK_NAMES) - names == needing

    @pytest.mark.parametrize(
        ("join", "message"),
        [
            (lambda: testing.with_packed(row_by_row, cuattn.attention_varlen), "packed sequences, sequence 0, packed"),
            (lambda: testing.with_cache(row_by_row, cuattn.attention_kvcache), "contiguous cache, cache, rows 0 to 10"),
            (lambda: testing.with_cache(row_by_row, cuattn.attention_kvcache), "paged cache, pages of 16, rows 0 to"),
            (
                lambda: testing.with_shards(row_by_row, cuattn.attention_partials, cuattn.combine, cuattn.chunk_starts),
                "key shards, 1 shards",
            ),
        ],
    )
    def test_joined_operations_are_both_called(self, join: Any, message: str) -> None:
        """Their bits are others, which is found."""
        name, _, mismatch = message.partition(", ")
        joined = join()
        assert name in {trial.check.name for trial in testing.plan_sweep(joined, [CONTROL_CASE])}
        with pytest.raises(BitwiseMismatch, match=mismatch):
            _check(name).run(Subject(joined, NumpyLibrary(), CONTROL_CASE))

    @pytest.mark.parametrize(
        ("name", "ignored", "message"),
        [
            ("key lengths", "kv_lengths", "kv_lengths, rows 18 to 21 of sequence 0: out"),
            ("key padding", "key_padding_mask", "padding right, rows 18 to 21 of sequence 0: out"),
        ],
    )
    def test_padding_that_is_read_is_found(self, name: str, ignored: str, message: str) -> None:
        def reading(q: Any, k: Any, v: Any, mask: str, **options: Any) -> Any:
            return with_keywords(q, k, v, mask, **{**options, ignored: None})

        with pytest.raises(BitwiseMismatch, match=message):
            _check(name).run(Subject(reading, NumpyLibrary(), CONTROL_CASE))

    @pytest.mark.parametrize("name", ["contiguous cache", "paged cache"])
    @pytest.mark.parametrize("keys", [1, -1])
    def test_a_cache_misread_by_one_is_found(self, name: str, keys: int) -> None:
        def misreading(q: Any, k: Any, v: Any, mask: str, *, cache_lengths: Any = None, **options: Any) -> Any:
            lengths = None if cache_lengths is None else cache_lengths + keys
            return with_keywords(q, k, v, mask, cache_lengths=lengths, **options)

        with pytest.raises(BitwiseMismatch, match="rows 0 to 10 of sequence 0"):
            _check(name).run(Subject(misreading, NumpyLibrary(), CONTROL_CASE))


class TestSpans:
    @pytest.mark.parametrize(
        ("seen", "expected"),
        [
            ([], []),
            ([4], [("full", 0, 1)]),
            ([7, 7, 7], [("full", 0, 3)]),
            ([0, 0, 1, 2], [("full", 0, 2), ("causal", 2, 4)]),
            ([5, 6, 6, 6, 7], [("causal", 0, 2), ("full", 2, 4), ("full", 4, 5)]),
        ],
    )
    def test_rows_are_cut_where_the_step_changes(self, seen: list[int], expected: list[tuple[str, int, int]]) -> None:
        assert list(spans(np.array(seen, int))) == expected


class TestCases:
    def test_every_kind_is_there(self) -> None:
        cases = list(testing.standard_cases("device"))
        assert {case.dtype for case in cases} == {"float16", "bfloat16", "float32"}
        pairs = {(case.head_dim, case.value_dim) for case in cases}
        assert pairs == {(d, None) for d in (64, 96, 128, 192, 256)} | {(192, 128)}
        for dtype in ("float16", "bfloat16", "float32"):
            assert {8300, 131072} <= {case.len_k for case in cases if case.dtype == dtype}
        assert testing.WORKLOAD in cases
        assert testing.WORKLOAD.lengths is not None
        assert sum(testing.WORKLOAD.lengths) == 59

    @pytest.mark.parametrize("size", testing.SIZES)
    def test_a_selection_is_kept(self, size: str) -> None:
        for case in testing.standard_cases(size, ("float32",), ((192, 128), 64), ("full",)):
            assert (case.dtype, case.mask) == ("float32", "full")
            assert (case.head_dim, case.value_dim) in ((192, 128), (64, None))
