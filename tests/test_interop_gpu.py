"""Conversions on a CUDA device: fast paths, allocation, streams."""

import cupy
import jax
import numpy as np
import pytest
import torch
from interop_arrays import Foreign, layout, numbers

from cuattn.interop import Device, Tensor, import_tensor
from cuattn.interop.dlpack import DlpackFramework, Exporter

CUDA = Device("cuda", 0)


def on_device(library: str, dtype: str):
    """numbers(dtype) on the first GPU."""
    if library == "torch":
        return torch.arange(24, device="cuda").reshape(2, 3, 4).to(getattr(torch, dtype))
    host = numbers(dtype)
    if library == "cupy":
        return cupy.asarray(host.view(f"u{host.itemsize}")).view(host.dtype)
    return jax.device_put(host, jax_gpu())


def jax_gpu():
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"needs JAX with CUDA: {error}")


def torch_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: this one is {torch.__version__}")


def need(library: str) -> None:
    {"torch": torch_gpu, "jax": jax_gpu, "cupy": lambda: None}[library]()


def copied(tensor: Tensor) -> bytes:
    """The elements of a contiguous tensor on the GPU, after all work on the device."""
    cupy.cuda.Device(tensor.device.index).synchronize()
    host = np.empty(tensor.nbytes_span, np.uint8)
    cupy.cuda.runtime.memcpy(host.ctypes.data, tensor.pointer, host.nbytes, cupy.cuda.runtime.memcpyDeviceToHost)
    return host.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("library", ["torch", "cupy", "jax"])
def test_gpu_arrays_in_and_results_out(library: str, dtype: str) -> None:
    need(library)
    array = on_device(library, dtype)
    tensor = import_tensor(array, "q")
    assert (tensor.shape, tensor.strides, tensor.dtype, tensor.device) == ((2, 3, 4), (12, 4, 1), dtype, CUDA)
    assert copied(tensor) == numbers(dtype).tobytes()
    result = tensor.framework.empty((2, 3, 4), dtype, CUDA, tensor)
    assert result.pointer % 16 == 0
    cupy.cuda.runtime.memcpy(result.pointer, tensor.pointer, tensor.nbytes_span, cupy.cuda.runtime.memcpyDeviceToDevice)
    exported = tensor.framework.export(result, tensor)
    assert isinstance(exported, type(array))
    assert layout(import_tensor(exported, "out")) == layout(result)
    assert copied(import_tensor(exported, "out")) == numbers(dtype).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy", "jax"])
def test_gpu_elements_on_the_host(library: str) -> None:
    need(library)
    tensor = import_tensor(on_device(library, "int32"), "cache_lengths")
    host = tensor.framework.to_host(tensor)
    assert host.dtype == np.int32
    np.testing.assert_array_equal(host, numbers("int32"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_gpu_fast_path_equals_its_capsule(library: str, dtype: str) -> None:
    need(library)
    array = on_device(library, dtype)
    for view in (array, array[:, 1:, ::2], array[:0]):
        assert layout(import_tensor(view, "q")) == layout(DlpackFramework().wrap(view, "q"))


@pytest.mark.gpu
def test_gpu_torch_stream_is_the_callers() -> None:
    torch_gpu()
    framework = import_tensor(torch.ones(1, device="cuda"), "q").framework
    side = torch.cuda.Stream()
    assert framework.stream(CUDA) == torch.cuda.default_stream().cuda_stream
    with torch.cuda.stream(side):
        assert framework.stream(CUDA) == side.cuda_stream != 0


@pytest.mark.gpu
def test_gpu_cupy_stream_is_the_callers() -> None:
    framework = import_tensor(cupy.ones(1), "q").framework
    side = cupy.cuda.Stream(non_blocking=True)
    assert framework.stream(CUDA) == cupy.cuda.get_current_stream().ptr
    with side:
        assert framework.stream(CUDA) == side.ptr != 0


@pytest.mark.gpu
def test_gpu_exporter_makes_the_consumers_stream_wait() -> None:
    """A non-blocking stream reads a result behind a long kernel on our stream; without the event it reads too early."""
    slow = cupy.RawKernel(
        """extern "C" __global__ void slow(int* out) {
            for (long long start = clock64(); clock64() - start < 300000000;) {}
            *out = 7;
        }""",
        "slow",
    )
    slow.compile()
    framework, like = DlpackFramework(), import_tensor(Foreign(numbers("float16")), "q")

    def seen(consumer_stream: int, reader: cupy.cuda.Stream) -> int:
        result = framework.empty((1,), "int32", CUDA, like)
        result.owner.fill(0)
        cupy.cuda.Device(0).synchronize()
        with cupy.cuda.Stream.null:  # the legacy stream, as is LEGACY_STREAM
            slow((1,), (1,), (result.owner,))
        exported = Exporter(result).__dlpack__(stream=consumer_stream, max_version=(1, 0))
        with reader:
            value = int(result.owner.get(stream=reader)[0])
        cupy.cuda.Device(0).synchronize()
        del exported
        return value

    reader = cupy.cuda.Stream(non_blocking=True)
    assert seen(-1, reader) == 0, "the control: -1 asks for no ordering, so the reader must come too early"
    assert seen(reader.ptr, reader) == 7
