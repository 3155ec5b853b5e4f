"""What the benchmarks share and needs no GPU: work counted, changed kernels, CSV files, facts about the machine."""

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cuattn import env
from cuattn.cli import machine

ROOT = Path(__file__).resolve().parents[1]
#: (file relative to the kernel folder, text that must be in it, text to put in its place)
Substitution = tuple[str, str, str]


T = TypeVar("T")


def attention_flop(
    batch: int, heads: int, len_q: int, len_k: int, head_dim: int, mask: str, value_dim: int | None = None
) -> float:
    """Floating-point operations that are counted: for each query row and key that it sees, 2 head_dim + 2 value_dim.

    A causal row sees half a key less than it does: the convention of other published figures, with which a square
    problem costs half of a full one. It gives no credit for the masked part of the tiles on the diagonal. Exponentials
    are not counted.
    """
    pairs = len_q * (len_k - len_q / 2) if mask == "causal" else len_q * len_k
    return 2 * batch * heads * pairs * (head_dim + (value_dim or head_dim))


def within(seconds: float, items: Sequence[T]) -> Iterator[T]:
    """The items, until so many seconds have passed; says how long it took and what was left out."""
    start = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - start > seconds:
            print(f"OUT OF TIME after {seconds:.0f} s: {len(items) - number} of {len(items)} left out", flush=True)
            return
        yield item
    print(f"all {len(items)} in {time.monotonic() - start:.0f} s", flush=True)


@contextlib.contextmanager
def changed_kernels(substitutions: Iterable[Substitution], source: Path | None = None) -> Iterator[Path]:
    """Inside it cuattn compiles a temporary copy of the kernel folder, changed textually; yields the copy.

    Raises ValueError if a text to replace is not there: the kernel has moved on, and the change would do nothing.
    """
    before = os.environ.get(env.KERNEL_DIR)
    with tempfile.TemporaryDirectory(prefix="cuattn-kernels-") as folder:
        shutil.copytree(source or env.kernel_dir(), folder, dirs_exist_ok=True)
        for name, old, new in substitutions:
            file = Path(folder, name)
            text = file.read_text(encoding="utf-8")
            if old not in text:
                raise ValueError(f"{name}: expected to hold {old!r}")
            file.write_text(text.replace(old, new), encoding="utf-8")
        os.environ[env.KERNEL_DIR] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[env.KERNEL_DIR]
            else:
                os.environ[env.KERNEL_DIR] = before


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Rows under ``columns``; a key that is not among them is an error, a missing one an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Results:
    """Rows of a benchmark on a GPU, each with what `provenance` says, and the CSV file that holds them, if any."""

    def __init__(self, path: Path | None, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns
        self.rows: list[dict[str, Any]] = []
        self._facts = provenance()
        print(", ".join(f"{name} {value}" for name, value in self._facts.items()), flush=True)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows += [{**row, **self._facts} for row in rows]
        if self.path:  # each time, so that a run that is stopped leaves what it has
            write_csv(self.path, self.rows, self.columns)


def begin(parser: argparse.ArgumentParser, columns: Sequence[str]) -> tuple[argparse.Namespace, Results]:
    """The parsed options of a benchmark that needs a GPU, --csv among them, and where its rows go; torch is seeded."""
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA device that torch can use")
    torch.manual_seed(0)
    return options, Results(options.csv, columns)


def commit() -> str:
    """The variable COMMIT, or the checkout's commit, with "+" if files differ from it; without git "unknown"."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changes.stdout)


#: The keys of `provenance`: columns at the end of every GPU benchmark's CSV.
PROVENANCE = ("gpu", "driver", "torch", "cudnn", "cupy", "nvrtc", "commit", "contract")


def provenance() -> dict[str, str]:
    """What a figure measured on a GPU depends on; needs torch, and says "none" for what is missing."""
    import torch

    versions = machine.versions()
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "driver": _driver(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "none",
        "cupy": versions["cupy"],
        "nvrtc": versions["nvrtc"],
        "commit": commit(),
        "contract": versions["contract"],
    }


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"
