"""The emulator finds what is wrong in a kernel, and what is right gives the same bits in every order of its threads."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import cuattn
from cuattn import backend, emulator, env
from cuattn.backend import Backend
from cuattn.checks import check_attention
from cuattn.config import select_config
from cuattn.emulator import build
from cuattn.errors import CompileError, EmulatorError, MissingDependencyError
from cuattn.interop import Device, import_tensor
from cuattn.schedule import plan_forward
from cuattn.testing import assert_bitwise_equal


@dataclass(frozen=True)
class Problem:
    """One head's attention of seeded random bf16 tensors, and who computes it."""

    len_q: int = 40
    len_k: int = 300
    head_dim: int = 64
    mask: str = "full"
    arch: str = "sm_80"
    infinite: bool = False  # a value that the first three causal rows do not see is infinite
    row_stride: int = 1  # rows of the output are this many rows apart

    def inputs(self) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(self.len_q + self.len_k)
        lengths = (self.len_q, self.len_k, self.len_k)
        q, k, v = (torch.randn(1, 1, n, self.head_dim, generator=random).to(torch.bfloat16) for n in lengths)
        if self.infinite:
            v[:, :, self.len_k - self.len_q + 3] = torch.inf
        return [q, k, v]

    def run(self, schedule: str = "ascending", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) of the emulated kernel, its fibers run in that order."""
        tensors = self.inputs()
        problem = check_attention(*tensors, self.mask, None, None, "bhsd", None)
        spread = torch.full((1, 1, self.len_q, self.row_stride, self.head_dim), torch.nan, dtype=torch.bfloat16)
        out, lse = spread[:, :, :, 0], torch.full((1, 1, self.len_q), torch.nan)
        outputs = {"out": import_tensor(out, "out"), "lse": import_tensor(lse, "lse")}
        config = select_config(self.head_dim, self.mask, "bfloat16", self.arch)
        plan = plan_forward(config, problem, outputs["out"], outputs["lse"])
        inputs = {"q": problem.query, "k": problem.key, "v": problem.value}
        emulator.forward(config, plan, inputs, outputs, schedule, seed)
        return out.contiguous(), lse


@dataclass(frozen=True)
class Bug:
    """One change of one file of the kernels, and a pattern of what the emulator says about it."""

    file: str
    old: str
    new: str
    error: str
    problem: Problem = field(default_factory=Problem)


FORWARD, EPILOGUE, SOFTMAX = "forward_sm80.cuh", "attn/epilogue.cuh", "attn/softmax.cuh"
STORE_ROW = "ptx::store_global_u32x4(row_out + row * stride + unit * 8,"
UNORDERED = "race with a (read|write) by thread|never written|a copy to there has not been waited for"
BUGS = {
    "no barrier in the main loop": Bug(FORWARD, "        __syncthreads();  // this step's tile", "//", UNORDERED),
    "no barrier among the lanes that load queries": Bug(
        FORWARD, "ptx::cp_async_wait<lookahead>();\n    __syncwarp();", "ptx::cp_async_wait<lookahead>();", UNORDERED
    ),
    "no barrier among the lanes that store rows": Bug(
        EPILOGUE,
        "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < 16",
        "\n#pragma unroll\n    for (int i = 0; i < 16",
        "shared (load|store) .* race with a (read|write) by thread",
    ),
    "waits for too few copies": Bug(
        FORWARD, "cp_async_wait<lookahead - 1>", "cp_async_wait<lookahead>", "a copy to there has not been waited for"
    ),
    "loads into a tile in use": Bug(
        FORWARD, "load(block_step + lookahead);", "load(block_step + lookahead + 1);", "cp.async .* race|waited for"
    ),
    "reads behind the last key": Bug(
        FORWARD,
        "stride, key_length - first_key, thread);",
        "stride, key_tile, thread);",
        r"cp\.async of 16 bytes .* outside of every tensor .*(k|v) \d+ of 38400",
    ),
    "reads behind the last query": Bug(
        FORWARD,
        "query_stride, query_length - warp_row, lane);",
        "query_stride, 16, lane);",
        r"cp\.async of 16 bytes .* outside of every tensor .*q \d+ of 5120",
    ),
    "writes behind shared memory": Bug(
        EPILOGUE, "store_shared_u32(scratch + ", "store_shared_u32(scratch + 0x40000 + ", "outside of shared memory"
    ),
    "writes before shared memory": Bug(
        EPILOGUE, "store_shared_u32(scratch + ", "store_shared_u32(scratch % 16 - 16 + ", "outside of shared memory"
    ),
    "a shared object that is not there": Bug(
        FORWARD, "shared_address(shared.rows[warp])", "shared_address(shared.rows[99])", "not in shared memory"
    ),
    "a misaligned load": Bug(
        EPILOGUE,
        "load_shared_u32x4(scratch + ",
        "load_shared_u32x4(scratch + 4 + ",
        "shared load of 16 bytes .* misaligned",
    ),
    "a misaligned store": Bug(
        EPILOGUE, STORE_ROW, STORE_ROW.replace("* 8", "* 8 + 1"), "global store of 16 bytes .* misaligned"
    ),
    "a store to an input": Bug(
        FORWARD,
        "place.head_of(params.out, params.out_strides)",
        "place.head_of(const_cast<u16*>(params.query), params.query_strides)",
        "global store of 16 bytes .* q is an input",
    ),
    "a row that is not stored": Bug(
        EPILOGUE,
        STORE_ROW,
        f"if (row != 3) {STORE_ROW}",
        r"^out: 192 elements were not written, the first at \(0, 0, 3, 0\)",
    ),
    "a store between the rows": Bug(
        EPILOGUE,
        STORE_ROW,
        f"if (row == 3) ptx::store_global_u32x4(row_out + row * stride + 64 + unit * 8, uint4{{}});\n{STORE_ROW}",
        r"^out: 384 bytes between its elements were written",
        Problem(row_stride=2),
    ),
    "a collective without half of its lanes": Bug(
        SOFTMAX,
        "quad_sum(float x) {",
        "quad_sum(float x) {\n    if (threadIdx.x & 16) return x;",
        "divergence: reached __s[a-z_]+ while others of its group wait in __s[a-z_]+",
    ),
    "a mask without half of the lanes": Bug(
        SOFTMAX, "all_lanes = 0xffffffffu", "all_lanes = 0x0000ffffu", "__shfl_xor_sync: the mask leaves lanes out"
    ),
    "a thread that returns early": Bug(
        FORWARD,
        "    RowStatistics rows;",
        "    if (thread == 37) return false;\n    RowStatistics rows;",
        "deadlock: the block waits in __syncthreads with 127 of 128 threads; 1 of 128 threads returned",
    ),
    "a branch with another barrier": Bug(
        FORWARD,
        "        __syncthreads();  // this step's tile",
        "        if (warp == 1) __syncthreads_or(0); else __syncthreads();\n//",
        "divergence: reached __syncthreads(_or)? while others of its group wait in __syncthreads(_or)?",
    ),
    "shared memory that nobody wrote": Bug(
        FORWARD,
        "KeyTile::load<16, 32>(warp_memory,",
        "if (lane < 0) KeyTile::load<16, 32>(warp_memory,",
        "never written",
    ),
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernel sources, in use in place of them."""
    folder = tmp_path / "kernels"
    shutil.copytree(env.kernel_dir(), folder)
    monkeypatch.setenv(env.KERNEL_DIR, str(folder))
    return folder


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name}: {old!r} is there {text.count(old)} times"
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, sources: Path) -> None:
    bug = BUGS[name]
    bug.problem.run()  # control: the kernel as it is
    change(sources / bug.file, bug.old, bug.new)
    for schedule in emulator.SCHEDULES:
        with pytest.raises(EmulatorError) as caught:
            bug.problem.run(schedule)
        assert re.search(bug.error, str(caught.value)), f"{schedule}: {caught.value}"


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
    """Two chunks; rows that see no whole tile; and rows that must be computed alone, which is another way through."""

    @pytest.mark.parametrize("infinite", [False, True])
    def test_every_order_gives_the_same_bits(self, head_dim: int, arch: str, infinite: bool) -> None:
        problem = Problem(70, 600, head_dim, "causal", arch, infinite)
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
        Problem(len_q, 300, head_dim, "causal", arch)
        for len_q in (40, 130)
        for head_dim in (64, 128)
        for arch in ("sm_80", "sm_90a")
    ]
    expected = [problem.run() for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(Problem.run, problems), expected, strict=True):
                assert_bitwise_equal(got[0], wanted[0], "out")
                assert_bitwise_equal(got[1], wanted[1], "lse")


