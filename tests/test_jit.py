"""From a configuration to a cubin, with NVRTC and without a GPU, on small stand-in kernels."""

import multiprocessing
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from cuattn import config as configs
from cuattn import contract, env, jit
from cuattn.config import ForwardConfig
from cuattn.errors import CompileError, MissingDependencyError
from cuattn.jit import compiler, kernels

CONFIG = ForwardConfig(64, "causal", "bfloat16", "sm_80")
#: The other kernels, whose stand-ins are the same but for the name.
OTHERS = (
    "forward_columns",
    "combine",
    "append_kv",
    "scan_mask",
    "backward_rows",
    "compact_rows",
    "backward_keys",
    "backward_queries",
)
KERNEL = """#include <common/value.cuh>
#include "beside.cuh"
struct Params { float* out; int n; };
extern "C" __global__ void forward_sm80(const Params params) {
    __shared__ float values[64];
    values[threadIdx.x] = params.out[threadIdx.x] + value() + beside();
    __syncthreads();
    params.out[threadIdx.x] = values[63 - threadIdx.x] * cuattn::config::chunk_length(params.n);
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernel sources and an empty cache of its own, both set by their environment variables."""
    folder = tmp_path / "kernels"
    (folder / "common").mkdir(parents=True)
    for name in ("forward_sm80", "forward_sm90", "decode_sm90", *OTHERS):
        (folder / f"{name}.cuh").write_text(KERNEL.replace("forward_sm80", name))
    (folder / "beside.cuh").write_text("__device__ float beside() { return 2.0f; }\n")
    (folder / "common" / "value.cuh").write_text('#include "nested.cuh"\n__device__ float value() { return nested; }\n')
    (folder / "common" / "nested.cuh").write_text("constexpr float nested = 1.0f;\n")
    monkeypatch.setenv(env.KERNEL_DIR, str(folder))
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "cache"))
    return folder


# --- the digest of sources


@pytest.mark.parametrize("name", ["forward_sm80.cuh", "beside.cuh", "common/value.cuh", "common/nested.cuh"])
def test_an_edit_of_any_included_file_changes_the_cubin(folder: Path, name: str) -> None:
    before = jit.cubin_path(CONFIG)
    assert jit.cubin_path(CONFIG) == before
    (folder / name).write_text((folder / name).read_text() + "// edited\n")
    assert jit.cubin_path(CONFIG) != before


def test_only_what_a_compiler_reads_changes_the_digest(folder: Path, tmp_path: Path) -> None:
    def digest(*folders: Path) -> str:
        return jit.source_digest("#include <forward_sm80.cuh>\n#include <cuda/elsewhere>\n", folders)

    before = digest(folder)
    (folder / "unused.cuh").write_text("never included")
    (moved := tmp_path / "moved").mkdir()
    assert digest(folder) == digest(folder.rename(moved / "kernels")) == before
    (first := tmp_path / "first" / "common").mkdir(parents=True)
    assert digest(first.parent, moved / "kernels") == before
    (first / "value.cuh").write_text("__device__ float value() { return 3.0f; }\n")
    assert digest(moved / "kernels", first.parent) == before, "the first folder that has a header wins"
    assert digest(first.parent, moved / "kernels") != before
    assert jit.source_digest("#include <a>", []) != jit.source_digest("#include <b>", [])


def test_quoted_includes_are_found_beside_the_file_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.cuh").write_text('#include "b.cuh"\n')
    (tmp_path / "sub" / "b.cuh").write_text("# include <sub/a.cuh>\n// 1")
    (tmp_path / "b.cuh").write_text("// 1")
    before = jit.source_digest("#include <sub/a.cuh>", [tmp_path])
    (tmp_path / "b.cuh").write_text("// 2")
    assert jit.source_digest("#include <sub/a.cuh>", [tmp_path]) == before
    (tmp_path / "sub" / "b.cuh").write_text("# include <sub/a.cuh>\n// 2")
    assert jit.source_digest("#include <sub/a.cuh>", [tmp_path]) != before


# --- compiling


def test_a_cubin_is_a_whole_elf_file(folder: Path) -> None:
    cubin = jit.cubin_path(CONFIG).read_bytes()
    assert cubin[:4] == b"\x7fELF"
    assert b"forward_sm80" in cubin
    program_headers, section_headers = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", cubin, 54)
    assert len(cubin) == max(program_headers + programs * program_size, section_headers + sections * section_size)


def test_every_input_of_a_compilation_is_in_its_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [jit.cubin_path(CONFIG), jit.cubin_path(replace(CONFIG, arch="sm_90a"))]
    monkeypatch.setattr(contract, "CONTRACT_VERSION", contract.CONTRACT_VERSION + 1)
    paths.append(jit.cubin_path(CONFIG))
    monkeypatch.setattr(compiler, "NUMERICS_FLAGS", ("--fmad=true", *compiler.NUMERICS_FLAGS[1:]))
    paths.append(jit.cubin_path(CONFIG))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    paths.append(jit.cubin_path(CONFIG))
    assert len(set(paths)) == 5


