"""Calls whose like was made before: what was checked, planned and loaded for one is launched again for the next.

A call is remembered by the form of its arrays (shape, strides, dtype, device, alignment), its other arguments and what
torch and the environment say of it, if its arrays are torch tensors on a GPU: such calls are repeated by the thousand.
What a form cannot tell is looked at each time, and leads the ordinary way: that an array is no plain tensor, that one
which is written to overlaps another. Neither way changes a bit.

A repeated call is work of the host alone, a few microseconds, so every step of it counts: attributes of a tensor take
0.1 us each, an allocation 1 to 3.
"""

import array
import contextlib
import contextvars
import ctypes
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuattn import backend, env
from cuattn.devices import import_cupy
from cuattn.interop import Tensor
from cuattn.launch import Kernel, Words, loaded, words_of
from cuattn.launches import Launch
from cuattn.tensor_map import BYTES, TensorMap, encode

#: Whether a torch tensor lies where calls are remembered, and the backends whose calls are.
_is_on_device: Callable[[Any], Any] = operator.attrgetter("is_cuda")
BACKENDS = ("auto", "cuda")
#: More remembered calls than this, and all are forgotten.
LARGEST_MEMORY = 4096
#: Addresses of an array for which its tensor map is at hand, for each call.
MAPS_AT_HAND = 64

_WORD = 8
#: Arrays that share a workspace start at multiples of so many bytes.
_ALIGNMENT = 256

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
    torch = sys.modules.get("torch")
    if torch is None or type(arrays[0]) is not torch.Tensor or not _is_on_device(arrays[0]):
        return make()
    pointers: list[int] = []
    try:
        key = _key(torch, options, arrays, pointers)
        known = _remembered.get(key)
    except (RuntimeError, TypeError):  # of a tensor without memory or strides, and of an option without a hash
        return make()
    if known is not None:
        return make() if updates and known.overlap(pointers) else known.run(torch, arrays, pointers)
    if key is None or not _may_be_remembered(torch, arrays):
        return make()
    with _recording() as launches:
        made = make()
    known = _Call.of(arrays, pointers, results, updates, launches)
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


def _key(torch: Any, options: tuple[Any, ...], arrays: tuple[Any, ...], pointers: list[int]) -> Any:
    """What a call is remembered by, None for one that is not; appends to ``pointers`` where each array lies.

    Raises RuntimeError for a tensor without memory or without strides. Complex tensors, the only ones that can be
    conjugated, are refused by every call, and so never remembered.
    """
    plain = torch.Tensor
    # options of other types may be equal, such as 1, 1.0 and True
    types = tuple(map(type, options))
    key = [options, types, env.unparsed(), backend.chosen(), torch.is_grad_enabled(), _current_device(torch)]
    for x in arrays:
        if x is None:
            key.append(None)
            pointers.append(~len(pointers))  # no address, and none that occurs twice
            continue
        if type(x) is not plain or x.is_neg():
            return None
        pointer = x.data_ptr()
        pointers.append(pointer)
        key.append((x.shape, x.stride(), x.dtype, x.device, x.requires_grad, pointer & 15))
    if len(set(pointers)) < len(pointers):  # which arrays start at the same place
        key.append(tuple(map(pointers.index, pointers)))
    return tuple(key)


def _may_be_remembered(torch: Any, arrays: tuple[Any, ...]) -> bool:
    """What the key decides, found out once: the backend, unchecked numbers, one current device, no empty array."""
    device = arrays[0].device
    if env.check() or backend.active().name not in BACKENDS or _current_device(torch) != device.index:
        return False
    return all(x is None or (x.device == device and x.numel() > 0) for x in arrays)


def _current_device(torch: Any) -> Any:
    return torch._C._cuda_getDevice()  # what torch.cuda.current_device() wraps


def _stream(torch: Any, device_index: int) -> Any:
    return torch._C._cuda_getCurrentRawStream(device_index)  # what torch.cuda.current_stream() wraps


def _bind(device_index: int) -> None:
    """Makes the device's context current in this thread, which the driver does not do by itself."""
    if device_index not in _bound.devices:
        import_cupy().cuda.Device(device_index).use()
        _bound.devices.add(device_index)


