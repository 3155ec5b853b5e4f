"""The artifact cache: damaged entries, many processes, folders that cannot be written."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuattn.errors import CacheWarning
from cuattn.jit import ArtifactCache
from cuattn.jit import cache as cache_module

CONTENT = bytes(range(256)) * 64


def build() -> bytes:
    return CONTENT


def unexpected() -> bytes:
    raise AssertionError("built although the entry was intact")


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache")


def test_an_intact_entry_is_not_built_again(cache: ArtifactCache) -> None:
    path = cache.get("key", "kernel", "cubin", build, {"arch": "sm_80"})
    assert path.read_bytes() == CONTENT
    assert cache.get("key", "kernel", "cubin", unexpected, {}) == path
    assert cache.read_metadata(path) == {"arch": "sm_80"}


def test_another_key_is_another_file(cache: ArtifactCache) -> None:
    first = cache.get("key", "kernel", "cubin", build, {})
    second = cache.get("other key", "kernel", "cubin", lambda: b"other", {})
    assert first != second
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b"other")


def truncate(artifact: Path, sidecar: Path) -> None:
    artifact.write_bytes(CONTENT[:-1])


def empty(artifact: Path, sidecar: Path) -> None:
    artifact.write_bytes(b"")


def flip_a_bit(artifact: Path, sidecar: Path) -> None:
    artifact.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])


def remove_artifact(artifact: Path, sidecar: Path) -> None:
    artifact.unlink()


def remove_sidecar(artifact: Path, sidecar: Path) -> None:
    sidecar.unlink()


def truncate_sidecar(artifact: Path, sidecar: Path) -> None:
    sidecar.write_bytes(sidecar.read_bytes()[:-5])


def replace_sidecar(artifact: Path, sidecar: Path) -> None:
    sidecar.write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip_a_bit, remove_artifact, remove_sidecar, truncate_sidecar, replace_sidecar],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_entry_is_built_again(cache: ArtifactCache, damage) -> None:
    path = cache.get("key", "kernel", "cubin", build, {})
    damage(path, path.with_name(path.name + ".json"))
    assert not any(entry.intact for entry in cache.entries())
    builds = []
    assert cache.get("key", "kernel", "cubin", lambda: builds.append(1) or CONTENT, {}) == path
    assert builds == [1]
    assert path.read_bytes() == CONTENT
    assert [entry.intact for entry in cache.entries()] == [True]


@pytest.mark.filterwarnings("error::cuattn.errors.CacheWarning")
def test_a_failed_build_stores_nothing_and_passes_its_error_on(cache: ArtifactCache) -> None:
    def fail() -> bytes:
        raise OSError("the compiler's own error")

    with pytest.raises(OSError, match="the compiler's own error"):
        cache.get("key", "kernel", "cubin", fail, {})
    assert cache.entries() == []


def test_entries_and_clear_leave_other_files_alone(cache: ArtifactCache) -> None:
    assert cache.entries() == []
    assert cache.clear() == 0
    path = cache.get("key", "kernel", "cubin", build, {"arch": "sm_80"})
    (left_behind := path.with_name(f"{path.name}.{'0' * 32}.tmp")).write_bytes(b"half")
    (foreign := cache.folder / "notes.json").write_text("{}")
    (entry,) = cache.entries()
    assert (entry.name, entry.path, entry.size, entry.metadata) == ("kernel", path, len(CONTENT), {"arch": "sm_80"})
    assert json.loads(path.with_name(path.name + ".json").read_text())["created"] == entry.created
    assert cache.clear() == 1
    assert not left_behind.exists()
    assert list(cache.folder.iterdir()) == [foreign]


def test_a_folder_that_is_named_like_an_entry_is_left_alone(cache: ArtifactCache) -> None:
    path = cache.get("key", "kernel", "cubin", build, {})
    (folder := path.with_name(path.name.replace("kernel", "folder"))).mkdir()
    assert [entry.path for entry in cache.entries()] == [path]
    assert cache.clear() == 1
    assert folder.is_dir()


def test_an_entry_that_is_removed_meanwhile_is_not_listed(
    cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, removed = (cache.get(key, "kernel", "cubin", build, {}) for key in ("a", "b"))
    found = cache._own_files()
    removed.unlink()
    monkeypatch.setattr(cache, "_own_files", lambda: found)
    assert [entry.path for entry in cache.entries()] == [kept]


# --- many processes


def get_with_log(folder: Path, log: Path, locked: bool) -> None:
    """One process of several that want the same entry: notes a build in ``log``, what it got in ``log.<pid>``."""
    if not locked:
        cache_module.fcntl = None

    def slow_build() -> bytes:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        return CONTENT

    path = ArtifactCache(folder).get("key", "kernel", "cubin", slow_build, {})
    log.with_suffix(f".{os.getpid()}").write_bytes(path.read_bytes())


def get_repeatedly(folder: Path, stop: Path) -> None:
    while not stop.exists():
        assert ArtifactCache(folder).get("key", "kernel", "cubin", build, {}).parent == folder


def start(target, count: int, *arguments: object) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def join(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("locked", [True, False])
def test_many_processes_get_one_entry(tmp_path: Path, locked: bool) -> None:
    """With the lock one of them builds; without it several do, and every one still gets the whole content."""
    log = tmp_path / "log"
    assert join(start(get_with_log, 5, tmp_path / "cache", log, locked)) == [0] * 5
    assert [file.read_bytes() for file in tmp_path.glob("log.*")] == [CONTENT] * 5
    builds = len(log.read_text().splitlines())
    assert builds == 1 if locked else builds > 1
    assert [entry.intact for entry in ArtifactCache(tmp_path / "cache").entries()] == [True]


def test_processes_survive_entries_that_are_damaged_meanwhile(tmp_path: Path) -> None:
    folder, stop = tmp_path / "cache", tmp_path / "stop"
    path = ArtifactCache(folder).get("key", "kernel", "cubin", build, {})
    workers = start(get_repeatedly, 4, folder, stop)
    rebuilt = 0
    deadline = time.monotonic() + 60
    while rebuilt < 20 and time.monotonic() < deadline:
        damage = (truncate, empty, remove_artifact, remove_sidecar, truncate_sidecar)[rebuilt % 5]
        try:
            damage(path, path.with_name(path.name + ".json"))
        except FileNotFoundError:
            continue  # removed by the last round, not yet built again
        while not cache_module._is_intact(path) and time.monotonic() < deadline:
            time.sleep(0.001)
        rebuilt += 1
    stop.touch()
    assert join(workers) == [0] * 4
    assert rebuilt == 20
    assert ArtifactCache(folder).get("key", "kernel", "cubin", build, {}).read_bytes() == CONTENT


# --- folders that cannot be written


def test_a_folder_that_cannot_be_made_is_replaced_until_the_process_ends(tmp_path: Path) -> None:
    """A cache folder below a regular file: permission bits would not stop root."""
    (tmp_path / "file").touch()
    program = f"""
