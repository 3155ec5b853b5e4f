"""Rules of the source tree that a machine can check; CONTRIBUTING.md gives the reasons."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels_cu"
TWINS = ROOT / "cuattn" / "emulator" / "include"
OPTIONAL = {
    *("cupy", "flash_attn", "flashinfer", "jax", "matplotlib", "ml_dtypes", "rich", "torch", "transformers", "vllm"),
}
#: Modules that are imported inside functions themselves, with what they import when they are loaded.
LATE = {
    "cuattn/autograd/__init__.py": {"torch"},
    "cuattn/autograd/operators.py": {"torch"},
    "cuattn/integrations/context_parallel.py": {"torch"},
    "cuattn/integrations/transformers.py": {"torch", "transformers"},
    "cuattn/integrations/vllm/backend.py": {"torch", "vllm"},
}
ASM = re.compile(r"\b(__)?asm(__)?\b")
CONDITIONAL = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif|else)\b", re.MULTILINE)

FUNCTION = re.compile(r"^\w[\w* ]*?\b(\w+)\(", re.MULTILINE)
HOST = re.compile(r"^namespace host \{$.*?^\}$", re.MULTILINE | re.DOTALL)


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def files_with(pattern: re.Pattern[str]) -> set[str]:
    """Kernel files whose code matches, relative to kernels_cu."""
    return {
        file.relative_to(KERNELS).as_posix()
        for file in KERNELS.rglob("*.cuh")
        if pattern.search(without_comments(file.read_text(encoding="utf-8")))
    }


def imports_at_load(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports when it is loaded: all but those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_at_load(node)


def lines_allowed(file: Path) -> int:
    """A kernel (a file at the top of kernels_cu) and a Python module: 400 lines; a header: 200."""
    return 400 if file.suffix == ".py" or file.parent == KERNELS else 200


def test_inline_asm_stands_only_in_the_wrappers() -> None:
    found = files_with(ASM)
    assert found, "the search for asm finds nothing at all"
    assert {name for name in found if not name.startswith("ptx/")} == set()


def functions(folder: Path) -> dict[str, set[str]]:
    """File name -> names of the functions that start a line in it, all but those of ``namespace host``."""
    return {
        file.name: set(FUNCTION.findall(HOST.sub("", without_comments(file.read_text(encoding="utf-8")))))
        for file in folder.iterdir()
    }


def test_every_wrapper_has_a_twin_and_every_twin_a_wrapper() -> None:
    wrappers = functions(KERNELS / "ptx")
    assert "mma_m16n8k16" in wrappers["mma.cuh"]
    assert all(wrappers.values())
    assert functions(TWINS / "ptx") == wrappers


def test_kernels_have_no_conditional_compilation() -> None:
    assert CONDITIONAL.search("#pragma once\n#  ifdef X\n#endif")
    assert files_with(CONDITIONAL) == set()


def test_files_are_short() -> None:
    sources = [
        file
        for folder in ("cuattn", "kernels_cu", "tests", "bench", "examples")
        for suffix in ("py", "cuh", "h", "hpp", "cpp")
        for file in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in sources}
    long = {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > lines_allowed(file)}
    assert long == {}


def test_optional_packages_are_imported_late() -> None:
    assert list(imports_at_load(ast.parse("try:\n import torch.cuda\nexcept ImportError: pass"))) == ["torch"]
    assert list(imports_at_load(ast.parse("def f():\n import torch"))) == []
    early = {
        str(file.relative_to(ROOT)): found
        for file in (ROOT / "cuattn").rglob("*.py")
        if (found := OPTIONAL & set(imports_at_load(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert early == LATE


def test_torch_stays_out_of_what_computes() -> None:
    users = {
        file.relative_to(ROOT / "cuattn").parts[0]
        for file in (ROOT / "cuattn").rglob("*.py")
        if re.search(r"^\s*(import torch|from torch)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert "interop" in users
    assert users <= {"autograd", "bench", "cli", "compat", "integrations", "interop", "testing", "replay.py"}


def test_import_loads_no_optional_package() -> None:
    program = f"import sys, cuattn.compat; print(sorted({OPTIONAL!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n"