class _Prepared(NamedTuple):
    """A launch: its words, and which pointers and tensor maps go where among them, as (place, number of the array)."""

    kernel: Kernel
    grid: int
    cluster: int
    words: Words
    pointers: tuple[tuple[int, int], ...]
    maps: tuple[tuple[slice, int, Callable[[int], Words]], ...]

    @classmethod
    def of(cls, launch: Launch, kernel: Kernel, numbers: dict[int, int]) -> "_Prepared | None":
        """``numbers`` are those of arrays by address; None if the launch has a pointer to another one."""
        described = {getattr(type(launch.params), name).offset: x for name, x in launch.tensor_maps.items()}
        fields = list(_pointer_fields(launch.params))
        if not numbers.keys() >= {*(pointer for _, pointer in fields), *(x.pointer for x in described.values())}:
            return None
        pointers = tuple((1 + offset // _WORD, numbers[pointer]) for offset, pointer in fields)
        maps = tuple(
            (slice(1 + offset // _WORD, 1 + (offset + BYTES) // _WORD), numbers[x.pointer], _maps_at(x.at(0)))
            for offset, x in described.items()
        )
        words = words_of(bytes(launch.params))
        for place, _ in pointers:
            words[place] = 0
        return cls(kernel, launch.grid, launch.cluster, words, pointers, maps)


@functools.lru_cache(LARGEST_MEMORY)
def _maps_at(tensor_map: TensorMap) -> Callable[[int], Words]:
    """The map's words for any address of its array."""
    return functools.lru_cache(MAPS_AT_HAND)(lambda pointer: array.array("Q", encode(tensor_map.at(pointer))))


class _Made(NamedTuple):
    """An array that a call returns: contiguous; ``like`` is the number of an array of the same form, or None."""

    shape: tuple[int, ...]
    dtype: Any
    like: int | None


@dataclass(frozen=True)
class _Call:
    """The launches of a call. Arrays are counted through: the caller's, those returned, those in the workspace."""

    device: Any
    launches: tuple[_Prepared, ...]
    returned: tuple[_Made, ...]
    workspace_bytes: int
    offsets: tuple[int, ...]  # of arrays in the workspace
    updates: tuple[int, ...]
    spans: tuple[int, ...]  # bytes of each of the caller's arrays, gaps included; 0 for None

    @classmethod
    def of(
        cls,
        arrays: tuple[Any, ...],
        pointers: list[int],
        results: tuple[str, ...],
        updates: tuple[int, ...],
        launches: list[Launch],
    ) -> "_Call | None":
        """None if a pointer in an argument is that of no known array."""
        outputs: dict[str, Tensor] = {}
        scratch: dict[int, Tensor] = {}
        for launch in launches:
            outputs |= launch.outputs
            scratch |= {tensor.pointer: tensor for tensor in launch.scratch.values()}
        if any(name not in outputs for name in results):
            return None
        returned = [outputs.pop(name) for name in results]
        workspace = [*outputs.values(), *scratch.values()]
        everything = [*pointers, *(tensor.pointer for tensor in (*returned, *workspace))]
        numbers = {pointer: everything.index(pointer) for pointer in everything}
        if len(numbers) != len(set(pointers)) + len(returned) + len(workspace):
            return None
        device = arrays[0].device
        prepared = [_Prepared.of(launch, loaded(launch.config, device.index), numbers) for launch in launches]
        known = tuple(one for one in prepared if one is not None)
        if len(known) < len(prepared):
            return None
        offsets = [0]
        for tensor in workspace:
            offsets.append(offsets[-1] + -(-tensor.nbytes_span // _ALIGNMENT) * _ALIGNMENT)
        return cls(
            device=device,
            launches=known,
            returned=tuple(_made_as(tensor.owner, arrays) for tensor in returned),
            workspace_bytes=offsets.pop(),
            offsets=tuple(offsets),
            updates=tuple(u for u in updates if arrays[u] is not None),
            spans=tuple(0 if x is None else _span(x) for x in arrays),
        )

    def overlap(self, pointers: list[int]) -> bool:
        """Whether an array that is written to may share memory with another one."""
        for u in self.updates:
            first = pointers[u]
            end = first + self.spans[u]
            for i, pointer in enumerate(pointers):
                if i != u and pointer < end and first < pointer + self.spans[i]:
                    return True
        return False

    def run(self, torch: Any, arrays: tuple[Any, ...], pointers: list[int]) -> Any:
        """The results for arrays that lie at ``pointers``."""
        device = self.device
        _bind(device.index)
        returned = [
            torch.empty(shape, dtype=dtype, device=device) if like is None else torch.empty_like(arrays[like])
            for shape, dtype, like in self.returned
        ]
        pointers += [x.data_ptr() for x in returned]
        if self.offsets:
            # one allocation; like the outputs, it goes back to the allocator in the order of the stream
            workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
            start = workspace.data_ptr()
            pointers += [start + offset for offset in self.offsets]
        stream = _stream(torch, device.index)
        for kernel, grid, cluster, blank, places, maps in self.launches:
            words = blank[:]  # its own: another thread may make the same call
            for place, number in places:
                words[place] = pointers[number]
            for part, number, words_at in maps:
                words[part] = words_at(pointers[number])
            kernel.launch(grid, words, stream, cluster)
        for u in self.updates:
            if not arrays[u].is_inference():
                torch.autograd.graph.increment_version(arrays[u])
        return returned[0] if len(returned) == 1 else tuple(returned)


def _made_as(output: Any, arrays: tuple[Any, ...]) -> _Made:
    """How an output is made again; torch is quickest to make an array like another one."""

    def form(x: Any) -> tuple[Any, ...]:
        return x.shape, x.stride(), x.dtype

    like = (i for i, x in enumerate(arrays) if x is not None and form(x) == form(output))
    return _Made(tuple(output.shape), output.dtype, next(like, None))


def _span(x: Any) -> int:
    """Bytes from a tensor's first element to the end of its last; torch has no negative strides."""
    last = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    return int((last + 1) * x.element_size())


def _pointer_fields(params: ctypes.Structure, start: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, value) of every pointer in a struct of arguments that is not null."""
    for name, kind in params._fields_:  # type: ignore[misc]
        offset = start + getattr(type(params), name).offset
        value = getattr(params, name)
        if isinstance(value, ctypes.Structure):
            yield from _pointer_fields(value, offset)
        elif kind is ctypes.c_void_p and value:
            yield offset, value