def test_the_numerics_flags_do_what_the_contract_says() -> None:
    from cupy.cuda import nvrtc

    def ptx(options: tuple[str, ...]) -> str:
        source = 'extern "C" __global__ void k(float* x) { x[0] = x[1] * x[2] + x[3]; x[4] = x[5] / sqrtf(x[6]); }'
        program = nvrtc.createProgram(source, "k.cu", (), ())
        nvrtc.compileProgram(program, options)
        return nvrtc.getPTX(program).decode()

    ours = ptx(compiler.flags(CONFIG))
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"[\w.]+\.f32", ours))
    assert not re.search(r"fma|ftz|approx", ours)
    fast = ptx((f"-arch={CONFIG.arch}", "--fmad=true", "--ftz=true", "--prec-div=false", "--prec-sqrt=false"))
    assert all(word in fast for word in ("fma", "ftz", "approx"))


def test_a_compile_error_shows_all_that_is_needed(folder: Path) -> None:
    (folder / "common" / "value.cuh").write_text("// fine\n__device__ float value() { return undeclared; }\n")
    with pytest.raises(CompileError) as caught:
        jit.cubin_path(CONFIG)
    message = str(caught.value)
    assert "configuration: ForwardConfig(head_dim=64, mask='causal', dtype='bfloat16', arch='sm_80'" in message
    assert "flags: --std=c++17 -arch=sm_80 --fmad=false --ftz=false --prec-div=true --prec-sqrt=true" in message
    assert 'identifier "undeclared" is undefined' in message
    assert "   1 | // forward_sm80_d64_causal_bfloat16_sm_80, contract version" in message
    assert "   2 | __device__ float value() { return undeclared; }" in message
    assert f"--include-path={folder}" in message
    assert list((folder.parent / "cache").glob("*.cubin")) == []


def test_a_missing_kernel_file_is_a_compile_error(folder: Path) -> None:
    (folder / "forward_sm80.cuh").unlink()
    with pytest.raises(CompileError, match=r'cannot open source file "forward_sm80\.cuh"'):
        jit.cubin_path(CONFIG)


def test_resources_come_from_the_log() -> None:
    log = """ptxas info    : Function properties for forward_sm80
ptxas         .     40 bytes stack frame, 36 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 512 bytes smem, 376 bytes cmem[0]
"""
    assert compiler.parse_resources(log) == jit.Resources(255, 40, 36, 52, 512)
    assert compiler.parse_resources("ptxas info : Used 12 registers, 376 bytes cmem[0]").static_shared == 0
    with pytest.raises(ValueError, match="ptxas"):
        compiler.parse_resources("")


def test_resources_of_a_kernel(folder: Path) -> None:
    used = jit.resources(CONFIG)
    assert 0 < used.registers < 64
    assert used == jit.Resources(used.registers, 0, 0, 0, 64 * 4)
    assert not used.spills


def test_local_memory_is_noticed(folder: Path) -> None:
    indexed_by_value = """
    float local[64] = {};
    for (int i = 0; i < params.n; ++i) local[(i * params.n) & 63] += params.out[i];
    values[0] = local[params.n];
"""
    (folder / "forward_sm80.cuh").write_text(KERNEL.replace("__syncthreads();", indexed_by_value))
    assert jit.resources(CONFIG).stack_frame >= 256
    assert jit.resources(CONFIG).spills


# --- what is missing or too old


def test_missing_cupy_is_said_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match=r"need CuPy .*pip install 'cuattn\[cuda13\]'"):
        jit.cubin_path(CONFIG)


def test_missing_nvrtc_is_said_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import nvrtc

    def not_found() -> None:
        raise RuntimeError("libnvrtc.so was not found\nand a long story")

    monkeypatch.setattr(nvrtc, "getVersion", not_found)
    with pytest.raises(MissingDependencyError, match=r"NVRTC.*\(libnvrtc.so was not found\): pip install") as caught:
        jit.cubin_path(CONFIG)
    assert "\n" not in str(caught.value)


def test_an_nvrtc_that_does_not_know_the_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "known_architectures", lambda: frozenset({75}))
    with pytest.raises(
        MissingDependencyError, match=r"cannot compile for sm_80: pip install --upgrade nvidia-cuda-nvrtc"
    ):
        jit.cubin_path(CONFIG)


def test_an_nvrtc_newer_than_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import runtime

    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    for accepted in (0, 13000, 14010):
        monkeypatch.setattr(runtime, "driverGetVersion", lambda version=accepted: version)
        jit.check_driver()
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 12040)
    with pytest.raises(MissingDependencyError, match=r"NVRTC 13 .* \(CUDA 12\.4\) .*pip install 'cuattn\[cuda12\]'"):
        jit.check_driver()


