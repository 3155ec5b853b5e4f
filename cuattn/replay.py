"""Calls whose like was made before: what was checked, planned and loaded for one is launched again for the next.

A call is remembered by the form of its arrays (shape, strides, dtype, device, alignment) and its other arguments, if
they are torch tensors on a GPU: such calls are repeated by the thousand. What a remembered call cannot know is looked
at each time, and leads the ordinary way: that two arrays are one, that an array is no plain tensor, that lengths are to
be checked. Neither way changes a bit.
"""

import contextlib
import contextvars
import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuattn import backend, env
from cuattn.devices import import_cupy
from cuattn.interop import Tensor
from cuattn.launch import Kernel, loaded
from cuattn.launches import Launch
from cuattn.tensor_map import BYTES, TensorMap, encode

#: torch's types of devices, and the backends, whose calls are remembered.
DEVICES = ("cuda",)
BACKENDS = ("auto", "cuda")
#: More remembered calls than this, and all are forgotten.
LARGEST_MEMORY = 4096

_launches: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("cuattn_launches", default=None)
_remembered: dict[Any, "_Call"] = {}


class _Bound(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def note(launches: Sequence[Launch]) -> None:
    """Called with the launches of every call; they are remembered if a call is being recorded."""
    noted = _launches.get()
    if noted is not None:
        noted += launches


def call(
    options: tuple[Any, ...],
    arrays: tuple[Any, ...],
    results: tuple[str, ...],
    make: Callable[[], Any],
    updates: tuple[int, ...] = (),
) -> Any:
    """What ``make()`` gives, which is a function of the arguments.

    options: what else ``make`` depends on. arrays: the arrays it was given, or None. results: names of the outputs that
    it returns, alone or as a tuple. updates: indices of arrays that it writes to.
    """
    key = _key(options, arrays)
    if key is None:
        return make()
    known = _remembered.get(key)
    if known is not None:
        return known.run(arrays) if not known.overlap(arrays) else make()
    with _recording() as launches:
        made = make()
    known = _Call.of(arrays, results, updates, launches)
    if known is not None:
        if len(_remembered) >= LARGEST_MEMORY:
            _remembered.clear()
        _remembered[key] = known
    return made


def forget() -> None:
    """Forgets all calls."""
    _remembered.clear()


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


def _key(options: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    """What a call is remembered by; None for one that is not."""
    torch = sys.modules.get("torch")
    if torch is None or type(arrays[0]) is not torch.Tensor or arrays[0].device.type not in DEVICES:
        return None
    device, graded = arrays[0].device, torch.is_grad_enabled()
    if env.check() or backend.active().name not in BACKENDS or _current_device() != device.index:
        return None
    forms: list[Any] = []
    pointers = set()
    for x in arrays:
        if x is None:
            forms.append(None)
            continue
        if type(x) is not torch.Tensor or x.device != device or x.layout is not torch.strided or x.is_nested:
            return None
        if x.is_neg() or x.is_conj() or x.numel() == 0:
            return None
        pointer = x.data_ptr()
        if pointer in pointers:
            return None
        pointers.add(pointer)
        forms.append((x.shape, x.stride(), x.dtype, pointer & 15, graded and x.requires_grad))
    key = (options, tuple(map(type, options)), env.arch(), device.index, tuple(forms))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _current_device() -> int:
    import torch

    return int(torch.cuda.current_device())


def _stream(device_index: int) -> int:
    import torch

    return int(torch._C._cuda_getCurrentRawStream(device_index))  # what torch.cuda.current_stream() wraps


def _bind(device_index: int) -> None:
    """Makes the device's context current in this thread, which the driver does not do by itself."""
    if device_index not in _bound.devices:
        import_cupy().cuda.Device(device_index).use()
        _bound.devices.add(device_index)


class _Prepared(NamedTuple):
    """A launch: the argument, and which pointers and tensor maps go where in it, as (place, number of the array)."""

    kernel: Kernel
    grid: int
    argument: bytes
    pointers: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int, TensorMap], ...]


