"""README.md and docs/ say what is true: their Python runs, their links lead somewhere, .ci/run types their commands.

A block fenced as ``python`` runs everywhere. One fenced as ``python gpu`` runs where there is a CUDA device, one as
``python needs=package`` where that package is installed; both are compiled everywhere.
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cuattn import env

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    info: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def execute(self) -> None:
        # The blank lines in front make a traceback name the line of the page.
        exec(compile("\n" * self.line + self.source, str(self.page), "exec"), {"__name__": "__main__"})


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, tuple(match["info"].split()), match["body"])
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.info[:1] == ("python",)]
NEEDS = "needs="
SHELL = [block for block in BLOCKS if block.info[:1] == ("bash",)]


@pytest.mark.parametrize("block", [block for block in PYTHON if "gpu" not in block.info], ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (mark.removeprefix(NEEDS) for mark in block.info if mark.startswith(NEEDS)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    block.execute()


@pytest.mark.parametrize("block", [block for block in PYTHON if len(block.info) > 1], ids=str)
def test_python_with_needs_compiles(block: Block) -> None:
    compile(block.source, str(block), "exec")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [block for block in PYTHON if "gpu" in block.info], ids=str)
def test_gpu_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block.execute()


def test_every_fence_is_marked_as_expected() -> None:
    """A misspelt mark would take a block out of the tests."""
    known = {("python",), ("python", "gpu"), ("python", f"{NEEDS}transformers"), ("bash",), ("text",), ("cpp",)}
    assert {block.info for block in BLOCKS} <= known
    assert any(block.page.name == "README.md" for block in PYTHON)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_lists_the_environment_variables() -> None:
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Environment variables\n")
    table = section.partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == env.VARIABLES


def test_continuous_integration_types_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [block.source.strip() for block in SHELL if block.page.name == "README.md"]
    (command,) = [command for command in commands if "pytest" in command]
    install, test = command.split(" && ")
    assert install in script
    assert test in script


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in PAGES:
        place = "index.html" if page.name == "README.md" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / place).is_file(), page
