"""Calls whose like was made before: what was checked, planned and loaded for one is launched again for the next.

A call is remembered by the form of its arrays (shape, strides, dtype, device, alignment), its other arguments and what
torch and the environment say of it, if its arrays are torch tensors on a GPU: such calls are repeated by the thousand.
What a form cannot tell is looked at each time, and leads the ordinary way: that an array is no plain tensor, that one
which is written to overlaps another. Neither way changes a bit.

A repeated call is work of the host alone, a few microseconds, so every step of it counts: attributes of a tensor take
0.1 us each, an allocation 0.5 to 2. So forms are compared in one step with those of the calls looked up last, before
they are looked up one by one, and launches for addresses that occurred before are at hand.
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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cuattn import backend, env, forms
from cuattn.devices import import_cupy
from cuattn.interop import Tensor
from cuattn.launch import Kernel, ReadyLaunch, Words, loaded, words_of
from cuattn.launches import Launch
from cuattn.tensor_map import BYTES, TensorMap, encode

#: Whether a torch tensor lies where calls are remembered, and the backends whose calls are.
_is_on_device: Callable[[Any], Any] = operator.attrgetter("is_cuda")
BACKENDS = ("auto", "cuda")
#: More remembered calls than this, and all are forgotten.
LARGEST_MEMORY = 4096
#: Calls of one situation whose forms are compared before others are looked up.
MOST_RECENT = 4
#: Addresses of an array for which its tensor map is at hand, for each call.
MAPS_AT_HAND = 64

_WORD = 8
#: Arrays that share a workspace start at multiples of so many bytes.
_ALIGNMENT = 256

_launches: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("cuattn_launches", default=None)


@dataclass(eq=False)
class _Situation:
    """All that a call is remembered by but the forms of its tensors.

    shared: whether some start at the same place. recent: the calls looked up last, latest first.
    """

    shared: bool
    recent: list[tuple[forms.Check, "_Call"]] = field(default_factory=list)


_remembered: dict[tuple[_Situation, Any], "_Call"] = {}


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
    try:
        surveyed = forms.survey(torch, arrays)
        if surveyed is None:
            return make()
        pointers, tensors = surveyed
        grads, device, chosen = torch.is_grad_enabled(), _current_device(torch), backend.chosen()
        situation = _situation_at(tuple(pointers), grads, device, chosen, *env.unparsed(), *options)
    except (RuntimeError, TypeError):  # of a tensor without memory, and of an option without a hash
        return make()
    if situation.shared:
        tensors = forms.each_once(tensors)
    known = None
    for fits, one in situation.recent if tensors else ():
        if fits(*tensors):
            known = one
            break
    if known is None:
        key = situation, forms.forms(arrays)
        known = _remembered.get(key)
        if known is None:
            return _remember(torch, key, arrays, pointers, results, make, updates)
        if (check := forms.check_of(torch, tensors)) is not None:
            situation.recent[:] = [(check, known), *situation.recent[: MOST_RECENT - 1]]
    if updates and _overlap(known, *pointers):
        return make()
    return known.run(torch, arrays, pointers)


# options of other types may be equal, such as 1, 1.0 and True
@functools.lru_cache(LARGEST_MEMORY, typed=True)
def _situation_at(pointers: tuple[int | None, ...], *what: Any) -> _Situation:
    return _situation(forms.outline(pointers), *what)


@functools.lru_cache(LARGEST_MEMORY, typed=True)
def _situation(outline: tuple[int | None, ...], *what: Any) -> _Situation:
    starts = [x // 16 for x in outline if x is not None]
    return _Situation(shared=len(set(starts)) < len(starts))


def _remember(
    torch: Any,
    key: tuple[_Situation, Any],
    arrays: tuple[Any, ...],
    pointers: list[int | None],
    results: tuple[str, ...],
    make: Callable[[], Any],
    updates: tuple[int, ...],
) -> Any:
    """What ``make()`` gives; remembers the call if it may."""
    if key[1] is None or not _may_be_remembered(torch, arrays):
        return make()
    with _recording() as launches:
        made = make()
    known = _Call.of(torch, arrays, pointers, results, updates, launches)
    if known is not None:
        if len(_remembered) >= LARGEST_MEMORY:
            _remembered.clear()
        _remembered[key] = known
    return made


def forget() -> None:
    """Forgets all calls."""
    _remembered.clear()
    for cache in (_situation_at, _situation, _launches_at, _overlap):
        cache.cache_clear()


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


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
    def of(cls, launch: Launch, kernel: Kernel, numbers: dict[int | None, int]) -> "_Prepared | None":
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


@dataclass(frozen=True, eq=False)
class _Call:
    """The launches of a call. Arrays are counted through: the caller's, those returned, those in the workspace."""

    device_index: int
    empty: Callable[..., Any]  # allocates an array of a shape, strides and dtype
    launches: tuple[_Prepared, ...]
    returned: tuple[tuple[Any, ...], ...]  # shape, strides and dtype of each
    workspace: tuple[Any, ...]  # and its own
    offsets: tuple[int, ...]  # of arrays in the workspace
    updates: tuple[int, ...]
    spans: tuple[int, ...]  # bytes of each of the caller's arrays, gaps included; 0 for None

    @classmethod
    def of(
        cls,
        torch: Any,
        arrays: tuple[Any, ...],
        pointers: list[int | None],
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
            device_index=device.index,
            empty=_empty(torch, device),
            launches=known,
            returned=tuple((tuple(x.shape), x.stride(), x.dtype) for x in (tensor.owner for tensor in returned)),
            workspace=((offsets.pop(),), (1,), torch.uint8),
            offsets=tuple(offsets),
            updates=tuple(u for u in updates if arrays[u] is not None),
            spans=tuple(0 if x is None else _span(x) for x in arrays),
        )

    def run(self, torch: Any, arrays: tuple[Any, ...], pointers: list[int | None]) -> Any:
        """The results for arrays that lie at ``pointers``."""
        empty = self.empty
        _bind(self.device_index)
        returned = []
        for form in self.returned:
            made = empty(*form)
            returned.append(made)
            pointers.append(made.data_ptr())
        if self.offsets:
            # one allocation; like the outputs, it goes back to the allocator in the order of the stream
            workspace = empty(*self.workspace)
            pointers.append(workspace.data_ptr())
        for launch in _launches_at(self, _stream(torch, self.device_index), *pointers):
            launch.launch()
        for u in self.updates:
            if not arrays[u].is_inference():
                torch.autograd.graph.increment_version(arrays[u])
        return returned[0] if len(returned) == 1 else tuple(returned)


