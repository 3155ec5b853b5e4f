"""Arrays of torch, CuPy and NumPy, and what every result has in common."""

import gc
import subprocess
import sys
import weakref

import cupy
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interop_arrays import BFLOAT16, DTYPES, Foreign, layout, numbers
from torch._subclasses.fake_tensor import FakeTensorMode

from cuattn.errors import MissingDependencyError
from cuattn.interop import CPU, Device, contiguous_strides, host_bits, import_tensor
from cuattn.interop.cupy_ import CupyFramework
from cuattn.interop.dlpack import DlpackFramework
from cuattn.interop.numpy_ import ALIGNMENT


def test_import_loads_no_array_library_but_numpy() -> None:
    program = (
        "import sys, numpy as np, cuattn.interop as i;"
        "i.import_tensor(np.zeros(3, np.float16), 'q');"
        "print({'torch', 'cupy', 'jax', 'ml_dtypes'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


# Reading


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy(dtype: str) -> None:
    array = numbers(dtype)
    view = array[::-1, :, 1::2]
    tensor = import_tensor(view, "q")
    assert layout(tensor) == (view.ctypes.data, (2, 3, 2), (-12, 4, 2), dtype, CPU)
    assert (tensor.framework.name, tensor.framework.stream(CPU), tensor.readonly) == ("numpy", 0, False)
    assert str(tensor.device) == "cpu"
    assert tensor.itemsize == array.itemsize


def test_numpy_read_only_arrays_are_inputs() -> None:
    array = numbers("float16")
    array.setflags(write=False)
    tensor = import_tensor(array, "q")
    assert tensor.readonly
    assert not host_bits(tensor).flags.writeable


def test_numpy_dtype_of_foreign_byte_order_keeps_its_mark() -> None:
    assert import_tensor(np.zeros(3, ">f2"), "q").dtype == ">f2"


def test_numpy_strides_that_are_no_whole_elements() -> None:
    records = np.zeros(4, [("x", "f2"), ("y", "i1")])
    with pytest.raises(ValueError, match=r"^k: got strides of \(3,\) bytes, expected multiples of the item size 2$"):
        import_tensor(records["x"], "k")


def test_numpy_masked_array() -> None:
    with pytest.raises(TypeError, match=r"^q: got a masked array"):
        import_tensor(np.ma.masked_array([1.0, 2.0], [True, False]), "q")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), (), (1, 1)])
def test_torch_fast_path_equals_its_capsule(dtype: str, shape: tuple[int, ...]) -> None:
    array = torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, dtype))
    for view in (array, array.transpose(0, -1), array[1:]) if shape else (array,):
        tensor, reference = import_tensor(view, "q"), DlpackFramework().wrap(view, "q")
        assert layout(tensor) == layout(reference)
        assert tensor.framework.name == "torch"
        assert tensor.framework.stream(CPU) == 0


def test_torch_tensors_that_require_grad() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    tensor = import_tensor(parameter, "q")
    assert tensor.pointer == parameter.data_ptr()
    assert not tensor.framework.empty((2, 3), "float32", CPU, tensor).owner.requires_grad
    assert import_tensor(parameter * 2, "q").requires_grad
    assert tensor.requires_grad
    with torch.no_grad():
        assert not import_tensor(parameter, "q").requires_grad
    assert not import_tensor(parameter.detach(), "q").requires_grad


def test_torch_negative_bit_is_resolved() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert values.is_neg()
    tensor = import_tensor(values, "q")
    assert host_bits(tensor).view(np.float32).tolist() == [-2.0, 4.0]
    assert tensor.readonly, "writing to the copy would not reach the caller"


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: torch.eye(3).to_sparse(), "a tensor of layout torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
        (lambda: torch.eye(3).to_mkldnn(), "a tensor of layout torch._mkldnn"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.ones(3, device="meta"), "a tensor on device meta"),
        (fake, "a fake tensor"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "a conjugated view"),
    ],
)
def test_torch_tensors_that_are_no_strided_memory(make, got: str) -> None:
    with pytest.raises(TypeError) as raised:
        import_tensor(make(), "v")
    assert str(raised.value) == f"v: got {got}, expected a strided torch tensor in CPU or CUDA memory"


def test_torch_wrappers_of_transforms() -> None:
    with pytest.raises(TypeError, match=r"^q: got a tensor without storage"):
        torch.vmap(lambda x: import_tensor(x, "q"))(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cupy_fields(dtype: str) -> None:
    """A real cupy.ndarray whose memory happens to be the host's: reading its fields touches no device."""
    memory = np.zeros(64, np.uint16)
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.ctypes.data, 128, memory, device_id=3), 0)
    array = cupy.ndarray((4, 8), BFLOAT16 if dtype == "bfloat16" else dtype, pointer)
    tensor = import_tensor(array[::-2].T, "q")
    assert layout(tensor) == (memory.ctypes.data + 48, (8, 2), (1, -16), dtype, Device("cuda", 3))
    assert (tensor.framework.name, str(tensor.device)) == ("cupy", "cuda:3")
    with pytest.raises(ValueError, match=r"^tensor: got one on cuda:3, expected one on the CPU$"):
        host_bits(tensor)


