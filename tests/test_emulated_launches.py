"""What the emulator says about global memory that several blocks and launches share."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cuattn import emulator
from cuattn.config import KernelConfig
from cuattn.config.base import Constants
from cuattn.emulator import build
from cuattn.errors import EmulatorError
from cuattn.interop import import_tensor
from cuattn.launches import Launch

SOURCE = Path(__file__).parent / "kernels" / "moves.cuh"
NOTHING = -1
#: (word that is read, word that is written), one after the other in a block.
Moves = Sequence[tuple[int, int]]
USES = ("outputs", "updates", "scratch")


class MovesParams(ctypes.Structure):
    """Mirror of MovesParams in moves.cuh."""

    _fields_ = (("words", ctypes.c_void_p), ("places", ctypes.c_void_p), ("moves", ctypes.c_int))


@dataclass(frozen=True)
class MovesConfig(KernelConfig):
    kernel = "moves"
    params = "MovesParams"
    name = "moves"
    threads = 32
    shared_bytes = 0
    arch: str = "sm_80"

    @property
    def constants(self) -> Constants:
        return {}


def run(use: str, *launches: Sequence[Moves], words: int = 4, schedule: str = "ascending") -> list[int]:
    """The words, 0 at first, after launches of as many blocks as have moves."""
    memory = np.zeros(words, np.int32)
    all_places = [np.array(blocks, np.int32).reshape(len(blocks), -1, 2) for blocks in launches]
    planned = [
        Launch(
            MovesConfig(),
            len(places),
            MovesParams(memory.ctypes.data, places.ctypes.data, places.shape[1]),
            **{"inputs": {"places": import_tensor(places, "places")}, use: {"words": import_tensor(memory, "words")}},
        )
        for places in all_places
    ]
    emulator.run(
        planned, schedule, load=lambda _: build.load_kernel("moves", SOURCE.read_text(), "moves", "MovesParams")
    )
    return memory.tolist()


def write(word: int) -> Moves:
    return [(NOTHING, word)]


def read(word: int) -> Moves:
    return [(word, NOTHING)]


@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
class TestRight:
    def test_launches_write_parts_of_an_output(self, schedule: str) -> None:
        assert run("outputs", [write(0), write(3)], [write(2), write(1)], schedule=schedule) == [1, 1, 1, 1]

    @pytest.mark.parametrize("use", ["updates", "scratch"])
    def test_a_launch_reads_what_another_wrote(self, use: str, schedule: str) -> None:
        assert run(use, [write(0), write(2)], [[(0, 3)], [(2, 1)]], schedule=schedule) == [1, 1, 1, 1]

    @pytest.mark.parametrize("use", ["updates", "scratch"])
    def test_a_launch_writes_what_another_wrote(self, use: str, schedule: str) -> None:
        assert run(use, [write(0), write(2)], [write(2), write(0)], schedule=schedule) == [1, 0, 1, 0]

    @pytest.mark.parametrize("use", ["updates", "scratch"])
    def test_a_block_reads_what_it_wrote(self, use: str, schedule: str) -> None:
        assert run(use, [[(NOTHING, 0), (0, 1)]], schedule=schedule) == [1, 1, 0, 0]

    def test_a_block_writes_scratch_memory_again(self, schedule: str) -> None:
        assert run("scratch", [[(NOTHING, 0), (NOTHING, 0)]], schedule=schedule) == [1, 0, 0, 0]

    def test_an_update_holds_something_before(self, schedule: str) -> None:
        assert run("updates", [[(2, 0)], [(2, 1)]], schedule=schedule) == [0, 0, 0, 0]


class TestWrong:
    def test_scratch_memory_that_nobody_wrote(self) -> None:
        with pytest.raises(
            EmulatorError, match=r"moves: block 1, .* load of 4 bytes .*: words has not been written there"
        ):
            run("scratch", [write(0)], [read(0), read(1)])

    @pytest.mark.parametrize("use", ["outputs", "updates"])
    def test_two_blocks_write(self, use: str) -> None:
        with pytest.raises(EmulatorError, match=r"store of 4 bytes .*: words has been written there before"):
            run(use, [write(2), write(2)])

    def test_two_blocks_write_scratch_memory(self) -> None:
        with pytest.raises(EmulatorError, match=r"store of 4 bytes .*: words has been written there by another block"):
            run("scratch", [write(2), write(2)])

    def test_two_launches_write_an_output(self) -> None:
        with pytest.raises(EmulatorError, match="words has been written there before"):
            run("outputs", [write(2)], [write(2)])

    @pytest.mark.parametrize("use", ["outputs", "updates"])
    def test_a_block_writes_twice(self, use: str) -> None:
        with pytest.raises(EmulatorError, match="words has been written there before"):
            run(use, [[(NOTHING, 2), (NOTHING, 2)]])

    @pytest.mark.parametrize("use", ["updates", "scratch"])
    @pytest.mark.parametrize("blocks", [(write(1), read(1)), (read(1), write(1))])
    def test_a_block_reads_what_another_writes(self, use: str, blocks: tuple[Moves, Moves]) -> None:
        """The order of the blocks is free: it is found in the schedule that has the write first."""
        schedule = "ascending" if blocks[0] == write(1) else "descending"
        with pytest.raises(EmulatorError, match=r"load of 4 bytes .*: words has been written there by another block"):
            run(use, [write(1)], blocks, schedule=schedule)

    def test_an_output_that_launches_leave_incomplete(self) -> None:
        with pytest.raises(EmulatorError, match=r"^words: 1 elements were not written, the first at \(2,\)"):
            run("outputs", [write(0), write(3)], [write(1)])

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("move", [write(4), read(4)])
    def test_outside(self, use: str, move: Moves) -> None:
        with pytest.raises(EmulatorError, match=r"outside of every tensor .*words 16 of 16"):
            run(use, [move])