def test_an_output_between_the_rows_of_an_input() -> None:
    """A buffer whose rows are taken in turn by q and by the output."""
    problem = Problem()
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
        problem = Problem(70, 300, 128, "causal")
        archs = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
        lse = {arch: replace(problem, arch=arch).run()[1] for arch in archs}
        assert_bitwise_equal(lse["sm_86"], lse["sm_80"], "sm_86")
        assert_bitwise_equal(lse["sm_89"], lse["sm_80"], "sm_89")
        assert_bitwise_equal(lse["sm_120"], lse["sm_90a"], "sm_120")
        assert not torch.equal(lse["sm_90a"], lse["sm_80"])
        assert torch.allclose(lse["sm_90a"], lse["sm_80"], rtol=1e-5)

    def test_the_backend_chooses(self) -> None:
        problem = Problem(70, 300, 128, "causal")
        for arch in ("sm_80", "sm_90a"):
            with cuattn.use_backend("emulator", arch=arch):
                _, lse = cuattn.attention(*problem.inputs(), "causal", return_lse=True)
            assert_bitwise_equal(lse, replace(problem, arch=arch).run()[1], arch)


class TestBackend:
    @pytest.fixture(autouse=True)
    def no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(env.BACKEND, raising=False)

    def test_the_block_decides_then_the_variable_then_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert backend.active() == Backend("auto")
        monkeypatch.setenv(env.BACKEND, "emulator:sm_90a")
        assert backend.active() == Backend("emulator", "sm_90a")
        with cuattn.use_backend("reference"):
            assert backend.active() == Backend("reference")
            with cuattn.use_backend("emulator"):
                assert backend.active() == Backend("emulator", "sm_80")
            assert backend.active() == Backend("reference")
        monkeypatch.setenv(env.BACKEND, "emulator")
        assert backend.active() == Backend("emulator", "sm_80")

    def test_an_error_in_the_block_ends_it(self) -> None:
        with pytest.raises(RuntimeError), cuattn.use_backend("emulator"):
            raise RuntimeError
        assert backend.active() == Backend("auto")

    def test_other_threads_are_left_alone(self) -> None:
        with ThreadPoolExecutor(1) as pool, cuattn.use_backend("emulator"):
            assert pool.submit(backend.active).result() == Backend("auto")

    @pytest.mark.parametrize(
        ("name", "arch", "message"),
        [
            ("gpu", None, "name: got 'gpu', expected one of 'auto', 'cuda', 'reference', 'emulator'"),
            ("reference", "sm_80", "arch: got 'sm_80', expected None for the backend 'reference'"),
            ("emulator", "sm_70", "arch: got 'sm_70', expected one of sm_80, "),
            ("emulator", "90", "arch: got '90', expected one of sm_80, "),
        ],
    )
    def test_bad_choices(self, name: str, arch: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"), cuattn.use_backend(name, arch):
            pass

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("gpu", "CUATTN_BACKEND: got 'gpu', expected one of"),
            ("emulator:sm_70", "arch: got 'sm_70', expected one of"),
        ],
    )
    def test_a_bad_variable(self, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.BACKEND, value)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            cuattn.attention(*Problem().inputs())

    def test_each_backend_takes_the_tensors_it_can(self) -> None:
        cpu, gpu = Device("cpu", 0), Device("cuda", 1)
        assert Backend("auto").for_device(gpu) == Backend("cuda")
        assert Backend("auto").for_device(cpu) == Backend("reference")
        for name in ("emulator", "reference"):
            with pytest.raises(
                ValueError, match=f"^q: got device cuda:1, expected a cpu device for the backend '{name}'"
            ):
                Backend(name, "sm_80" if name == "emulator" else None).for_device(gpu)
        with pytest.raises(ValueError, match=r"^q: got device cpu, expected a cuda device for the backend 'cuda'"):
            Backend("cuda").for_device(cpu)