@functools.lru_cache(LARGEST_MEMORY)
def _launches_at(call: _Call, stream: int, *pointers: Any) -> tuple[ReadyLaunch, ...]:
    """The launches for arrays at these addresses: the caller's, those returned, the workspace."""
    places = [*pointers, *(pointers[-1] + offset for offset in call.offsets[1:])]
    ready = []
    for kernel, grid, cluster, blank, numbers, maps in call.launches:
        words = blank[:]
        for place, number in numbers:
            words[place] = places[number]
        for part, number, words_at in maps:
            words[part] = words_at(places[number])
        ready.append(kernel.ready(grid, words, stream, cluster))
    return tuple(ready)


@functools.lru_cache(LARGEST_MEMORY)
def _overlap(call: _Call, *pointers: int | None) -> bool:
    """Whether an array that is written to may share memory with another one."""
    places = {i: (x, x + call.spans[i]) for i, x in enumerate(pointers) if x is not None}
    return any(
        i != u and start < places[u][1] and places[u][0] < end
        for u in call.updates
        for i, (start, end) in places.items()
    )


def _empty(torch: Any, device: Any) -> Callable[..., Any]:
    """Allocates on the device, the current one: as compiled functions do, where that works, which is quicker."""

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    try:
        quick: Callable[..., Any] = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}")
        made = quick((2, 3), (3, 1), torch.float16)
        works = (made.shape, made.stride(), made.dtype, made.device) == ((2, 3), (3, 1), torch.float16, device)
    except (AttributeError, RuntimeError, TypeError):
        return empty
    return quick if works else empty


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
