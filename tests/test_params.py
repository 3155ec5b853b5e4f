"""The arguments of the kernels in Python and in C++: the same fields at the same places."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from cuattn import env, params
from cuattn.emulator import build

HEADERS = ("cuda_builtins.h", "attn/params.cuh", "common/tensor_map.cuh")
#: Structs whose names differ in C++.
NAMES = {"SequenceArrays": "Sequences", "PartialParams": "Partials", "TensorMapBytes": "TensorMap"}
STRUCTS = [
    struct
    for struct in vars(params).values()
    if isinstance(struct, type) and issubclass(struct, ctypes.Structure) and struct.__module__ == params.__name__
]


def layout_in_python(struct: type[ctypes.Structure]) -> dict[str, int]:
    places = {field[0]: getattr(struct, field[0]).offset for field in struct._fields_ if field[0] != "padding"}
    return {"sizeof": ctypes.sizeof(struct), **places}


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Of each struct in params.py, its size and the offsets of its fields as the host's C++ compiler lays them out."""
    lines = [f"#include <{header}>" for header in HEADERS]
    lines += ["#include <cstddef>", "#include <cstdio>", "int main() {"]
    for struct in STRUCTS:
        name = NAMES.get(struct.__name__, struct.__name__)
        for field in layout_in_python(struct):
            value = f"sizeof(cuattn::{name})" if field == "sizeof" else f"offsetof(cuattn::{name}, {field})"
            lines.append(f'std::printf("{struct.__name__} {field} %zu\\n", {value});')
    folder = tmp_path_factory.mktemp("layout")
    source, program = folder / "layout.cpp", folder / "layout"
    source.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
    folders = [f"-I{x}" for x in (build.INCLUDE, env.kernel_dir())]
    subprocess.run([*build._compiler(), "-std=c++17", *folders, str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    layouts: dict[str, dict[str, int]] = {struct.__name__: {} for struct in STRUCTS}
    for name, field, value in map(str.split, printed.splitlines()):
        layouts[name][field] = int(value)
    return layouts


def test_the_structs_are_found() -> None:
    assert {"ForwardParams", "BackwardParams", "ScanParams", "TensorMapBytes"} <= {x.__name__ for x in STRUCTS}
    text = Path(env.kernel_dir(), "attn", "params.cuh").read_text(encoding="utf-8")
    assert set(re.findall(r"^struct (\w+Params)\b", text, re.MULTILINE)) == {
        name for struct in STRUCTS if (name := struct.__name__).endswith("Params") and name not in NAMES
    }


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_fields_lie_where_cpp_has_them(struct: type[ctypes.Structure], in_cpp: dict[str, dict[str, int]]) -> None:
    assert layout_in_python(struct) == in_cpp[struct.__name__]
