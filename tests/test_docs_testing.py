"""docs/testing.md says of the checks, the limits and torch what the code says and torch does."""

import json
import re
import shlex
from pathlib import Path

import pytest

from cuattn.cli import main
from cuattn.testing import CHECKS, GRADIENT_CHECKS, JUDGMENTS, LIMITS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "testing.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("cpu_only")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_column(text: str) -> list[str]:
    rows = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)
    return [row for row in rows if row != "check" and row != "judgment"]


def test_every_check_is_explained() -> None:
    assert first_column(section("Checks")) == [check.name for check in (*CHECKS, *GRADIENT_CHECKS)]


def test_every_judgment_is_explained() -> None:
    assert first_column(section("Four judgments")) == list(JUDGMENTS)


def test_the_limits_are_those_of_the_code() -> None:
    dtypes = re.search(r"^\| \| (.*) \|$", section("Limits of accuracy"), re.MULTILINE)
    assert dtypes is not None
    assert dtypes[1].split(" | ") == list(LIMITS)
    rows = re.findall(r"^\| .*\(`(\w+)`\) \| (.*) \|$", section("Limits of accuracy"), re.MULTILINE)
    written = {field: [None if x == "none" else float(x) for x in values.split(" | ")] for field, values in rows}
    for field, values in written.items():
        expected = [getattr(limits, field) for limits in LIMITS.values()]
        assert values == [x if x is None else pytest.approx(x, rel=3e-3) for x in expected], field
    assert set(written) == {*next(iter(LIMITS.values())).__dict__, "floor"}


class TestTheExampleThatFails:
    command, shown = re.findall(r"^```(?:bash|text)\n(.*?)^```$", section("An example that fails"), re.M | re.S)

    def test_torch_fails_as_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        program, *argv = shlex.split(self.command)
        assert program == "cuattn"
        assert main([*argv, "--json", "-"]) == 1
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert self.words_of(err.splitlines()[2:25]) == self.words_of(self.shown.splitlines()[2:25])
        assert report["judgments"]["forward accuracy"]["passed"]
        failed = {entry["check"] for entry in report["invariance"] if not entry["passed"]}
        # what else fails depends on the CPU
        assert {"chunked prefill", "decode against prefill"} <= failed
        assert all(entry["passed"] for entry in report["invariance"] if entry["control"])

    @staticmethod
    def words_of(lines: list[str]) -> list[list[str]]:
        """Without numbers, which depend on the machine."""
        return [re.findall(r"[a-z]+", line, re.IGNORECASE) for line in lines if line.strip()]

    def test_what_is_said_of_it(self) -> None:
        rows = re.findall(r"^ (\w[\w ]*?) +(\d+) of (\d+) +failed, as it must", self.shown, re.MULTILINE)
        assert len(rows) == 14
        failing = [name for name, passed, total in rows if passed != total]
        assert failing == ["chunked prefill", "decode against prefill", "mask type"]
