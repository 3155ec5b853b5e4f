"""Launching on a device, and what is known without one."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuattn import devices, env, launch
from cuattn.config import DecodeConfig, ForwardConfig
from cuattn.launches import Launch

KERNEL = """struct Params { int* out; int value; char padding[84]; int last; };
extern "C" __global__ void forward_sm80(const Params params) {
    extern __shared__ int shared[];
    shared[cuattn::config::shared_bytes / 4 - 1 - threadIdx.x] = params.value + params.last;
    __syncthreads();
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    params.out[index] += shared[cuattn::config::shared_bytes / 4 - 1 - threadIdx.x] + index;
}
"""


class Params(ctypes.Structure):
    """An argument of a size that is no power of two, with something at its end."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("value", ctypes.c_int),
        ("padding", ctypes.c_char * 84),
        ("last", ctypes.c_int),
    )


def test_without_cupy_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert devices.device_count.__wrapped__() == 0


def test_no_blocks_need_no_device() -> None:
    launch.launch_kernel(Launch(ForwardConfig(64, "full", "float16", "sm_80"), 0, Params(), {}), 0, 0)


def test_the_driver_finds_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the list of pointers that it is given, at the time of the launch."""
    config, found = ForwardConfig(64, "full", "float16", "sm_80"), []

    def launch_kernel(*arguments: int) -> None:
        *shape, pointers, extra = arguments
        argument = ctypes.c_void_p.from_address(pointers).value
        found.append((*shape, extra, ctypes.string_at(argument, ctypes.sizeof(Params))))

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(launchKernel=launch_kernel))
    kernel = launch.Kernel(config, SimpleNamespace(kernel=SimpleNamespace(ptr=5)))
    params = Params(1 << 40, -1, b"text", 7)
    words = launch.words_of(bytes(params))
    for _ in range(2):  # words may be launched again
        kernel.launch(3, words, 9)
    assert found == 2 * [(5, 3, 1, 1, config.threads, 1, 1, config.shared_bytes, 9, 0, bytes(params))]


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("early", [True, False])
def test_a_kernel_that_overlaps_starts_early(monkeypatch: pytest.MonkeyPatch, cluster: int, early: bool) -> None:
    """The driver finds the shape of the launch, and that it may start before earlier ones end, if it knows how."""
    config, found = DecodeConfig(64, 64, "full", "float16", "sm_90a", 1), []

    def launch_ex(shape: int, function: int, pointers: int, extra: int) -> int:
        words = [ctypes.c_uint64.from_address(shape + 8 * i).value for i in range(7)]
        attributes = [(ctypes.c_uint64 * 9).from_address(words[5] + 72 * i)[:3] for i in range(words[6])]
        argument = ctypes.c_void_p.from_address(pointers).value
        text = ctypes.string_at(argument, ctypes.sizeof(Params))
        found.append((function, extra, words[:5], attributes, text))
        return len(found) - 1

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(launchKernel=None))
    monkeypatch.setattr(launch, "_launch_ex", lambda: launch_ex)
    monkeypatch.setattr(launch, "_starts_early", lambda: early)
    kernel = launch.Kernel(config, SimpleNamespace(kernel=SimpleNamespace(ptr=5)))
    params = Params(1 << 40, -1, b"text", 7)
    kernel.launch(8, launch.words_of(bytes(params)), 9, cluster)
    shape = [8 | 1 << 32, 1 | config.threads << 32, 1 | 1 << 32, config.shared_bytes, 9]
    attributes = [[6, 1, 0]] * early + [[4, 4 | 1 << 32, 1]] * (cluster > 1)
    assert found == [(5, 0, shape, attributes, bytes(params))]
    with pytest.raises(RuntimeError, match="CUDA error 1: 8 blocks"):
        kernel.launch(8, launch.words_of(bytes(params)), 9, cluster)


def test_an_argument_is_filled_up_to_whole_words() -> None:
    assert launch.words_of(b"\1" + bytes(8)).tolist() == [0, 1, 0]
    assert launch.words_of(bytearray(b"\1" + bytes(7))).tolist() == [0, 1]


@pytest.mark.gpu
def test_launches_run_on_the_stream_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The legacy default stream, a stream of its own, and a captured graph; more than 48 KB of shared memory."""
    import cupy

    (tmp_path / "forward_sm80.cuh").write_text(KERNEL)
    monkeypatch.setenv(env.KERNEL_DIR, str(tmp_path))
    monkeypatch.setattr(launch, "_load", launch.functools.cache(launch._load.__wrapped__))
    config = ForwardConfig(128, "full", "float16", launch.device_architecture(0))
    grid, size = 3, 3 * config.threads
    with cupy.cuda.Device(0):
        out = cupy.zeros(size, cupy.int32)
        cupy.cuda.Device(0).synchronize()
        params = Params(out.data.ptr, 1000, b"", 7)

        def run(stream: int) -> None:
            launch.launch_kernel(Launch(config, grid, params, {}), 0, stream)

        run(0)
        cupy.cuda.Device(0).synchronize()
        once = cupy.arange(size, dtype=cupy.int32) + 1007
        assert (out == once).all()

        stream = cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        run(stream.ptr)
        run(stream.ptr)
        graph = stream.end_capture()
        cupy.cuda.Device(0).synchronize()
        assert (out == once).all(), "capturing does not run"
        graph.launch(stream)
        run(stream.ptr)
        stream.synchronize()
        assert (out == 4 * once).all()
        assert cupy.cuda.get_current_stream().ptr != stream.ptr
