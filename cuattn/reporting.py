"""What commands and reports print: through rich where it is installed, as plain text otherwise."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, TypeVar

T = TypeVar("T")

PAGE_WIDTH = 120


@dataclass(frozen=True)
class Table:
    """Rows of text under columns. good holds for each row whether it is as it should be; None: nothing to judge."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    good: Sequence[bool] | None = None

    def verdict(self, row: int) -> bool | None:
        return None if self.good is None else self.good[row]


def counted(number: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{number} {noun}{'s' * (number != 1)}"


class Reporter(Protocol):
    """Where tables and lines go to."""

    def line(self, text: str = "", good: bool | None = None) -> None:
        """One line; good or bad news may be coloured."""

    def table(self, table: Table) -> None: ...

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """The items as they come, with a progress bar."""


class PlainReporter:
    """Text without colours; on a terminal the progress is one line that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def line(self, text: str = "", good: bool | None = None) -> None:
        print(text, file=self.stream, flush=True)

    def table(self, table: Table) -> None:
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        head = (table.columns, ["-" * width for width in widths]) if any(table.columns) else ()
        self.line(table.title)
        for cells in (*head, *table.rows):
            self.line("  " + "  ".join(map(str.ljust, cells, widths)).rstrip())

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        live = self.stream.isatty()
        for done, item in enumerate(items, 1):
            if live:
                print(f"\r{label}: {done} of {total} ", end="", file=self.stream, flush=True)
            yield item
        if live:
            print(f"\r{' ' * (len(label) + 30)}\r", end="", file=self.stream, flush=True)


class RichReporter:
    """Coloured tables and a progress bar."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        # A file has no width: its lines shall not be folded at that of a terminal.
        self.console = Console(file=stream, highlight=False, width=None if stream.isatty() else PAGE_WIDTH)

    def line(self, text: str = "", good: bool | None = None) -> None:
        self.console.print(text, style=_style(good), markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        import rich.box
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        drawn.show_header = any(table.columns)
        for column in table.columns:
            drawn.add_column(column, overflow="fold")
        for index, row in enumerate(table.rows):
            drawn.add_row(*map(Text, row), style=_style(table.verdict(index)))
        self.console.print(drawn)

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        if not self.console.is_terminal:  # rich would leave an empty line
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            yield from progress.track(items, total=total, description=label)


def _style(good: bool | None) -> str:
    return {None: "", True: "green", False: "bold red"}[good]


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """The best reporter at hand, to standard output unless told otherwise."""
    stream = stream or sys.stdout
    try:
        return RichReporter(stream)
    except ImportError:
        return PlainReporter(stream)
