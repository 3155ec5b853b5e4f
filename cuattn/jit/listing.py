"""Numbered source for the messages of compile errors."""

import re
from collections.abc import Iterator
from pathlib import Path

_CONTEXT_LINES = 4
#: "file(12): error" of NVRTC, "file:12:5: error" of host compilers.
_ERROR = re.compile(r"^(.+?)(?:\((\d+)\)|:(\d+)(?::\d+)?): (?:catastrophic |fatal )?error", re.MULTILINE)


def listings(unit: str, source: str, log: str) -> str:
    """The numbered unit of that name, then the numbered surroundings of each error that ``log`` places in a header."""
    return "\n\n".join(_listings(unit, source, log))


def _listings(unit: str, source: str, log: str) -> Iterator[str]:
    yield f"{unit}:\n{_numbered(source.splitlines(), 1)}"
    places = [(name, int(nvrtc_line or host_line)) for name, nvrtc_line, host_line in _ERROR.findall(log)]
    for name, line in dict.fromkeys(places):
        path, first = Path(name), max(1, line - _CONTEXT_LINES)
        if name != unit and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()[first - 1 : line + _CONTEXT_LINES]
            yield f"{path}:\n{_numbered(lines, first)}"


def _numbered(lines: list[str], first: int) -> str:
    return "\n".join(f"{number:4} | {line}" for number, line in enumerate(lines, first))
