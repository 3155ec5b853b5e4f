"""For `mkdocs build`: README.md as the first page, and the files of the repository that pages link to."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Their place on the site, where it is not that in the repository.
_PLACES = {"README.md": "index.md"}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)(?P<path>[^)#\s]+)")


def _place(file: Path) -> str:
    """Of a file of the repository on the site."""
    path = file.relative_to(ROOT).as_posix()
    return _PLACES.get(path, path.removeprefix("docs/"))


def _linked(page: Path) -> list[Path]:
    """The files that a page links to."""
    found = (page.parent / match["path"] for match in _LINK.finditer(page.read_text(encoding="utf-8")))
    return [file.resolve() for file in found if file.is_file()]


def on_files(files: Any, config: Any) -> Any:
    """Adds what lies outside of docs/."""
    waiting, added = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], set()
    while waiting:
        page = waiting.pop()
        if page in added:
            continue
        added.add(page)
        if not page.is_relative_to(ROOT / "docs"):
            files.append(File.generated(config, _place(page), abs_src_path=str(page)))
        if page.suffix == ".md":
            waiting += _linked(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead from place to place on the site."""
    source = Path(page.file.abs_src_path)
    start = posixpath.dirname(page.file.src_uri) or "."

    def on_site(match: re.Match[str]) -> str:
        file = (source.parent / match["path"]).resolve()
        return posixpath.relpath(_place(file), start) if file.is_file() else match["path"]

    return _LINK.sub(on_site, markdown)