class TestBuild:
    @pytest.mark.parametrize("command", ["no-such-compiler -O0", " "])
    def test_without_a_compiler(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", command)
        with pytest.raises(
            MissingDependencyError, match=r"needs a C\+\+17 compiler .* apt-get install g\+\+, or set CXX"
        ):
            Problem().run()

    def test_errors_of_the_compiler_show_numbered_source(self, sources: Path) -> None:
        header = sources / "attn" / "tile.cuh"
        line = header.read_text().splitlines().index("struct Tile {") + 1
        change(header, "struct Tile {", "struct Tile { int wrong = ;")
        with pytest.raises(CompileError) as caught:
            Problem().run()
        message = str(caught.value)
        assert message.startswith("forward_sm80_d64_full_bfloat16_sm_80: ")
        assert " -std=c++17 " in message.replace("flags: ", " ")
        assert re.search(r"tile\.cuh:\d+:\d+: error: ", message)
        assert re.search(r"^   1 \| #include <cuda_builtins.h>$", message, re.MULTILINE)
        assert f"\n{header}:\n" in message
        assert f"\n{line:4} | struct Tile {{ int wrong = ;\n" in message

    def test_an_edit_is_noticed_and_a_build_is_kept(self, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = select_config(64, "full", "bfloat16", "sm_80")
        first = build.load(config)
        assert build.load(config) is first
        change(sources / FORWARD, "// Keys that the query at", "// The keys that the query at")
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