@pytest.mark.parametrize("value", [[1.0], None, 1.0, 3, "q", np.float16(3), object()])
def test_objects_that_are_no_arrays(value: object) -> None:
    with pytest.raises(TypeError) as raised:
        import_tensor(value, "q")
    assert str(raised.value) == (
        f"q: got {type(value).__name__}, expected a torch, CuPy or NumPy array or another object with __dlpack__"
    )


# Spans and bits


@st.composite
def strided_views(draw: st.DrawFn) -> np.ndarray:
    """Views of one small array: any steps of either sign, permuted, some axes repeated by stride 0."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    array = np.arange(int(np.prod(shape)), dtype=draw(st.sampled_from(["u1", "u2", "u4", "u8"]))).reshape(shape)
    array = array[tuple(slice(None, None, draw(st.sampled_from([1, 2, 3, -1, -2]))) for _ in shape)]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    return np.broadcast_to(array, (draw(st.integers(0, 3)), *array.shape)) if draw(st.booleans()) else array


@given(strided_views())
def test_host_bits_and_span_of_any_strides(view: np.ndarray) -> None:
    tensor = import_tensor(view, "q")
    bits = host_bits(tensor)
    assert np.array_equal(bits, view)
    assert bits.dtype == view.dtype
    assert bits.shape == view.shape
    addresses = [view.ctypes.data + int(np.dot(index, view.strides)) for index in np.ndindex(view.shape)]
    if addresses:
        assert tensor.address_range == (min(addresses), max(addresses) + view.itemsize)
    assert tensor.nbytes_span == (max(addresses) - min(addresses) + view.itemsize if addresses else 0)


@pytest.mark.parametrize("module", [torch, np])
def test_host_bits_are_writable_memory(module) -> None:
    array = module.zeros((2, 3), dtype=module.float16)
    host_bits(import_tensor(array, "q"))[1] = 0x3C00
    assert array.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_host_bits_keep_the_memory_alive() -> None:
    array = torch.full((1 << 16,), 1.0, dtype=torch.float16)
    alive, bits = weakref.ref(array), host_bits(import_tensor(array, "q"))
    del array
    gc.collect()
    assert alive() is not None
    assert (bits == 0x3C00).all()


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, jnp.asarray, Foreign])
def test_elements_on_the_host(make) -> None:
    array = np.array([[0, 7, -1], [2**31 - 1, -(2**31), 5]], np.int32)
    tensor = import_tensor(make(array), "cache_lengths")
    host = tensor.framework.to_host(tensor)
    assert host.dtype == np.int32
    np.testing.assert_array_equal(host, array)


# Results


CALLERS = {
    "numpy": lambda: np.zeros(3, np.float16),
    "torch": lambda: torch.zeros(3),
    "dlpack": lambda: jnp.zeros(3),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 0, 4), (7,)])
@pytest.mark.parametrize("caller", CALLERS)
def test_results_have_the_callers_type(caller: str, shape: tuple[int, ...], dtype: str) -> None:
    array = CALLERS[caller]()
    like = import_tensor(array, "q")
    framework = like.framework
    assert framework.name == caller
    result = framework.empty(shape, dtype, like.device, like)
    assert (result.shape, result.strides, result.dtype, result.device) == (shape, contiguous_strides(shape), dtype, CPU)
    assert result.pointer % 16 == 0
    assert not result.readonly
    bits = host_bits(result)
    bits[...] = np.arange(bits.size).reshape(shape) + 0x3C00
    exported = framework.export(result, like)
    assert isinstance(exported, type(array))
    assert import_tensor(exported, "out").pointer == result.pointer, "the result must not be copied"
    assert host_bits(import_tensor(exported, "out")).tobytes() == bits.tobytes()


def test_numpy_results_are_aligned_whatever_numpy_gives() -> None:
    like = import_tensor(np.zeros(1), "q")
    for length in range(1, 200, 7):
        assert like.framework.empty((length,), "bfloat16", CPU, like).pointer % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("package", "command"), [("cupy", "pip install 'cuattn[cuda13]'"), ("ml_dtypes", "pip install ml_dtypes")]
)
def test_missing_packages_are_named(package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuattn.interop import numpy_

    numpy_.numpy_dtype.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as raised:
        numpy_.numpy_dtype("bfloat16") if package == "ml_dtypes" else CupyFramework().stream(Device("cuda", 0))
    assert command in str(raised.value)
