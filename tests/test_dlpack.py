"""Arrays that are reached through DLPack capsules only, and how long their memory lives."""

import ctypes
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from interop_arrays import BFLOAT16, Foreign, Old, layout, numbers

from cuattn.interop import CPU, host_bits, import_tensor
from cuattn.interop import capsule as dlpack_capsule
from cuattn.interop.dlpack import Exporter


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "bool"])
def test_jax(dtype: str) -> None:
    array = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = import_tensor(array, "q")
    assert layout(tensor) == (array.unsafe_buffer_pointer(), (2, 3, 4), (12, 4, 1), dtype, CPU)
    assert host_bits(tensor).tobytes() == np.asarray(array).tobytes()
    assert (tensor.framework.name, tensor.readonly) == ("dlpack", True)


def test_jax_results_that_are_still_being_computed() -> None:
    matrix = jnp.ones((1500, 1500))
    pending = matrix @ matrix @ matrix
    assert (host_bits(import_tensor(pending, "q")).view(np.float32) == 1500.0**2).all()


def test_jax_tracers() -> None:
    with pytest.raises(TypeError, match=r"^q: got "):
        jax.jit(lambda x: import_tensor(x, "q"))(jnp.ones(3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool"])
@pytest.mark.parametrize("exporter", [Foreign, Old])
def test_versioned_and_unversioned_exporters(exporter: type[Foreign], dtype: str) -> None:
    view = numbers(dtype)[:, ::-1, ::2]
    tensor = import_tensor(exporter(view), "q")
    assert layout(tensor) == layout(import_tensor(view, "q"))
    assert tensor.readonly == (exporter is Old), "the unversioned structure cannot promise that writing is allowed"


def test_capsule_fields_that_exporters_of_arrays_leave_out() -> None:
    """Null strides mean C order, and the data may start behind the pointer."""
    exported = numbers("float16").__dlpack__()
    content, (managed, _) = dlpack_capsule.read(exported), dlpack_capsule._open(exported)
    managed.strides, managed.byte_offset = None, 6
    assert dlpack_capsule.read(exported).strides == (12, 4, 1)
    assert dlpack_capsule.read(exported).pointer == content.pointer + 6


@pytest.mark.parametrize("exporter", [Foreign, Old])
def test_capsule_is_given_back_once_when_the_tensor_dies(exporter: type[Foreign]) -> None:
    array = numbers("float16")
    before = sys.getrefcount(array)
    tensor = import_tensor(exporter(array), "q")
    bits = host_bits(tensor)
    assert sys.getrefcount(array) > before
    del tensor
    gc.collect()
    assert sys.getrefcount(array) > before, "the view must keep the exporter's memory"
    del bits
    gc.collect()
    assert sys.getrefcount(array) == before


def test_deleter_runs_once() -> None:
    """The count of NumPy's references cannot show a second run on freed memory, so the deleter itself is counted."""
    calls: list[int] = []
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(calls.append)
    addresses: list[int] = []

    class Counted(Old):
        def __dlpack__(self, *, stream: object = None) -> object:  # type: ignore[override]
            exported = super().__dlpack__()
            addresses.append(dlpack_capsule._get_pointer(exported, b"dltensor"))
            managed = dlpack_capsule._Unversioned.from_address(addresses[0])
            managed.deleter = ctypes.cast(deleter, ctypes.c_void_p).value
            return exported

    tensor = import_tensor(Counted(numbers("float16")), "q")
    gc.collect()
    assert calls == []
    del tensor
    gc.collect()
    assert calls == addresses
    assert len(calls) == 1


def test_foreign_memory_that_no_kernel_reads() -> None:
    with pytest.raises(TypeError, match=r"^q: got Foreign .*DLPack device type 10, expected CPU or CUDA memory$"):
        import_tensor(Foreign(numbers("float16"), device=(10, 0)), "q")
    with pytest.raises(TypeError, match=r"^q: got Foreign that cannot be used through DLPack"):
        import_tensor(Foreign(np.array(["a"])), "q")


def test_exporter_is_asked_for_the_stream_only_on_a_gpu() -> None:
    host, device = Foreign(numbers("float16")), Foreign(numbers("float16"), device=(2, 0))
    import_tensor(host, "q")
    with pytest.raises(TypeError):  # NumPy refuses streams
        import_tensor(device, "q")
    assert host.requests == [{"max_version": (1, 0)}]
    assert [request["stream"] for request in device.requests] == [1] * len(device.requests)


# Results


def test_results_of_types_without_from_dlpack_are_numpy_arrays() -> None:
    like = import_tensor(Foreign(numbers("float16")), "q")
    for dtype, expected in (("bfloat16", BFLOAT16), ("float32", np.dtype("float32"))):
        exported = like.framework.export(like.framework.empty((2, 3), dtype, CPU, like), like)
        assert type(exported) is np.ndarray
        assert exported.dtype == expected


def test_jax_results_outlive_the_tensor() -> None:
    like = import_tensor(jnp.zeros(1, jnp.bfloat16), "q")
    result = like.framework.empty((1000,), "bfloat16", CPU, like)
    host_bits(result)[...] = 0x3F80
    stored = weakref.ref(result.owner)
    exported = like.framework.export(result, like)
    del result
    gc.collect()
    assert stored() is not None
    assert (exported == 1).all()
    del exported
    gc.collect()
    assert stored() is None, "the consumer's end must free the memory"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_exporter_speaks_both_versions(dtype: str) -> None:
    like = import_tensor(jnp.zeros(1), "q")
    result = like.framework.empty((2, 3), dtype, CPU, like)
    host_bits(result)[...] = 0x3C00
    exporter = Exporter(result)
    versions = {"dltensor": None, "dltensor_versioned": (1, 3)}
    for name, max_version in versions.items():
        exported = exporter.__dlpack__(max_version=max_version)
        assert f'"{name}"' in repr(exported)
        assert dlpack_capsule.read(exported).dtype == dtype
    assert torch.from_dlpack(exporter).view(torch.uint8).numpy().tobytes() == host_bits(result).tobytes()


@pytest.mark.parametrize("options", [{"copy": True}, {"dl_device": (2, 0)}])
def test_exporter_refuses_to_copy(options: dict[str, object]) -> None:
    like = import_tensor(jnp.zeros(1), "q")
    exporter = Exporter(like.framework.empty((2, 3), "float16", CPU, like))
    with pytest.raises(BufferError):
        exporter.__dlpack__(**options)
    exporter.__dlpack__(dl_device=(1, 0), copy=False)
