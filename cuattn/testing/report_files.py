"""A report as JSON and as JUnit XML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from cuattn.testing.report import Report, Row, Verdict

#: Characters that XML has no way to write.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: The element of a test case that says what became of it.
_ELEMENTS = {"failed": "failure", "missing": "error", "skipped": "skipped"}


def to_json(report: Report, about: Mapping[str, Any]) -> str:
    written = {
        "passed": report.ok,
        **about,
        "judgments": {name: _summary(verdict) for name, verdict in report.verdicts.items()},
        "invariance": [
            {
                "check": r.trial.check.name,
                "case": asdict(r.trial.case),
                "control": r.trial.control,
                "passed": r.passed,
                "detail": r.detail,
                "seconds": round(r.seconds, 4),
            }
            for r in (*report.sweep, *report.gradient_sweep)
        ],
        "accuracy": [{**_finite(asdict(a)), "ratio": _finite(a.ratio), "passed": a.passed} for a in report.accuracy],
        "gradient_accuracy": [
            {
                "case": asdict(a.case),
                **{name: _finite({**asdict(e), "ratio": e.ratio}) for name, e in a.errors.items()},
                "failures": a.failures,
                "passed": a.passed,
            }
            for a in report.gradients
        ],
    }
    return json.dumps(written, indent=1, allow_nan=False) + "\n"


def _summary(verdict: Verdict) -> dict[str, Any]:
    """Of a judgment; what is missing or skipped has no other place in the JSON."""
    (passed, asked), (caught, controls) = verdict.count(), verdict.count(control=True)
    without = {
        outcome: [{"name": row.title, "detail": row.detail} for row in verdict.rows if row.outcome == outcome]
        for outcome in ("missing", "skipped")
    }
    counts = {"trials": asked, "trials_passed": passed, "controls": controls, "controls_caught": caught}
    return {"passed": verdict.passed, **counts, **without}


def _finite(value: Any) -> Any:
    """The value with None for every float that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_junit(report: Report) -> str:
    suites = ElementTree.Element("testsuites", name="cuattn")
    for verdict in report.verdicts.values():
        outcomes = [row.outcome for row in verdict.rows]
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=verdict.judgment,
            tests=str(len(outcomes)),
            failures=str(outcomes.count("failed")),
            errors=str(outcomes.count("missing")),
            skipped=str(outcomes.count("skipped")),
            time=f"{sum(row.seconds for row in verdict.rows):.3f}",
        )
        for row in verdict.rows:
            _add_case(suite, row)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, row: Row) -> None:
    name = f"cuattn.{row.judgment.replace(' ', '_')}"
    case = ElementTree.SubElement(
        suite, "testcase", classname=name, name=_NOT_XML.sub("?", row.title), time=f"{row.seconds:.3f}"
    )
    if row.outcome in _ELEMENTS:
        ElementTree.SubElement(case, _ELEMENTS[row.outcome], message=_NOT_XML.sub("?", row.detail))
