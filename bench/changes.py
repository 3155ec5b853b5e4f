"""Copies of the kernels with a change in them, for experiments and for bugs that a tool has to find."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cuattn import env

#: (file relative to the kernel folder, text that must be in it, text to put in its place)
Substitution = tuple[str, str, str]


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
