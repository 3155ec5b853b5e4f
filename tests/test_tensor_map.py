"""Descriptions of tensors for the copy engine: which have one, and what the driver and the emulator are told."""

import ctypes
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_emulated_launches import MovesConfig

from cuattn import emulator, launch, tensor_map
from cuattn.emulator import build
from cuattn.interop import Tensor, import_tensor
from cuattn.launches import Launch
from cuattn.params import TensorMapBytes, mapped
from cuattn.tensor_map import TensorMap, can_map

SOURCE = Path(__file__).parent / "kernels" / "mapped.cuh"
SUCCESS, INVALID_VALUE = 0, 1


class MappedParams(ctypes.Structure):
    """Mirror of MappedParams in mapped.cuh."""

    _fields_ = mapped(
        [("key_map", TensorMapBytes), ("value_map", TensorMapBytes), ("out", ctypes.c_void_p), ("last", ctypes.c_int)]
    )


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return import_tensor(torch.zeros(shape, dtype=dtype), "x")


def strided(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int = 1 << 20) -> Tensor:
    return replace(tensor(1, 1, 1, 1), pointer=pointer, shape=shape, strides=strides)


class Driver:
    """Takes the part of cuTensorMapEncodeTiled: notes its arguments, and writes the number of the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = SUCCESS) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.code = code
        monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: self)
        tensor_map.encode.cache_clear()

    def __call__(self, to: int, *arguments: Any) -> int:
        assert to % 64 == 0
        self.calls.append(tuple(list(x) if isinstance(x, ctypes.Array) else x for x in arguments))
        ctypes.memset(to, len(self.calls), 128)
        return self.code


def test_axes_from_the_innermost() -> None:
    x = import_tensor(torch.zeros(2, 300, 3, 72, dtype=torch.float16).transpose(1, 2), "x")
    described = TensorMap.of(x, 80)
    assert described == TensorMap(x.pointer, "float16", (72, 300, 3, 2), (3 * 144, 144, 300 * 3 * 144), 80)
    assert described.box == (64, 80, 1, 1)
    assert described.at(64) == replace(described, pointer=64)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3, 5, 64), (960, 320, 64, 1), True),
        ((2, 3, 5, 64), (960, 64, 192, 1), True),
        ((2, 3, 5, 64), (960, 320, 72, 1), True),
        ((2, 3, 5, 64), (0, 320, 64, 1), False),
        ((2, 3, 5, 64), (960, 0, 64, 1), False),
        ((2, 3, 5, 64), (960, 320, -64, 1), False),
        ((2, 3, 5, 64), (960, 320, 68, 1), False),
        ((2, 3, 5, 64), (960, 320, 64, 2), False),
        ((2, 3, 5, 64), (2**39 - 8, 320, 64, 1), True),
        ((2, 3, 5, 64), (2**39, 320, 64, 1), False),
        ((1, 1, 1, 64), (0, -3, 2**39, 1), True),
        ((1, 1, 1, 1), (0, 0, 0, 7), True),
        ((2, 3, 0, 64), (0, 0, 64, 1), False),
        ((0, 3, 5, 64), (960, 320, 64, 1), False),
        ((1, 3, 2**32, 64), (0, 8, 32, 1), True),
        ((1, 3, 2**32 + 1, 64), (0, 8, 32, 1), False),
        ((3, 5, 64), (320, 64, 1), False),
    ],
)
def test_which_tensors_can_be_described(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    x = strided(shape, strides)
    assert can_map(x) == expected
    if not expected:
        with pytest.raises(ValueError, match="tensor: got one that no tensor map can describe: Tensor"):
            TensorMap.of(x, 64)
        return
    described = TensorMap.of(x, 64)
    assert all(16 <= stride < 2**40 and stride % 16 == 0 for stride in described.strides)
    assert described.dims == shape[::-1]


def test_addresses_and_types_that_cannot_be_described() -> None:
    shape, strides = (2, 3, 5, 64), (960, 320, 64, 1)
    assert can_map(strided(shape, strides, 1 << 20 | 16))
    assert not can_map(strided(shape, strides, 1 << 20 | 8))
    assert can_map(tensor(*shape, dtype=torch.float16))
    assert not can_map(tensor(*shape, dtype=torch.float32))
    assert not can_map(tensor(*shape, dtype=torch.int16))


def test_an_axis_of_one_element_gets_a_row_for_a_stride() -> None:
    assert TensorMap.of(strided((1, 2, 1, 72), (0, 800, 8, 1)), 8).strides == (144, 1600, 144)
    assert TensorMap.of(strided((1, 1, 1, 4), (0, 0, 0, 1)), 8).strides == (16, 16, 16)


@pytest.mark.parametrize("extent", [0, -1, 257])
def test_boxes_that_the_hardware_does_not_have(extent: int) -> None:
    for name, box in (("rows", (extent, 1)), ("heads", (1, extent))):
        with pytest.raises(ValueError, match=f"{name}: got {extent}, expected 1 to 256"):
            TensorMap.of(tensor(2, 3, 5, 64), *box)


def test_boxes_of_several_heads() -> None:
    described = TensorMap.of(tensor(2, 8, 5, 64), 4, 4)
    assert described.box == (64, 4, 4, 1)
    assert struct.unpack("=16Q", tensor_map.encode_emulated(described))[11:15] == described.box
    assert described.at(1 << 20) == replace(described, pointer=1 << 20)


def test_the_emulators_form() -> None:
    described = TensorMap.of(strided((2, 3, 5, 72), (1080, 72, 216, 1)), 80)
    words = struct.unpack("=16Q", tensor_map.encode_emulated(described))
    assert words == (0x63756174746E6D70, 1 << 20, 2, 4, 72, 5, 3, 2, 432, 144, 2160, 64, 80, 1, 1, 128)


def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants are those of cuda.h."""
    driver = Driver(monkeypatch)
    described = TensorMap.of(strided((2, 3, 5, 72), (1080, 72, 216, 1)), 80)
    assert tensor_map.encode(described) == bytes([1]) * 128
    float16, bfloat16 = 6, 9
    rest = ([72, 5, 3, 2], [432, 144, 2160], [64, 80, 1, 1], [1, 1, 1, 1], 0, 3, 2, 0)
    assert driver.calls == [(bfloat16, 4, 1 << 20, *rest)]
    tensor_map.encode(replace(described, dtype="float16"))
    assert driver.calls[1] == (float16, 4, 1 << 20, *rest)