# --- ahead of time


def test_precompile_for_two_architectures(folder: Path) -> None:
    seen = []
    arguments = ([64], ["causal"], ["float16", "float32"], ["sm_80", "sm_90a"])
    compiled = jit.precompile(*arguments, progress=lambda *call: seen.append(call))
    assert [kernel.config for kernel in compiled] == [
        config
        for arch in ("sm_80", "sm_90a")
        for config in (
            *configs.attention_configs(64, "causal", "float16", arch),
            *configs.backward_configs(64, "causal", "float16", arch),
            *configs.attention_configs(64, "causal", "float32", arch),
            *configs.backward_configs(64, "causal", "float32", arch),
            *configs.helper_configs(arch),
        )
    ]
    number = len(compiled)
    assert all(kernel.path.is_file() and kernel.seconds > 0 and not kernel.from_cache for kernel in compiled)
    assert len({kernel.path for kernel in compiled}) == number
    assert [call[:2] for call in seen] == [(done, number) for done in range(1, number + 1)]
    assert {call[2] for call in seen} == set(compiled)
    again = jit.precompile(*arguments, jobs=1)
    assert [kernel.path for kernel in again] == [kernel.path for kernel in compiled]
    assert all(kernel.from_cache for kernel in again)


def test_precompile_of_values_with_a_head_dim_of_their_own(folder: Path) -> None:
    """Each kernel once, though masks share those that merge, and head dims those around attention."""
    compiled = jit.precompile([64, 128], None, ["float32"], ["sm_80"], value_dims=[64])
    expected = [
        *configs.attention_configs(64, "full", "float32", "sm_80"),
        *configs.backward_configs(64, "full", "float32", "sm_80"),
        *configs.attention_configs(64, "causal", "float32", "sm_80"),
        *configs.backward_configs(64, "causal", "float32", "sm_80"),
        *configs.attention_configs(128, "full", "float32", "sm_80", 64),
        *configs.backward_configs(128, "full", "float32", "sm_80", 64),
        *configs.attention_configs(128, "causal", "float32", "sm_80", 64),
        *configs.backward_configs(128, "causal", "float32", "sm_80", 64),
        *configs.helper_configs("sm_80"),
    ]
    assert [kernel.config for kernel in compiled] == list(dict.fromkeys(expected))
    assert len(compiled) == len(expected) - 3 - 8, "one kernel merges for all four; gradients' kernels know no mask"
    kernels = {(kernel.config.kernel, getattr(kernel.config, "value_dim", None)) for kernel in compiled}
    assert ("combine", 128) not in kernels


def test_precompile_takes_the_devices_at_hand_or_all_that_nvrtc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "device_count", lambda: 0)
    monkeypatch.setattr(compiler, "known_architectures", lambda: frozenset({80, 90}))
    assert kernels._default_architectures() == ["sm_80", "sm_90a"]
    monkeypatch.setattr(kernels, "device_count", lambda: 2)
    monkeypatch.setattr(kernels, "device_architecture", lambda index: ["sm_120", "sm_89"][index])
    assert kernels._default_architectures() == ["sm_120", "sm_89"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dims": [64, 100]}, "head_dims: got 100, expected values among 8, 16, "),
        ({"head_dims": 64}, "head_dims: got 64, expected None or a list of values among 8, 16, "),
        ({"masks": ["window"]}, "masks: got 'window', expected values among full, causal"),
        ({"masks": "causal"}, "masks: got 'causal', expected None or a list of values among full, causal"),
        ({"dtypes": ["float64"]}, "dtypes: got 'float64', expected values among float16, bfloat16, float32"),
        ({"value_dims": [0]}, "value_dims: got 0, expected values among 8, 16, "),
        ({"archs": ["sm_91"]}, "archs: got 'sm_91', expected values among sm_80, "),
        ({"jobs": 0}, "jobs: got 0, expected None or a number of at least 1"),
    ],
)
def test_precompile_refuses_what_is_not_supported(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        jit.precompile(**{"archs": ["sm_80"], **arguments})
    assert not (folder.parent / "cache").exists()


def test_precompile_passes_a_compile_error_on(folder: Path) -> None:
    (folder / "forward_sm80.cuh").write_text("broken")
    with pytest.raises(CompileError):
        jit.precompile(archs=["sm_80"])


def test_processes_that_start_together_compile_once_each_kernel(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        compiled = pool.map(kernels._precompile_one, [CONFIG] * 4, chunksize=1)
    assert {kernel.path for kernel in compiled} == {jit.cubin_path(CONFIG)}
    assert [kernel.from_cache for kernel in compiled].count(False) == 1
