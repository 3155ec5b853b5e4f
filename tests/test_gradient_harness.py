"""`cuattn.testing`, gradients: every check passes the reference and fails its control, every rule can be broken."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from backends import REFERENCE, attention_on, gradients_on

from cuattn import testing
from cuattn.errors import MissingDependencyError
from cuattn.testing import (
    GRADIENT_CHECKS,
    BitwiseMismatch,
    Case,
    Check,
    GradientSubject,
    Library,
    NumpyLibrary,
    TorchLibrary,
    non_invariant_gradients,
    seen,
)
from cuattn.testing.accuracy import relative_error
from cuattn.testing.arrays import values_of
from cuattn.testing.gradient_accuracy import peer_gradients
from cuattn.testing.gradient_controls import gradients_depend_on
from cuattn.testing.subject import Operation

FORWARD, BACKWARD = attention_on(REFERENCE), gradients_on(REFERENCE)
CONTROL_CASE = Case(21, 90, "causal", batch=2, heads=4, kv_heads=2)
NAMES = [check.name.removeprefix("gradients: ") for check in GRADIENT_CHECKS]
#: Checks of dq alone: what they vary changes the rows or heads that dk and dv are sums over.
OF_QUERIES = {"repeated key heads", "unseen keys"}
Spoil = Callable[[list[Any], dict[str, Any]], object]


def check_of(name: str) -> Check:
    return GRADIENT_CHECKS[NAMES.index(name)]


def subject_of(op: Operation, case: Case = CONTROL_CASE, library: Library | None = None, **options: Any) -> Any:
    return GradientSubject(FORWARD, op, library or NumpyLibrary(), case, **options)


def spoilt(spoil: Spoil) -> Operation:
    """The reference with its gradients changed in place by ``spoil(gradients, named arguments)``."""

    @functools.wraps(BACKWARD)
    def op(*args: Any, **options: Any) -> Any:
        gradients = list(BACKWARD(*args, **options))
        spoil(gradients, {**dict(zip(("dout", "q", "k", "v", "out", "lse", "mask"), args, strict=True)), **options})
        return tuple(gradients)

    return op


def plain(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: str, *, scale: float | None = None) -> Any:
    """Without the keywords that an operation need not have."""
    return BACKWARD(dout, q, k, v, out, lse, mask, scale=scale)


class TestChecks:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("library", [NumpyLibrary(), TorchLibrary()], ids=lambda library: library.name)
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_check_and_control(self, name: str, library: Library, mask: str) -> None:
        check, case = check_of(name), replace(CONTROL_CASE, mask=mask)
        if not check.applies(case):
            assert (name, mask) == ("unseen keys", "full")  # all keys are seen
            return
        check.run(subject_of(BACKWARD, case, library))
        with pytest.raises(BitwiseMismatch):
            check.run(subject_of(check.control(BACKWARD), case, library))

    @pytest.mark.parametrize("name", NAMES)
    def test_controls_are_right_within_rounding(self, name: str) -> None:
        got, expected = (subject_of(op).baseline for op in (check_of(name).control(BACKWARD), BACKWARD))
        for gradient, bits in got.named.items():
            numbers, right = (values_of(x, "float16").astype(float) for x in (bits, expected.named[gradient]))
            assert relative_error(numbers, right) < 2.0**-10
            assert (bits != expected.named[gradient]).any()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_a_control_that_depends_on_nothing_passes(self, name: str, mask: str) -> None:
        """So that it is the one thing that makes a control fail."""
        check, case = check_of(name), replace(CONTROL_CASE, mask=mask)
        if check.applies(case):
            check.run(subject_of(non_invariant_gradients(BACKWARD, seen.nothing), case))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("gradient", ["dq", "dk", "dv"])
    def test_every_gradient_is_looked_at(self, name: str, gradient: str) -> None:
        index = ["dq", "dk", "dv"].index(gradient)
        if index > 0 and name in OF_QUERIES:
            return
        if (name, gradient) == ("mask type", "dv"):
            return  # of one row: no control cuts it
        check = check_of(name)
        control = check.control(BACKWARD)

        def take_one(gradients: list[Any], named: dict[str, Any]) -> None:
            arguments = [named.pop(x) for x in ("dout", "q", "k", "v", "out", "lse", "mask")]
            gradients[index] = control(*arguments, **named)[index]

        with pytest.raises(BitwiseMismatch, match=f": {gradient}: "):
            check.run(subject_of(spoilt(take_one)))

    @pytest.mark.parametrize(
        ("number", "blind"),
        [
            ("batch_size", ("batch position", "strides", "repeated runs", "head slices")),
            ("position", ("head slices", "mask type", "layout", "strides")),
            ("rows", ("batch size", "permutation", "repeated key heads", "repeated runs")),
            ("strides", ("batch size", "permutation", "rows left out", "neighbours")),
            ("garbage", ("strides", "batch size", "repeated runs", "unseen keys")),
            ("padding", ("batch size", "mask type", "neighbours", "head slices")),
            ("first_key", ("sequences alone", "rows left out", "layout", "strides")),
        ],
    )
    def test_controls_depend_on_one_thing(self, number: str, blind: tuple[str, ...]) -> None:
        control = gradients_depend_on(getattr(seen, number))(BACKWARD)
        for name in blind:
            case = (
                replace(CONTROL_CASE, mask="full") if (number, name) == ("padding", "rows left out") else CONTROL_CASE
            )
            check_of(name).run(subject_of(control, case))

    def test_a_leak_from_neighbours_is_found(self) -> None:
        def leak(gradients: list[Any], named: dict[str, Any]) -> None:
            gradients[2] += 0 * named["dout"].sum()  # 0 * NaN

        with pytest.raises(BitwiseMismatch, match="between sequences of NaN: dv: "):
            check_of("neighbours").run(subject_of(spoilt(leak)))

    @pytest.mark.parametrize(
        ("name", "ignored", "message"),
        [
            ("key lengths", "kv_lengths", "kv_lengths, sequence 0 against alone: dq"),
            ("key padding", "key_padding_mask", "padding right, sequence 0 against alone: dq"),
        ],
    )
    def test_padding_that_is_read_is_found(self, name: str, ignored: str, message: str) -> None:
        @functools.wraps(BACKWARD)
        def reading(*args: Any, **options: Any) -> Any:
            return BACKWARD(*args, **{x: option for x, option in options.items() if x != ignored})

        with pytest.raises(BitwiseMismatch, match=message):
            check_of(name).run(subject_of(reading, replace(CONTROL_CASE, mask="full")))

    @pytest.mark.parametrize("name", ["key lengths", "key padding"])
    @pytest.mark.parametrize(("index", "gradient"), [(0, "dq"), (1, "dk"), (2, "dv")])
    @pytest.mark.parametrize("left", [-0.0, np.nan])
    def test_what_is_left_in_padding_is_found(self, name: str, index: int, gradient: str, left: float) -> None:
        def leave(gradients: list[Any], named: dict[str, Any]) -> None:
            array = gradients[index]
            if index == 0:
                array[(named["dout"] == 0).all(axis=-1)] = left
            elif named.get("kv_lengths") is not None:
                array[0, :, named["kv_lengths"][0] :] = left
            elif named.get("key_padding_mask") is not None:
                array[0][:, ~named["key_padding_mask"][0]] = left

        with pytest.raises(BitwiseMismatch, match=f"sequence 0, where none is: {gradient}: .* expected 0.0"):
            check_of(name).run(subject_of(spoilt(leave)))

    def test_rows_left_out_that_are_read_are_found(self) -> None:
        def read(gradients: list[Any], named: dict[str, Any]) -> None:
            gradients[1] += 0 * named["q"].sum()

        with pytest.raises(BitwiseMismatch, match="first 10 rows against alone: dk"):
            check_of("rows left out").run(subject_of(spoilt(read)))

    def test_packed_sequences_that_are_mixed_up_are_found(self) -> None:
        def mix(gradients: list[Any], named: dict[str, Any]) -> None:
            starts = named.get("cu_seqlens_q")
            if starts is not None:
                gradients[0][starts[2]] = gradients[0][starts[2] + 1]

        with pytest.raises(BitwiseMismatch, match="sequence 0, packed against alone: dq"):
            check_of("packed sequences").run(subject_of(spoilt(mix)))

    def test_results_of_another_shape_are_no_mismatch(self) -> None:
        subject = subject_of(lambda *a, **o: [np.zeros(3, np.float16)] * 3, Case(2, 2))
        with pytest.raises(
            AssertionError, match=r"^dq, dk and dv: got shapes and dtypes \(\(3,\), 'float16'"
        ) as caught:
            _ = subject.baseline
        assert not isinstance(caught.value, BitwiseMismatch)

    @pytest.mark.parametrize(("runs", "calls"), [(None, 4), (2, 2), (9, 9)])
    def test_number_of_runs(self, runs: int | None, calls: int) -> None:
        made = []
        subject = subject_of(spoilt(lambda gradients, named: made.append(1)), Case(2, 2), runs=runs)
        check_of("repeated runs").run(subject)
        assert len(made) == calls

    def test_a_device_runs_often(self) -> None:
        """A race shows as a rare difference."""
        assert subject_of(BACKWARD, library=NumpyLibrary(device="cuda:0")).runs == 100
        assert subject_of(BACKWARD, library=NumpyLibrary(device="cuda:0"), runs=3).runs == 3


class TestSweep:
    @pytest.mark.parametrize(
        "case",
        [
            CONTROL_CASE,
            Case(9, 90, "full", "bfloat16", batch=3, heads=2, value_dim=32, seed=1),
            Case(9, 90, "causal", "float32", 24, batch=2, heads=4, kv_heads=1, lengths=(9, 4), scale=-0.3),
            Case(40, 3, "causal", batch=2),
            Case(40, 3, "full", batch=2, heads=2, kv_heads=2),
            Case(3, 600, "causal", "float32", heads=2),
        ],
        ids=str,
    )
    def test_the_reference_passes(self, case: Case) -> None:
        names = {trial.check.name for trial in testing.plan_sweep(BACKWARD, [case], GRADIENT_CHECKS)}
        assert names == {check.name for check in GRADIENT_CHECKS if check.applies(case)}
        testing.assert_gradient_batch_invariant(BACKWARD, FORWARD, [case], TorchLibrary())

    @pytest.mark.parametrize("size", testing.SIZES)
    def test_every_size_reaches_every_check(self, size: str) -> None:
        cases = testing.standard_cases(size, dtypes=("float16",), head_dims=(64,))
        trials = testing.plan_sweep(BACKWARD, cases, GRADIENT_CHECKS)
        assert sorted(t.check.name for t in trials if t.control) == sorted(check.name for check in GRADIENT_CHECKS)

    def test_keywords_that_an_operation_lacks_are_not_used(self) -> None:
        names = {trial.check.name for trial in testing.plan_sweep(plain, [CONTROL_CASE], GRADIENT_CHECKS)}
        needing = {"layout", "key lengths", "key padding", "packed sequences"}
        assert names == {check.name for check in GRADIENT_CHECKS} - {f"gradients: {name}" for name in needing}
        testing.assert_gradient_batch_invariant(plain, FORWARD, [CONTROL_CASE])

    def test_a_wrong_operation_is_reported_with_the_first_mismatch(self) -> None:
        """A sum over all rows of the batch in parts that move with its size."""
        wrong = gradients_depend_on(seen.batch_size)(BACKWARD)
        with pytest.raises(AssertionError) as caught:
            testing.assert_gradient_batch_invariant(wrong, FORWARD, [CONTROL_CASE])
        count, *lines = str(caught.value).splitlines()
        failed = {line.split(",")[0].removeprefix("gradients: ") for line in lines}
        assert failed == {
            "sequences alone",
            "batch size",
            "neighbours",
            "key lengths",
            "key padding",
            "packed sequences",
        }
        assert count == f"{len(failed)} trials failed:"
        first = "gradients: sequences alone, float16 d64 causal 2x4/2x21x90: sequence 0 alone against batch 2: dq: "
        assert lines[0].startswith(first)
        assert "elements differ, first at (0, 0, 0, " in lines[0]

    def test_a_check_that_its_control_passes_is_a_failure(self) -> None:
        harmless = replace(check_of("repeated runs"), control=lambda op: op)
        with pytest.raises(AssertionError, match=r"repeated runs \(control\).*: a non-invariant operation passed"):
            testing.assert_gradient_batch_invariant(BACKWARD, FORWARD, [CONTROL_CASE], checks=[harmless])

    @pytest.mark.parametrize("broken", ["op", "forward"])
    def test_a_crash_is_a_failure(self, broken: str) -> None:
        def crash(*args: Any, **options: Any) -> Any:
            raise RuntimeError("no")

        op, forward = (crash, FORWARD) if broken == "op" else (BACKWARD, crash)
        with pytest.raises(AssertionError, match=r"gradients: strides, .*: RuntimeError: no"):
            testing.assert_gradient_batch_invariant(op, forward, [Case(2, 2)], checks=[check_of("strides")])

    def test_a_missing_package_ends_it(self) -> None:
        def unequipped(*args: Any, **options: Any) -> Any:
            raise MissingDependencyError("pip install it")

        with pytest.raises(MissingDependencyError):
            testing.assert_gradient_batch_invariant(unequipped, FORWARD, [Case(1, 1)])
        with pytest.raises(MissingDependencyError):
            list(testing.measure_gradient_accuracy(unequipped, FORWARD, [Case(1, 1)]))


class TestInputs:
    def test_upstream_gradients_are_the_same_everywhere(self) -> None:
        case = Case(2, 3, dtype="bfloat16", heads=2, value_dim=24)
        with_them, without = testing.make_inputs(case, gradients=True), testing.make_inputs(case)
        for name in "qkv":
            np.testing.assert_array_equal(getattr(with_them, name), getattr(without, name))
        shapes = {name: bits.shape for name, bits in with_them.upstream.items()}
        assert shapes == {"dout": (1, 2, 2, 24), "dlse": (1, 2, 2)}
        assert [hex(int(bits.flat[0])) for bits in with_them.upstream.values()] == ["0xbf3a", "0xbf053aaf"]


class TestAccuracy:
    CASE = Case(66, 64, heads=2)  # the first two rows see nothing

    @pytest.mark.parametrize("case", list(testing.gradient_accuracy_cases("tiny", head_dims=(64, (24, 40)))), ids=str)
    def test_the_reference_passes(self, case: Case) -> None:
        testing.assert_gradients_accurate(BACKWARD, FORWARD, case)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_the_peer_is_near(self, dtype: str, mask: str) -> None:
        """And not as near as float64 would be: its rounding is that of the dtype."""
        op = spoilt(lambda gradients, named: None)
        (result,) = testing.measure_gradient_accuracy(op, FORWARD, [replace(self.CASE, dtype=dtype, mask=mask)])
        unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[dtype]
        for error in result.errors.values():
            assert 0.2 * unit < error.peer_error < 6 * unit

    def test_the_peer_without_dlse(self) -> None:
        values = {name: np.ones((1, 1, 2, 8), np.float32) for name in ("q", "k", "v", "dout")}
        gradients = peer_gradients(values, "float32", "full", 1.0)
        np.testing.assert_allclose(gradients["dq"], 0, atol=1e-5)
        np.testing.assert_allclose(gradients["dv"], 1, atol=1e-5)
        more = peer_gradients({**values, "dlse": np.ones((1, 1, 2), np.float32)}, "float32", "full", 1.0)
        np.testing.assert_allclose(more["dq"], 1, atol=1e-5)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda g, named: np.multiply(g[0], 1.003, out=g[0]), "^[^;]*: dq: relative L2 error"),
            (lambda g, named: np.multiply(g[1], 1.003, out=g[1]), "^[^;]*: dk: relative L2 error"),
            (lambda g, named: np.multiply(g[2], 1.003, out=g[2]), "^[^;]*: dv: relative L2 error"),
            (lambda g, named: g[1].__setitem__((0, 0, 5, 7), g[1][0, 0, 5, 7] + 0.05), "dk: an element's error"),
            (lambda g, named: g[2].__setitem__((0, 0, 5, 7), np.nan), "dv: relative L2 error nan"),
            (lambda g, named: g[0].__setitem__((0, 0, 0), -0.0), "dq of a row that sees no key is not"),
        ],
    )
    def test_each_rule_can_be_broken(self, spoil: Spoil, message: str) -> None:
        testing.assert_gradients_accurate(BACKWARD, FORWARD, self.CASE)
        with pytest.raises(AssertionError, match=message):
            testing.assert_gradients_accurate(spoilt(spoil), FORWARD, self.CASE)

    @pytest.mark.parametrize("wrong", [{"mask": "full"}, {"scale": 0.2}, {"dlse": None}], ids=str)
    def test_what_is_ignored_is_found(self, wrong: dict[str, Any]) -> None:
        @functools.wraps(BACKWARD)
        def op(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: str, **options: Any) -> Any:
            return BACKWARD(dout, q, k, v, out, lse, **{"mask": mask, **options, **wrong})

        with pytest.raises(AssertionError, match="dq: relative L2"):
            testing.assert_gradients_accurate(op, FORWARD, Case(20, 30))

    def test_an_operation_without_dlse(self) -> None:
        testing.assert_gradients_accurate(plain, FORWARD, Case(20, 30))

    def test_an_exception_is_a_failed_case(self) -> None:
        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("no")

        (result,) = testing.measure_gradient_accuracy(broken, FORWARD, [Case(2, 2)])
        assert result.failures == ("RuntimeError: no",)
        assert not result.passed

    def test_the_worst_gradient(self) -> None:
        op = spoilt(lambda g, named: np.multiply(g[1], 1.001, out=g[1]))
        (result,) = testing.measure_gradient_accuracy(op, FORWARD, [self.CASE])
        assert result.worst == ("dk", result.dk)
        assert result.dk.ratio > result.dq.ratio