def test_maps_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    one = TensorMap.of(tensor(2, 3, 5, 64), 64)
    first = tensor_map.encode(one)
    assert tensor_map.encode(one.at(one.pointer)) == first
    assert tensor_map.encode(one.at(one.pointer + 16)) != first
    assert len(driver.calls) == 2
    assert tensor_map.encode.cache_parameters()["maxsize"] is not None


def test_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, INVALID_VALUE)
    described = TensorMap.of(strided((2, 3, 5, 72), (1080, 72, 216, 1)), 80)
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(RuntimeError) as caught:
            tensor_map.encode(described)
    assert len(driver.calls) == 2
    assert str(caught.value) == (
        "cuTensorMapEncodeTiled failed with CUDA error 1: TensorMap(pointer=1048576, dtype='bfloat16', "
        "dims=(72, 5, 3, 2), strides=(432, 144, 2160), rows=80, heads=1), box (64, 80, 1, 1), swizzle of 128 bytes"
    )


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensor_map.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"CUDA driver of version 12 or newer: libcuda\.so\.1: cannot open"):
        tensor_map._encode_tiled.__wrapped__()


def test_padding_is_that_of_cpp() -> None:
    assert ctypes.sizeof(MappedParams) == 320
    assert MappedParams.out.offset == 256
    exact = mapped([("key_map", TensorMapBytes), ("words", ctypes.c_char * 64)])
    assert [name for name, _ in exact] == ["key_map", "words"]


def planned() -> tuple[Launch, Any, Tensor]:
    """A launch that copies its maps and its other arguments to where the test can read them, and that memory."""
    out, x = np.zeros(33, np.uint64), tensor(2, 3, 5, 64)
    maps = {"value_map": TensorMap.of(x, 16), "key_map": TensorMap.of(x, 32)}
    params = MappedParams(out=out.ctypes.data, last=77)
    written = {"out": import_tensor(out, "out")}
    return Launch(MovesConfig(), 1, params, {"x": x}, written, tensor_maps=maps), out, x


def test_emulated_kernels_find_their_maps() -> None:
    one, out, x = planned()
    emulator.run([one], load=lambda _: build.load_kernel("mapped", SOURCE.read_text(), "mapped", "MappedParams"))
    for words, rows in ((out[:16], 32), (out[16:32], 16)):
        assert words.tobytes() == tensor_map.encode_emulated(TensorMap.of(x, rows))
    assert out[32] == 77
    assert not any(one.params.key_map.words), "the plan itself stays as it was"


def test_emulated_arguments_lie_as_maps_must() -> None:
    class Library:
        def __init__(self) -> None:
            self.addresses: list[int] = []

        def emulate(self, described: Any) -> int:
            self.addresses.append(described._obj.params)
            return 0

    library, kept = Library(), []
    for size in range(1, 9):
        kept.append(ctypes.create_string_buffer(size * 24))  # moves what is allocated next
        one = replace(planned()[0], outputs={})
        emulator.run([one], load=lambda _: library)  # type: ignore[arg-type, return-value]
    assert [address % 64 for address in library.addresses] == [0] * 8


def test_launched_kernels_find_their_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, launched = Driver(monkeypatch), []

    class Device:
        def __init__(self, index: int) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    class Kernel:
        def launch(self, *arguments: Any) -> None:
            launched.append(arguments)

    class Cupy:
        class cuda:  # noqa: N801
            pass

    Cupy.cuda.Device = Device  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "import_cupy", lambda: Cupy)
    monkeypatch.setattr(launch, "loaded", lambda config, index: Kernel())
    one, _, _ = planned()
    launch.launch_kernel(one, 0, 7)
    ((grid, words, stream, cluster),) = launched
    assert (grid, stream, cluster, len(driver.calls)) == (1, 7, 1, 2)
    value, key = bytes([1]) * 128, bytes([2]) * 128
    assert words[1:].tobytes() == key + value + bytes(one.params)[256:]


@pytest.mark.gpu
def test_the_driver_of_this_machine_takes_maps() -> None:
    import cupy

    if int(cupy.cuda.Device(0).compute_capability) < 90:
        pytest.skip("tensor maps need compute capability 9.0")
    cupy.zeros(1)  # a context
    for layout in ((2, 3, 300, 64), (2, 300, 3, 72)):
        x = torch.zeros(layout, dtype=torch.bfloat16, device="cuda")
        for view in (x, x.transpose(1, 2), x[:1, :, :1]):
            encoded = tensor_map.encode(TensorMap.of(import_tensor(view, "x"), 80))
            assert len(encoded) == 128
            assert any(encoded)
