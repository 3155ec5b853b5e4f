"""Rows of a benchmark: the CSV file that holds them, and the facts about the machine that they depend on."""

import contextlib
import csv
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cuattn import __version__, machine

#: Of a source checkout.
ROOT = Path(__file__).resolve().parents[2]
#: The keys of `provenance`: columns at the end of every benchmark's CSV.
PROVENANCE = (
    *("gpu", "driver", "torch", "cudnn", "cupy", "nvrtc", "libraries", "python", "machine"),
    *("commit", "contract"),
)
NONE = "none"

T = TypeVar("T")


def within(seconds: float, items: Sequence[T]) -> Iterator[T]:
    """The items, until so many seconds have passed; says how long it took and what was left out."""
    start = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - start > seconds:
            print(f"OUT OF TIME after {seconds:.0f} s: {len(items) - number} of {len(items)} left out", flush=True)
            return
        yield item
    print(f"all {len(items)} in {time.monotonic() - start:.0f} s", flush=True)


def notes(labels: Mapping[str, Any], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each provider that has no figures, with the reason."""
    return [{**labels, "provider": name, "note": reason} for name, reason in reasons.items()]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows under ``columns``; a key that is not among them is an error, a missing one an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Results:
    """Rows of a benchmark, each with what `provenance` says, and the CSV file that holds them, if any."""

    def __init__(self, path: Path | None, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns
        self.rows: list[dict[str, Any]] = []
        self._facts = provenance()
        print(", ".join(f"{name} {value}" for name, value in self._facts.items()), flush=True)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Stores them at once, so that a run that is stopped leaves what it has."""
        self.rows += [{**row, **self._facts} for row in rows]
        if self.path:
            write_csv(self.path, self.rows, self.columns)


def provenance() -> dict[str, str]:
    """What a measured figure depends on; "none" stands for what is missing."""
    versions = machine.versions()
    gpu, torch, cudnn = _torch()
    return {
        "gpu": gpu,
        "driver": _driver(),
        "torch": torch,
        "cudnn": cudnn,
        "cupy": versions["cupy"],
        "nvrtc": versions["nvrtc"],
        "libraries": _libraries(),
        "python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "commit": commit(),
        "contract": versions["contract"],
    }


def commit() -> str:
    """The variable COMMIT, or the checkout's commit, with "+" if files differ from it; without one the version."""
    if given := os.environ.get("COMMIT"):
        return given
    if not (ROOT / "pyproject.toml").is_file():
        return __version__
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changes.stdout)


def _torch() -> tuple[str, str, str]:
    """(GPU, torch's version, cuDNN's)."""
    try:
        import torch
    except ImportError:
        return NONE, NONE, NONE
    if not torch.cuda.is_available():
        return NONE, torch.__version__, NONE
    return torch.cuda.get_device_name(), torch.__version__, str(torch.backends.cudnn.version())


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return NONE


def _libraries() -> str:
    """Other peers that are installed, with their versions."""
    names = ("triton", "flash-attn", "flashinfer-python")
    found = [f"{name} {version}" for name in names if (version := machine.installed_version(name)) != machine.ABSENT]
    return " ".join(found) or NONE


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
