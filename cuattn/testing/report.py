"""What an examination found: a row for all that was asked for, and a verdict for each judgment."""

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cuattn.reporting import PlainReporter, Reporter, counted, make_reporter
from cuattn.testing import report_files, report_tables
from cuattn.testing.accuracy import Accuracy
from cuattn.testing.checks import Check
from cuattn.testing.gradient_accuracy import GradientAccuracy
from cuattn.testing.sweep import TrialResult

#: What can be judged of an operation: of its results, and of its gradients.
FORWARD = ("forward accuracy", "forward invariance")
JUDGMENTS = (*FORWARD, "gradient accuracy", "gradient invariance")
#: Failures that are shown in full; the rest is counted, and all are in the files.
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class Row:
    """One thing that was asked for.

    outcome: "passed" or "failed"; "missing": asked for, but there is no result, which counts as a failure; "skipped":
    a check of something that the operation does not offer, and that nobody insisted on.
    """

    judgment: str
    name: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    control: bool = False

    @property
    def good(self) -> bool:
        return self.outcome in ("passed", "skipped")

    @property
    def title(self) -> str:
        return f"negative control of {self.name}" if self.control else self.name


@dataclass(frozen=True)
class Verdict:
    """One judgment and its rows."""

    judgment: str
    rows: Sequence[Row]

    @property
    def passed(self) -> bool:
        """All rows are good, and not all are skipped."""
        return all(row.good for row in self.rows) and any(row.outcome == "passed" for row in self.rows)

    def count(self, control: bool = False) -> tuple[int, int]:
        """How many passed of how many that were asked for: negative controls, or all else."""
        outcomes = [row.outcome for row in self.rows if row.control == control and row.outcome != "skipped"]
        return outcomes.count("passed"), len(outcomes)


@dataclass(frozen=True)
class Report:
    """The results of `cuattn.testing.judge`.

    sweep and gradient_sweep: the invariance of results and of gradients; accuracy and gradients: their accuracy.
    others: rows that are missing or skipped.
    """

    judgments: Sequence[str]
    sweep: Sequence[TrialResult] = ()
    gradient_sweep: Sequence[TrialResult] = ()
    accuracy: Sequence[Accuracy] = ()
    gradients: Sequence[GradientAccuracy] = ()
    others: Sequence[Row] = ()

    @property
    def ok(self) -> bool:
        """Whether every judgment that was asked for passed."""
        return bool(self.judgments) and all(verdict.passed for verdict in self.verdicts.values())

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """By judgment, those that were asked for."""
        rows = list(self._rows())
        return {name: Verdict(name, [row for row in rows if row.judgment == name]) for name in self.judgments}

    @property
    def failures(self) -> Sequence[Row]:
        """The rows that failed or are missing."""
        return [row for verdict in self.verdicts.values() for row in verdict.rows if not row.good]

    def _rows(self) -> Iterator[Row]:
        measured: Sequence[tuple[str, Sequence[Accuracy | GradientAccuracy]]]
        measured = (("forward accuracy", self.accuracy), ("gradient accuracy", self.gradients))
        for judgment, results in measured:
            for a in results:
                yield Row(judgment, str(a.case), _outcome(a.passed), "; ".join(a.failures))
        for judgment, sweep in (("forward invariance", self.sweep), ("gradient invariance", self.gradient_sweep)):
            for r in sweep:
                name = f"{short_name(r.trial.check)}, {r.trial.case}"
                yield Row(judgment, name, _outcome(r.passed), r.detail, r.seconds, r.trial.control)
        yield from self.others

    def show(self, reporter: Reporter | None = None) -> None:
        """Print tables, the first failures, and a line for each judgment; to standard output by default."""
        reporter = reporter or make_reporter(sys.stdout)
        for table in report_tables.tables(self):
            reporter.table(table)
        failures = self.failures
        for row in failures[:SHOWN_FAILURES]:
            reporter.line(f"{row.judgment}, {row.title}: {row.detail}", good=False)
        if len(failures) > SHOWN_FAILURES:
            reporter.line(f"and {counted(len(failures) - SHOWN_FAILURES, 'more failure')}", good=False)
        for verdict in self.verdicts.values():
            reporter.line(_line(verdict), good=verdict.passed)

    def __str__(self) -> str:
        stream = io.StringIO()
        self.show(PlainReporter(stream))
        return stream.getvalue()

    def to_json(self, **about: Any) -> str:
        """All results as JSON; ``about`` is added: what else a reader should know, such as versions."""
        return report_files.to_json(self, about)

    def to_junit(self) -> str:
        """JUnit XML: a suite for each judgment, a test case for each row."""
        return report_files.to_junit(self)


def short_name(check: Check) -> str:
    """What a check is called where it is plain that gradients are meant."""
    return check.name.removeprefix("gradients: ")


def _outcome(passed: bool) -> str:
    return "passed" if passed else "failed"


def _line(verdict: Verdict) -> str:
    passed, asked = verdict.count()
    caught, controls = verdict.count(control=True)
    outcomes = [row.outcome for row in verdict.rows]
    parts = [f"{verdict.judgment}: {passed} of {counted(asked, 'trial')} passed"]
    if controls:
        parts.append(f"{caught} of {counted(controls, 'negative control')} failed as they must")
    for outcome, words in (("missing", "without a result"), ("skipped", "skipped")):
        if outcome in outcomes:
            parts.append(f"{outcomes.count(outcome)} {words}")
    return ", ".join(parts)