class _Made(NamedTuple):
    """An array that a call makes: an output or a workspace."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class _Call:
    """The launches of a call. Arrays are counted through: the caller's, then those that the call makes."""

    launches: tuple[_Prepared, ...]
    made: tuple[_Made, ...]
    returned: tuple[int, ...]
    updates: tuple[int, ...]
    spans: tuple[int, ...]  # bytes of each of the caller's arrays, gaps included; 0 for None

    @classmethod
    def of(
        cls, arrays: tuple[Any, ...], results: tuple[str, ...], updates: tuple[int, ...], launches: list[Launch]
    ) -> "_Call | None":
        """None if a pointer in an argument is that of no known array."""
        given = {x.data_ptr(): i for i, x in enumerate(arrays) if x is not None}
        outputs: dict[str, Tensor] = {}
        scratch: dict[int, Tensor] = {}
        tensors: dict[int, Tensor] = {}
        for launch in launches:
            outputs |= launch.outputs
            scratch |= {tensor.pointer: tensor for tensor in launch.scratch.values()}
            for named in (launch.inputs, launch.updates):
                tensors |= {tensor.pointer: tensor for tensor in named.values()}
        made = [*outputs.values(), *scratch.values()]
        places = {**given, **{tensor.pointer: len(arrays) + i for i, tensor in enumerate(made)}}
        if any(name not in outputs for name in results) or len(places) != len(given) + len(made):
            return None
        prepared, device = [], arrays[0].device.index
        for launch in launches:
            fields = list(_pointer_fields(launch.params))
            described = launch.tensor_maps.values()
            if any(pointer not in places for pointer in [*(p for _, p in fields), *(m.pointer for m in described)]):
                return None
            pointers = tuple((offset, places[pointer]) for offset, pointer in fields)
            argument = bytearray(launch.params)
            for offset, _ in fields:
                struct.pack_into("=Q", argument, offset, 0)
            maps = tuple(
                (getattr(type(launch.params), name).offset, places[one.pointer], one.at(0))
                for name, one in launch.tensor_maps.items()
            )
            prepared.append(_Prepared(loaded(launch.config, device), launch.grid, bytes(argument), pointers, maps))
        names = list(outputs)
        return cls(
            tuple(prepared),
            tuple(_Made(tuple(tensor.owner.shape), tensor.owner.dtype) for tensor in made),
            tuple(len(arrays) + names.index(name) for name in results),
            updates,
            tuple(
                0 if x is None else tensors[x.data_ptr()].nbytes_span if x.data_ptr() in tensors else 0 for x in arrays
            ),
        )

    def overlap(self, arrays: tuple[Any, ...]) -> bool:
        """Whether an array that is written to may share memory with another one."""
        for u in self.updates:
            if arrays[u] is None:
                continue
            first = arrays[u].data_ptr()
            end = first + self.spans[u]
            for i, x in enumerate(arrays):
                if i != u and x is not None and x.data_ptr() < end and first < x.data_ptr() + self.spans[i]:
                    return True
        return False

    def run(self, arrays: tuple[Any, ...]) -> Any:
        import torch

        device = arrays[0].device
        _bind(device.index)
        everything = [*arrays, *(torch.empty(x.shape, dtype=x.dtype, device=device) for x in self.made)]
        stream = _stream(device.index)
        for launch in self.launches:
            argument = bytearray(launch.argument)
            for place, number in launch.pointers:
                struct.pack_into("=Q", argument, place, everything[number].data_ptr())
            for place, number, one in launch.maps:
                argument[place : place + BYTES] = encode(one.at(everything[number].data_ptr()))
            launch.kernel.launch(launch.grid, argument, stream)
        for u in self.updates:
            if arrays[u] is not None and not arrays[u].is_inference():
                torch.autograd.graph.increment_version(arrays[u])
        returned = tuple(everything[i] for i in self.returned)
        return returned if len(returned) > 1 else returned[0]


def _pointer_fields(params: ctypes.Structure, start: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, value) of every pointer in a struct of arguments that is not null."""
    for name, kind in params._fields_:  # type: ignore[misc]
        offset = start + getattr(type(params), name).offset
        value = getattr(params, name)
        if isinstance(value, ctypes.Structure):
            yield from _pointer_fields(value, offset)
        elif kind is ctypes.c_void_p and value:
            yield offset, value
