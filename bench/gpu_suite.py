"""Everything that needs a GPU, in one call: tests, compute-sanitizer, checks, benchmarks. Needs no network.

    python3 bench/gpu_suite.py FOLDER               the whole suite
    python3 bench/gpu_suite.py FOLDER smoke         a first look, within a minute
    python3 bench/gpu_suite.py FOLDER peers         a few benchmarks beside every peer
    python3 bench/gpu_suite.py FOLDER STEP...       the named steps

runs with this interpreter, which needs CuPy, torch for CUDA, ml_dtypes, a C++ compiler, and pytest with its plugins
xdist and timeout. FOLDER gets log.txt (all output), summary.txt, check.json, and the CSV files decode, forward
(prefill), chunked, backward, backward_memory, padded, host_cost, accuracy and jit_time, or those of the steps named:
"counters", which needs Nsight Compute, is only run by name. The variable COMMIT says which commit to note in them. A
planted_* step passes if compute-sanitizer finds the bug that was planted. Exit status 0 if all steps passed.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cuattn import env
from cuattn.bench import families
from cuattn.bench.results import ROOT
from cuattn.config import DecodeConfig

#: Exit status of compute-sanitizer when it has found something.
FOUND = 99
VERSIONS = """
import subprocess, torch
print("torch", torch.__version__, torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version())
for command in (["nvidia-smi"], ["compute-sanitizer", "--version"], ["g++", "--version"]):
    subprocess.run(command, check=True)
"""


@dataclass(frozen=True)
class Step:
    """A command, the most seconds that it may take, the status that it must end with, the last lines that are shown.

    group: what runs it besides its name: "suite" if nothing is named. variables: of its environment.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    status: int = 0
    shown: int = 3
    group: str = "suite"
    variables: tuple[tuple[str, str], ...] = ()


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, *arguments


def pytest(*arguments: str) -> tuple[str, ...]:
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def sanitize(tool: str, *arguments: str) -> tuple[str, ...]:
    # What counts is what kernels do: libraries make calls of the API of which they expect that they may fail.
    options = ["--error-exitcode", str(FOUND), "--target-processes", "all", "--report-api-errors", "no"]
    options += ["--padding", "4096"] if tool == "memcheck" else []
    return "compute-sanitizer", "--tool", tool, "--print-limit", "5", *options, *python("bench/sanitize.py", *arguments)


def all_steps(folder: Path) -> list[Step]:
    """In the order of their worth: what comes last may find no time left. The limits are far above what they take."""

    def to_file(name: str) -> tuple[str, str]:
        return "--csv", str(folder / f"{name}.csv")

    def bench(name: str, *arguments: str, to: str | None = None) -> tuple[str, ...]:
        return python("-m", "cuattn", "bench", name, *arguments, *to_file(to or name))

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return python(f"bench/{name}.py", *arguments, *to_file(name))

    def planted(tool: str, bug: str, *what: str, variables: tuple[tuple[str, str], ...] = ()) -> Step:
        return Step(f"planted_{bug}", 30, sanitize(tool, "--plant", bug, *what), FOUND, variables=variables)

    def many_rows(head_dim: int) -> tuple[str, ...]:
        return "--head-dim", str(head_dim), "--call"

    def call(name: str) -> tuple[str, ...]:
        return "--head-dim", "--call", name

    few = ("--batch", "1", "64", "--length", "2048", "32768", "--heads", "32/8", "--page-size", "--splits")
    fast = ("--providers", "flash", "cudnn", "efficient")
    gradients = (*fast, "flash_deterministic")
    lengths = ("--head-dim", "64", "128", "256", "--length", *(str(512 << i) for i in range(7)), "--repeats", "5")
    caches = ("--batch", "1", "8", "32", "--length", "2048", "8192", "32768", "131072", "--repeats", "5")
    some = ("--head-dim", "128", "--length", "1024", "8192")
    dims = ("--head-dim", "24", "64", "72", "128", "256")
    check = python("-m", "cuattn", "check", "--backend", "cuda", "--json", str(folder / "check.json"))
    target = families.portable_target()
    portable = ((env.ARCH, target),) if target else ()
    workers = str(max(1, (os.cpu_count() or 1) - 2))
    return [
        Step("versions", 30, python("-c", VERSIONS), shown=0),
        Step("smoke_bits", 90, python("bench/smoke.py"), shown=29, group="smoke"),
        Step("smoke_decode", 40, bench("decode", *few, *fast, "--seconds", "15"), shown=24, group="smoke"),
        Step("info", 30, python("-m", "cuattn", "info"), shown=20),
        Step("precompile", 60, python("-m", "cuattn", "precompile", *dims), shown=1),
        Step("tests_gpu", 240, pytest("-m", "gpu", "-n", "8"), shown=8),
        Step("tests_portable", 390, pytest("-m", "gpu", "-n", "8"), shown=8, group="", variables=portable),
        Step("decode", 110, bench("decode", *fast, *caches, "--seconds", "85"), shown=24),
        Step("padded", 45, script("padded", "--seconds", "35"), shown=20),
        Step("forward", 150, bench("prefill", *fast, *lengths, "--seconds", "120", to="forward"), shown=24),
        Step("chunked", 40, bench("chunked", *fast, "--seconds", "25"), shown=20),
        Step("backward", 90, bench("backward", *gradients, "--seconds", "65"), shown=20),
        Step("backward_memory", 30, bench("backward", "--memory", *gradients, to="backward_memory"), shown=12),
        Step("host_cost", 30, bench("host", *fast, to="host_cost"), shown=8),
        Step("memcheck", 90, sanitize("memcheck")),
        planted("memcheck", "write", *many_rows(256)),  # whose rows are stored by threads
        planted("memcheck", "read", *many_rows(64)),
        planted("memcheck", "append", *call("append beyond")),
        planted("memcheck", "gradient", *call("backward")),
        # It does not follow the named barriers at which some warps of this kernel meet, and reports what they hand
        # over: all of it or, with lanes synchronised before, some. The emulator looks for races in it.
        Step("racecheck", 110, sanitize("racecheck", "--leave-out", DecodeConfig.kernel)),
        planted("racecheck", "overlap", *many_rows(64), variables=portable),
        planted("racecheck", "barrier", *many_rows(128), variables=portable),
        planted("racecheck", "columns", *call("few rows"), variables=portable),
        planted("racecheck", "scan", *call("mask")),
        planted("racecheck", "rows", *call("backward")),
        planted("racecheck", "shared", *call("backward, 256 columns")),
        planted("racecheck", "keys", *call("backward")),
        Step("check", 290, check, shown=5),
        Step("counters", 90, script("counters"), shown=24, group=""),
        Step("accuracy", 60, script("accuracy")),
        Step("jit_time", 60, bench("jit", "--providers", "cuattn", "--repeats", "3", to="jit_time"), shown=8),
        Step("peers_prefill", 200, bench("prefill", *some, "--seconds", "150", to="peers_prefill"), 0, 8, "peers"),
        Step("peers_decode", 200, bench("decode", *few, "--seconds", "150", to="peers_decode"), 0, 24, "peers"),
        Step("peers_jit", 200, bench("jit", "--rows", "many", "--repeats", "3", to="peers_jit"), 0, 16, "peers"),
        # the tests of the wheel need an index
        Step(
            "tests_rest",
            240,
            pytest("-m", "not gpu", "-n", workers, "--ignore", "tests/test_package.py"),
            shown=8,
            group="",
        ),
    ]


