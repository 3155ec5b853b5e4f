"""The emulator finds what is wrong in a kernel, and what is right gives the same bits in every order of its threads."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from changed import assert_found, change
from planted_bugs import BUGS, FORWARD
from planted_problems import ManyRows

import cuattn
from cuattn.config import ForwardConfig
from cuattn.emulator import build
from cuattn.errors import CompileError, EmulatorError, MissingDependencyError
from cuattn.testing import assert_bitwise_equal


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, sources: Path) -> None:
    assert_found(BUGS[name], sources)


def test_errors_say_where(sources: Path) -> None:
    bug = BUGS["a misaligned store"]
    change(sources / bug.file, bug.old, bug.new)
    with pytest.raises(
        EmulatorError, match=r"^forward_sm80_d64_full_bfloat16_sm_80: block 0, thread \d+: global store"
    ):
        bug.problem.run()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
@pytest.mark.parametrize("head_dim", [64, 128])
class TestSchedules:
    """Two chunks, and rows that see no whole tile."""

    @pytest.mark.parametrize("infinite", [False, True])
    def test_every_order_gives_the_same_bits(self, head_dim: int, arch: str, infinite: bool) -> None:
        problem = ManyRows(70, 600, head_dim, "causal", arch, infinite)
        expected = problem.run()
        assert infinite == (not expected[0].isfinite().all())
        for schedule, seed in (("descending", 1), *(("random", seed) for seed in range(1, 4))):
            for mine, wanted, name in zip(problem.run(schedule, seed), expected, ("out", "lse"), strict=True):
                assert_bitwise_equal(mine, wanted, f"{name}, {schedule} {seed}")


def test_random_schedules_follow_their_seed(sources: Path) -> None:
    """The order is another one for each seed, and the same one for the same seed: a racy kernel shows it."""
    bug = BUGS["a misaligned store"]
    change(sources / bug.file, bug.old, bug.new)

    def first_thread(seed: int) -> str:
        with pytest.raises(EmulatorError) as caught:
            bug.problem.run("random", seed)
        return str(caught.value).partition(": global")[0]

    assert first_thread(1) == first_thread(1)
    assert len({first_thread(seed) for seed in range(8)}) > 2


def test_python_threads_run_at_the_same_time() -> None:
    problems = [
        ManyRows(len_q, 300, head_dim, "causal", arch)
        for len_q in (40, 130)
        for head_dim in (64, 128)
        for arch in ("sm_80", "sm_90a")
    ]
    expected = [problem.run() for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(ManyRows.run, problems), expected, strict=True):
                assert_bitwise_equal(got[0], wanted[0], "out")
                assert_bitwise_equal(got[1], wanted[1], "lse")


def test_an_output_between_the_rows_of_an_input() -> None:
    """A buffer whose rows are taken in turn by q and by the output."""
    problem = ManyRows()
    q, k, v = problem.inputs()
    rows = torch.stack([q, torch.full_like(q, torch.nan)], dim=3)
    with cuattn.use_backend("emulator"):
        cuattn.attention(rows[:, :, :, 0], k, v, out=rows[:, :, :, 1])
    assert_bitwise_equal(rows[:, :, :, 1].contiguous(), problem.run()[0], "out")
    assert_bitwise_equal(rows[:, :, :, 0].contiguous(), q, "q")


def test_speed() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=random).to(torch.bfloat16) for _ in range(3))
    with cuattn.use_backend("emulator"):
        cuattn.attention(q, k, v, "causal")  # builds
        start = time.perf_counter()
        cuattn.attention(q, k, v, "causal")
        assert time.perf_counter() - start < 5


class TestArchitectures:
    def test_what_decides_bits_is_the_tensor_core(self) -> None:
        """sm_80 and sm_86 differ in tiles and rings, sm_80 and sm_90a in their tensor cores."""
        problem = ManyRows(70, 300, 128, "causal")
        archs = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
        lse = {arch: replace(problem, arch=arch).run()[1] for arch in archs}
        assert_bitwise_equal(lse["sm_86"], lse["sm_80"], "sm_86")
        assert_bitwise_equal(lse["sm_89"], lse["sm_80"], "sm_89")
        assert_bitwise_equal(lse["sm_120"], lse["sm_90a"], "sm_120")
        assert not torch.equal(lse["sm_90a"], lse["sm_80"])
        assert torch.allclose(lse["sm_90a"], lse["sm_80"], rtol=1e-5)

    def test_the_backend_chooses(self) -> None:
        problem = ManyRows(70, 300, 128, "causal")
        for arch in ("sm_80", "sm_90a"):
            with cuattn.use_backend("emulator", arch=arch):
                _, lse = cuattn.attention(*problem.inputs(), "causal", return_lse=True)
            assert_bitwise_equal(lse, replace(problem, arch=arch).run()[1], arch)


class TestBuild:
    @pytest.mark.parametrize("command", ["no-such-compiler -O0", " "])
    def test_without_a_compiler(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", command)
        with pytest.raises(
            MissingDependencyError, match=r"needs a C\+\+17 compiler .* apt-get install g\+\+, or set CXX"
        ):
            ManyRows().run()

    def test_errors_of_the_compiler_show_numbered_source(self, sources: Path) -> None:
        header = sources / "attn" / "tile.cuh"
        line = header.read_text().splitlines().index("struct Tile {") + 1
        change(header, "struct Tile {", "struct Tile { int wrong = ;")
        with pytest.raises(CompileError) as caught:
            ManyRows().run()
        message = str(caught.value)
        assert message.startswith("forward_sm80_d64_full_bfloat16_sm_80: ")
        assert "\nconfiguration: {" in message
        assert "'head_dim': 64, " in message
        assert " -std=c++17 " in message.replace("flags: ", " ")
        assert re.search(r"tile\.cuh:\d+:\d+: error: ", message)
        assert re.search(r"^   1 \| #include <cuda_builtins.h>$", message, re.MULTILINE)
        assert f"\n{header}:\n" in message
        assert f"\n{line:4} | struct Tile {{ int wrong = ;\n" in message

    def test_an_edit_is_noticed_and_a_build_is_kept(self, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = ForwardConfig(64, "full", "bfloat16", "sm_80")
        first = build.load(config)
        assert build.load(config) is first
        change(sources / FORWARD, "// Step 2 j loads", "// A step 2 j loads")
        monkeypatch.setattr(build.subprocess, "run", refuse := Refusal())
        with pytest.raises(AssertionError, match="compiler"):
            build.load(config)
        assert refuse.calls == 1


class Refusal:
    """In place of subprocess.run."""

    calls = 0

    def __call__(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise AssertionError("the compiler is called")
