"""Kernels with a change in them, and what must find it."""

import re
from pathlib import Path
from typing import Any

import pytest

from cuattn import emulator
from cuattn.errors import EmulatorError
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name}: {old!r} is there {text.count(old)} times"
    file.write_text(text.replace(old, new))


def assert_found(bug: Any, sources: Path) -> None:
    """A planted bug is an error, or other bits, in every order of threads; the kernels in use are in ``sources``."""
    right = bug.problem.run()  # control: the kernel as it is
    change(sources / bug.file, bug.old, bug.new)
    for schedule in emulator.SCHEDULES:
        if bug.error is None:
            with pytest.raises(BitwiseMismatch):
                assert_bitwise_equal(bug.problem.run(schedule)[0], right[0])
            continue
        with pytest.raises(EmulatorError) as caught:
            bug.problem.run(schedule)
        assert re.search(bug.error, str(caught.value)), f"{schedule}: {caught.value}"
