"""How commands show what they found: plainly, or through rich."""

import io
import sys

import pytest

from cuattn.reporting import PlainReporter, Reporter, RichReporter, Table, make_reporter

TABLE = Table("Title", ("a", "long column"), [("first", "1"), ("second", "[bold]")], [True, False])


@pytest.mark.parametrize("kind", [PlainReporter, RichReporter])
def test_both_say_the_same(kind: type[PlainReporter | RichReporter]) -> None:
    stream = io.StringIO()
    reporter: Reporter = kind(stream)
    reporter.table(TABLE)
    reporter.line("a line [with] brackets " + "x" * 200, good=False)
    assert list(reporter.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    words = [line.split() for line in lines if line.strip()]
    assert words[0] == ["Title"]
    assert words[1] == ["a", "long", "column"]
    assert words[3:5] == [["first", "1"], ["second", "[bold]"]]
    assert "a line [with] brackets " + "x" * 200 in lines
    assert "\x1b" not in stream.getvalue()


def test_rich_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    assert list(RichReporter(stream).track(range(2), 2, "letters")) == [0, 1]
    assert stream.getvalue() == ""
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(RichReporter(stream).track(range(2), 2, "letters")) == [0, 1]
    assert "letters" in stream.getvalue()


def test_plain_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    list(PlainReporter(stream).track(range(2), 2, "letters"))
    assert stream.getvalue() == ""
    monkeypatch.setattr(stream, "isatty", lambda: True)
    list(PlainReporter(stream).track(range(2), 2, "letters"))
    assert "\rletters: 2 of 2 " in stream.getvalue()


def test_rich_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_reporter(), RichReporter)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(make_reporter(), PlainReporter)