def run(step: Step, seconds: float, output: Path, cache: str) -> int:
    """The command's exit status, 124 if it ran out of time; it and all that it started have ended then."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        env.CACHE_DIR: cache,
        **dict(step.variables),
    }
    with output.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def last_lines(text: str, count: int) -> list[str]:
    lines = text.rstrip().splitlines()
    return lines[max(0, len(lines) - count) :]


def run_all(steps: list[Step], folder: Path, seconds: float) -> list[str]:
    """Runs the steps one after another within ``seconds``; a line of the summary for each."""
    deadline = time.monotonic() + seconds
    lines = []
    with tempfile.TemporaryDirectory(prefix="cuattn-suite-") as scratch, (folder / "log.txt").open("w") as log:
        for step in steps:
            start = time.monotonic()
            limit = min(step.seconds, deadline - start)
            if limit < 5:
                lines.append(f"{step.name:16} NOT RUN, no time left")
                continue
            output = Path(scratch, "output")
            status = run(step, limit, output, str(Path(scratch, "cache")))
            text = output.read_text(encoding="utf-8", errors="replace")
            verdict = "passed" if status == step.status else f"FAILED, expected {step.status}"
            late = f", stopped after {limit:.0f} s" if status == 124 else ""
            lines.append(f"{step.name:16} {time.monotonic() - start:6.1f} s  exit status {status:3}  {verdict}{late}")
            log.write(f"==== {lines[-1]}\n$ {shlex.join(step.command)}\n{text}\n")
            log.flush()
            (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            shown = step.shown if status == step.status else 20
            print(
                "\n".join(["", f"==== {lines[-1]}", *text.splitlines()[len(text.splitlines()) - shown :]]), flush=True
            )
    (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help="smoke, peers, or " + ", ".join(s.name for s in all_steps(ROOT))
    )
    parser.add_argument("--seconds", type=float, default=420, help="for all steps together (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args()

    folder = options.folder.resolve()
    steps = all_steps(folder)
    names = set(options.steps or ["suite"])
    unknown = names - {name for step in steps for name in (step.name, step.group)}
    if unknown:
        parser.error(f"STEP: got {', '.join(sorted(unknown))}, expected some of {', '.join(s.name for s in steps)}")
    chosen = [step for step in steps if names & {step.name, step.group}]
    if options.dry_run:
        print("\n".join(f"{step.name:16} {step.seconds:4} s  {shlex.join(step.command)}" for step in chosen))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    lines = run_all(chosen, folder, options.seconds)
    print("\n" + "\n".join(lines))
    return int(any(" passed" not in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
