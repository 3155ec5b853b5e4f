"""The content of a unit and of every header it includes, as one digest: an edit of any of them changes a cache key."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:<([^>\n]+)>|"([^"\n]+)")', re.MULTILINE)


def source_digest(source: str, folders: Sequence[Path]) -> str:
    """SHA-256 (hex) of a unit, its headers' names and the contents of those headers that lie in ``folders``.

    Headers are followed recursively, also where the preprocessor would skip them: a superset is always safe. A header
    that is in none of the folders belongs to the compiler and counts by name. The folders' own paths do not count.
    """
    digest = hashlib.sha256()
    for name, content in _walk(source.encode(), folders):
        for part in (name, content):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def find_header(name: str, folders: Sequence[Path]) -> Path | None:
    """The first file of that name, as a compiler finds it: folders in their order."""
    return next((path for folder in folders if (path := folder / name).is_file()), None)


def _walk(source: bytes, folders: Sequence[Path]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs (name as included, content) in the order of first inclusion; the unit itself comes first, nameless."""
    seen: set[Path | bytes] = set()
    pending: list[tuple[bytes, bytes, Path | None]] = [(b"", source, None)]
    while pending:
        name, content, includer = pending.pop(0)
        yield name, content
        for angled, quoted in _INCLUDE.findall(content):
            header = angled or quoted
            own = [includer.parent] if quoted and includer else []
            path = find_header(header.decode(), [*own, *folders])
            identity = path.resolve() if path else header
            if identity not in seen:
                seen.add(identity)
                pending.append((header, path.read_bytes() if path else b"", path))
