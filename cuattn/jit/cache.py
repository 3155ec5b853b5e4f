"""A folder of build products, addressed by the content they were made from."""

import contextlib
import hashlib
import json
import multiprocessing.util
import os
import re
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cuattn import env
from cuattn.errors import CacheWarning

try:
    import fcntl
except ImportError:  # Windows: processes may build the same thing twice, nothing worse
    fcntl = None  # type: ignore[assignment]

#: Files that a cache writes: the artifact, its sidecar, its lock, and what a killed process left half written.
_OWN_FILE = re.compile(r"(?P<name>.+)-[0-9a-f]{32}\.(?P<suffix>\w+)(?P<role>|\.json|\.lock|\.[0-9a-f]{32}\.tmp)")


@dataclass(frozen=True)
class Entry:
    """One artifact in a cache folder.

    ``created`` is ISO 8601 in UTC. ``intact`` is False where the content does not match the sidecar or there is none;
    such an entry is built anew when it is next asked for.
    """

    name: str
    path: Path
    size: int
    created: str
    metadata: dict[str, Any]
    intact: bool


class ArtifactCache:
    """Build products in ``folder``, each a file ``<name>-<digest of its key>.<suffix>`` with a JSON sidecar.

    Any number of processes and threads may share a folder. A file lock lets one of them build while the others wait;
    where locks do not work they build side by side, and each still sees whole files only. Where the folder cannot be
    written, what is not in it goes to a temporary folder of this process, with one CacheWarning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, name: str, suffix: str, build: Callable[[], bytes], metadata: dict[str, Any]) -> Path:
        """The artifact for ``key``, built if it is missing or damaged.

        The key must determine the content. The path does not change while the key does not, so whoever loads by path
        never gets a stale artifact. ``metadata`` (JSON values) goes to the sidecar; it is read after ``build``, which
        may add to it. Exceptions of ``build`` pass through, and nothing is stored then.
        """
        file = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.{suffix}"
        if path := self._find(file):
            return path
        with _lock(self.folder / f"{file}.lock"):
            if path := self._find(file):
                return path
            content = build()
            try:
                return _store(self.folder / file, name, content, metadata)
            except OSError as error:
                return _store(_temporary_folder(self.folder, error) / file, name, content, metadata)

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """The metadata stored with an artifact that ``get`` has returned."""
        metadata: dict[str, Any] = json.loads(_sidecar(path).read_text(encoding="utf-8"))["metadata"]
        return metadata

    def entries(self) -> list[Entry]:
        """What is in the folder, by file name; damaged entries included."""
        found = []
        for path, match in self._own_files():
            if not match["role"]:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found.append(_entry(path, match["name"]))
        return found

    def clear(self) -> int:
        """Removes every file that a cache wrote, and no other; returns the number of artifacts among them."""
        removed = 0
        for path, match in self._own_files():
            path.unlink(missing_ok=True)
            removed += not match["role"]
        return removed

    def _find(self, file: str) -> Path | None:
        folders = [self.folder, _temporary.get(os.getpid())]
        return next((folder / file for folder in folders if folder and _is_intact(folder / file)), None)

    def _own_files(self) -> list[tuple[Path, re.Match[str]]]:
        if not self.folder.is_dir():
            return []
        matches = ((path, _OWN_FILE.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [(path, match) for path, match in matches if match and path.is_file()]


def _sidecar(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".json")


def _read(artifact: Path) -> tuple[bytes, dict[str, Any]]:
    """Content and sidecar of an artifact; ({} where the sidecar is missing or no JSON object)."""
    content = artifact.read_bytes()
    try:
        facts = json.loads(_sidecar(artifact).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    return content, facts if isinstance(facts, dict) else {}


def _is_intact(artifact: Path) -> bool:
    try:
        content, facts = _read(artifact)
    except OSError:
        return False
    return facts.get("sha256") == hashlib.sha256(content).hexdigest()


def _entry(artifact: Path, name: str) -> Entry:
    content, facts = _read(artifact)
    intact = facts.get("sha256") == hashlib.sha256(content).hexdigest()
    return Entry(name, artifact, len(content), facts.get("created", ""), facts.get("metadata", {}), intact)


def _store(artifact: Path, name: str, content: bytes, metadata: dict[str, Any]) -> Path:
    """Writes the artifact, then the sidecar that makes it count."""
    facts = {
        "name": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "metadata": metadata,
    }
    artifact.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(artifact, artifact, content)
    _write_atomically(_sidecar(artifact), artifact, json.dumps(facts, indent=1).encode())
    return artifact


def _write_atomically(target: Path, artifact: Path, content: bytes) -> None:
    temporary = artifact.with_name(f"{artifact.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive among processes and threads; no lock at all where the folder or the file system allows none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


#: Process id -> its temporary folder: a forked process must not use what its parent will remove.
_temporary: dict[int, Path] = {}
_temporary_lock = threading.Lock()


def _temporary_folder(instead_of: Path, reason: OSError) -> Path:
    """The folder of this process for what cannot be written elsewhere, made and announced once."""
    with _temporary_lock:
        if folder := _temporary.get(os.getpid()):
            return folder
        folder = _temporary[os.getpid()] = Path(tempfile.mkdtemp(prefix="cuattn-"))
        # Unlike atexit, this also runs in multiprocessing's workers, and never for the parent's folder in a fork.
        multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    warnings.warn(
        f"the kernel cache folder {instead_of} cannot be written ({reason}); what is built goes to a temporary folder "
        f"that is removed when this process ends: set {env.CACHE_DIR} to a folder that can be written",
        CacheWarning,
        stacklevel=4,
    )
    return folder
