"""`cuattn.testing.judge`: four judgments, each of which can fail alone; what is missing; reports as files."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from stand_ins import moving_chunks, row_by_row, with_keywords

import cuattn
from cuattn import testing
from cuattn.errors import MissingDependencyError
from cuattn.testing import CHECKS, FORWARD, JUDGMENTS, Case, Cases, Report, TorchLibrary, seen
from cuattn.testing.controls import depends_on
from cuattn.testing.gradient_controls import gradients_depend_on

SWEPT = Case(9, 80, batch=2, heads=4, kv_heads=2)
CASES = Cases((SWEPT,), (Case(16, 128),), (Case(66, 80),))
#: Checks for which a test is over soon.
FEW = ["batch size", "decode against prefill", "gradients: batch size"]


def forward(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None, return_lse: bool = False) -> Any:
    return cuattn.attention(q, k, v, mask, scale=scale, return_lse=return_lse)


def without_lse(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None) -> Any:
    return forward(q, k, v, mask, scale=scale)


def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: str, *, scale: float | None = None) -> Any:
    """Of a forward pass of its own, so that what is wrong with the judged one does not reach it."""
    out, lse = forward(q, k, v, mask, scale=scale, return_lse=True)
    return cuattn.attention_backward(dout, q, k, v, out, lse, mask, scale=scale)


def inaccurate(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None, return_lse: bool = False) -> Any:
    out, lse = forward(q, k, v, mask, scale=scale, return_lse=True)
    return (out * out.dtype.type(1.01)), lse


def inaccurate_backward(*args: Any, scale: float | None = None) -> Any:
    dq, dk, dv = backward(*args, scale=scale)
    return dq, dk * dk.dtype.type(1.01), dv


def broken(*args: Any, scale: float | None = None, return_lse: bool = False) -> Any:
    raise RuntimeError("no \x1b[31mcolour\x00")


def leaving(*args: Any, scale: float | None = None, return_lse: bool = False) -> Any:
    raise SystemExit(0)


def failed(report: Report) -> set[str]:
    return {name for name, verdict in report.verdicts.items() if not verdict.passed}


class TestJudgments:
    @pytest.mark.parametrize("op", [forward, without_lse])
    def test_all_four_pass(self, op: Any) -> None:
        report = testing.judge(op, backward, cases=CASES)
        assert report.ok, str(report)
        assert tuple(report.verdicts) == JUDGMENTS
        assert all(verdict.count()[0] > 0 for verdict in report.verdicts.values())
        assert report.failures == []
        assert report.accuracy[0].lse_error is None if op is without_lse else report.accuracy[0].lse_error > 0

    @pytest.mark.parametrize(
        ("op", "gradients", "judgment"),
        [
            (inaccurate, backward, "forward accuracy"),
            (moving_chunks, backward, "forward invariance"),
            (forward, inaccurate_backward, "gradient accuracy"),
            (forward, gradients_depend_on(seen.batch_size)(backward), "gradient invariance"),
        ],
    )
    def test_each_fails_alone(self, op: Any, gradients: Any, judgment: str) -> None:
        report = testing.judge(op, gradients, cases=CASES)
        assert failed(report) == {judgment}
        assert not report.ok
        assert {row.outcome for row in report.failures} == {"failed"}

    def test_an_operation_without_lse_can_fail(self) -> None:
        report = testing.judge(depends_on(seen.rows)(without_lse), judgments=FORWARD[1:], cases=CASES)
        names = {row.name.partition(",")[0] for row in report.failures}
        assert names == {"chunked prefill", "decode against prefill", "mask type"}
        assert not any("LSE" in row.detail for row in report.failures)

    @pytest.mark.parametrize("broken_op", [broken, leaving])
    def test_an_operation_that_raises_fails_all(self, broken_op: Any) -> None:
        """Also one that would end the process, and with exit code 0."""
        report = testing.judge(broken_op, broken_op, cases=CASES, checks=FEW)
        assert failed(report) == set(JUDGMENTS)
        assert {row.detail.partition(":")[0] for row in report.failures} <= {"RuntimeError", "SystemExit"}

    def test_a_missing_package_is_raised(self) -> None:
        def unequipped(*args: Any, **options: Any) -> Any:
            raise MissingDependencyError("pip install it")

        with pytest.raises(MissingDependencyError):
            testing.judge(unequipped, cases=CASES)

    def test_the_standard_cases_reach_everything(self) -> None:
        cases = Cases.standard(dtypes=["float16"], head_dims=[64])
        report = testing.judge(with_keywords, judgments=["forward invariance"], cases=cases)
        assert report.ok, str(report)
        assert {r.trial.check.name for r in report.sweep} == {check.name for check in CHECKS}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"judgments": ["speed"]}, "judgments: got 'speed', expected some of 'forward accuracy', "),
            ({"judgments": []}, "judgments: got none, expected at least one"),
            ({"checks": ["batch sizes"]}, "checks: got 'batch sizes', expected some of 'batch size', "),
        ],
    )
    def test_wrong_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            testing.judge(forward, cases=CASES, **options)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_gradients_by_autograd(self, dtype: str) -> None:
        def attention(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None) -> Any:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) if mask == "causal" else scores.softmax(-1)
            return (weights @ v.float()).to(q.dtype)

        cases = replace(CASES, gradient_accuracy=(replace(CASES.gradient_accuracy[0], dtype=dtype),))
        gradients = testing.with_autograd(attention)
        options: Any = {"judgments": ["gradient accuracy"], "cases": cases, "library": TorchLibrary()}
        report = testing.judge(attention, gradients, **options)
        assert report.ok, str(report)
        wrong = testing.judge(attention, testing.with_autograd(lambda *a, **o: 1.01 * attention(*a, **o)), **options)
        assert not wrong.ok


class TestMissing:
    """What was asked for and gave no result is a failure."""

    def missing(self, report: Report) -> list[tuple[str, str, str]]:
        assert not report.ok
        return [(row.judgment, row.title, row.detail) for row in report.failures if row.outcome == "missing"]

    def test_gradients(self) -> None:
        report = testing.judge(forward, cases=CASES)
        detail = "no gradient operation was given"
        assert self.missing(report) == [(name, "gradients", detail) for name in JUDGMENTS[2:]]
        assert "\ngradient accuracy: 0 of 1 trial passed, 1 without a result\n" in str(report)
        assert testing.judge(forward, judgments=FORWARD, cases=CASES).ok

    def test_cases(self) -> None:
        report = testing.judge(forward, backward, cases=Cases((), (), ()))
        assert failed(report) == set(JUDGMENTS)
        assert ("forward accuracy", "cases", "there are none") in self.missing(report)
        assert ("forward invariance", "batch size", "no case that it applies to") in self.missing(report)

    def test_a_check_that_no_case_reaches(self) -> None:
        cases = replace(CASES, invariance=(replace(SWEPT, batch=1),))
        report = testing.judge(forward, judgments=["forward invariance"], cases=cases)
        names = [name for _, name, detail in self.missing(report) if detail == "no case that it applies to"]
        assert names == ["batch size", "batch position", "permutation"]

    def test_a_control(self) -> None:
        cases = replace(CASES, invariance=(replace(SWEPT, len_k=30),))
        report = testing.judge(forward, judgments=["forward invariance"], checks=["strides"], cases=cases)
        control = ("forward invariance", "negative control of strides", "no case with keys and rows enough")
        assert self.missing(report) == [control]

    def test_a_check_that_was_named(self) -> None:
        options: Any = {"judgments": FORWARD, "cases": CASES}
        skipped = testing.judge(forward, **options)
        rows = [row for row in skipped.verdicts["forward invariance"].rows if row.outcome == "skipped"]
        assert skipped.ok
        assert ("packed sequences", "the operation has no keyword cu_seqlens_q") in [(r.name, r.detail) for r in rows]
        report = testing.judge(forward, checks=["strides", "packed sequences"], **options)
        detail = "the operation has no keyword cu_seqlens_q"
        assert self.missing(report) == [("forward invariance", "packed sequences", detail)]

    def test_checks_of_another_judgment(self) -> None:
        report = testing.judge(forward, backward, checks=["strides"], cases=CASES)
        assert self.missing(report) == [("gradient invariance", "checks", "none of those that were named")]

    @pytest.mark.parametrize("judgment", JUDGMENTS)
    def test_results_that_are_lost(self, judgment: str) -> None:
        def lose(results: Iterable[Any], total: int, label: str) -> Iterable[Any]:
            found = list(results)
            assert len(found) == total
            return found[:-1] if label == judgment else found

        report = testing.judge(forward, backward, cases=CASES, checks=FEW, track=lose)
        assert failed(report) == {judgment}
        assert [detail for *_, detail in self.missing(report)] == ["no result"]

    def test_nothing_but_skipped_checks(self) -> None:
        assert not Report(("forward invariance",)).ok
        assert not Report(()).ok
        row = testing.Row("forward invariance", "layout", "skipped")
        assert not Report(("forward invariance",), others=(row,)).ok


class TestFiles:
    def parsed(self, report: Report) -> dict[str, ElementTree.Element]:
        root = ElementTree.fromstring(report.to_junit())
        assert root.tag == "testsuites"
        return {suite.attrib["name"]: suite for suite in root}

    @pytest.mark.parametrize("gradients", [None, backward, broken])
    @pytest.mark.parametrize("op", [forward, moving_chunks, broken])
    def test_junit_says_what_the_report_says(self, op: Callable[..., Any], gradients: Any) -> None:
        report = testing.judge(op, gradients, cases=CASES, checks=[*FEW, "layout"])
        suites = self.parsed(report)
        assert tuple(suites) == JUDGMENTS
        for name, verdict in report.verdicts.items():
            suite = suites[name]
            assert suite.attrib["tests"] == str(len(suite)) == str(len(verdict.rows))
            for count, tag, outcome in (
                ("failures", "failure", "failed"),
                ("errors", "error", "missing"),
            ):
                found = [case.attrib["name"] for case in suite if case.find(tag) is not None]
                assert found == [row.title for row in verdict.rows if row.outcome == outcome]
                assert suite.attrib[count] == str(len(found))
            assert verdict.passed == (suite.attrib["failures"] == suite.attrib["errors"] == "0")
            names = [(case.attrib["classname"], case.attrib["name"]) for case in suite]
            assert len(set(names)) == len(names)

    def test_junit_shows_what_was_skipped(self) -> None:
        suite = self.parsed(testing.judge(row_by_row, judgments=FORWARD[1:], cases=CASES))["forward invariance"]
        skipped = {case.attrib["name"]: case[0] for case in suite if case.find("skipped") is not None}
        assert suite.attrib["skipped"] == str(len(skipped)) == "9"
        assert skipped["layout"].attrib["message"] == "the operation has no keyword layout"

    def test_junit_holds_the_mismatch_and_no_character_that_xml_forbids(self) -> None:
        suites = self.parsed(testing.judge(broken, judgments=["forward accuracy"], cases=CASES))
        (failure,) = suites["forward accuracy"].iter("failure")
        assert failure.attrib["message"] == "RuntimeError: no ?[31mcolour?"

    def test_json(self) -> None:
        report = testing.judge(row_by_row, cases=CASES)
        written = json.loads(report.to_json(commit="abc"))
        assert (written["passed"], written["commit"]) == (False, "abc")
        assert {name: verdict["passed"] for name, verdict in written["judgments"].items()} == {
            name: name in FORWARD for name in JUDGMENTS
        }
        invariance = written["judgments"]["forward invariance"]
        assert (invariance["trials"], invariance["trials_passed"]) == (14, 14)
        assert (invariance["controls"], invariance["controls_caught"]) == (14, 14)
        assert {"name": "layout", "detail": "the operation has no keyword layout"} in invariance["skipped"]
        missing = written["judgments"]["gradient accuracy"]["missing"]
        assert missing == [{"name": "gradients", "detail": "no gradient operation was given"}]

    def test_show_goes_where_it_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = testing.judge(row_by_row, judgments=["forward accuracy"], cases=CASES)
        report.show()
        assert capsys.readouterr().out.endswith("forward accuracy: 1 of 1 trial passed\n")
        assert str(report).endswith("forward accuracy: 1 of 1 trial passed\n")


class TestLimits:
    def test_they_are_not_weaker_than_they_were(self) -> None:
        """float16 and bfloat16 within 1.1 times the peer's error, gradients within twice."""
        assert set(testing.LIMITS) == {"float16", "bfloat16", "float32"}
        for dtype, limits in testing.LIMITS.items():
            assert limits.ratio <= (2.0 if dtype == "float32" else 1.1)
            assert (limits.element, limits.lse_units) <= (2.0, 4)
            assert limits.gradient_ratio <= 2.0
            assert limits.gradient_element <= 3.0
            assert limits.floor <= 0.21 * limits.epsilon
        assert (testing.LIMITS["float32"].absolute or 1) <= 3e-6

    def test_the_table_is_what_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options: Any = {"cases": replace(CASES, invariance=())}
        judged = ["forward accuracy", "gradient accuracy"]
        assert testing.judge(forward, backward, judgments=judged, **options).ok
        strict = replace(testing.LIMITS["float16"], ratio=0.5, gradient_ratio=0.5)
        monkeypatch.setitem(testing.LIMITS, "float16", strict)
        assert failed(testing.judge(forward, backward, judgments=judged, **options)) == set(judged)