import pathlib, warnings
from cuattn.jit import ArtifactCache
cache = ArtifactCache(pathlib.Path({str(tmp_path / "file" / "cache")!r}))
builds = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for key in ("a", "b", "a"):
        path = cache.get(key, "kernel", "cubin", lambda: builds.append(1) or b"content", {{}})
        assert path.read_bytes() == b"content"
print(path.parent)
print(len(builds), [warning.category.__name__ for warning in caught])
print(caught[0].message)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    folder, counts, message = output.splitlines()
    assert counts == "2 ['CacheWarning']"
    assert str(tmp_path / "file" / "cache") in message
    assert "CUATTN_CACHE_DIR" in message
    assert not Path(folder).exists()


def refuse(*_: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.filterwarnings("error::cuattn.errors.CacheWarning")
def test_a_read_only_folder_still_serves_what_it_has(cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.get("key", "kernel", "cubin", build, {})
    monkeypatch.setattr(cache_module, "_temporary", {})
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert cache.get("key", "kernel", "cubin", unexpected, {}) == path


def test_a_full_disk_leaves_nothing_half_written(cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def write_half(path: Path, content: bytes) -> int:
        if path.parent != cache.folder:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_temporary", {})
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.warns(CacheWarning, match="No space left on device"):
        path = cache.get("key", "kernel", "cubin", build, {})
    assert path.parent != cache.folder
    assert path.read_bytes() == CONTENT
    assert cache.entries() == []
    assert [file.suffix for file in cache.folder.iterdir()] == [".lock"]
