"""From a checked call to work on a backend: the reference, the emulator or a GPU."""

from collections.abc import Sequence

from cuattn import backend as backends
from cuattn import emulator, reference, replay
from cuattn.backend import Backend
from cuattn.backward import plan_backward
from cuattn.interop import Tensor
from cuattn.launch import device_architecture, launch_kernel, processor_count
from cuattn.launches import Allocate, Launch, Target
from cuattn.problem import Append, Gradients, Problem, Upstream
from cuattn.problem import Sequences as SequenceLengths
from cuattn.schedule import plan_append, plan_combine, plan_forward, plan_partials

#: Multiprocessors of an emulated device: few, and not a power of two, so that ranges of chunks end anywhere.
EMULATED_PROCESSORS = 3
Partials = tuple[Tensor, Tensor, Tensor]


def execute(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Attention into ``out`` and, if it is asked for, ``lse``, axes (batch, head, token, ...), the LSE contiguous."""
    backend = _backend(problem.query)
    if backend.name == "reference":
        reference.forward(problem, out, lse or _allocator(out)(problem.lse_shape, "float32"))
        return
    target = _target(backend, problem.query)
    _run(backend, plan_forward(problem, out, lse, target, _allocator(problem.query)), problem.query)


def execute_backward(problem: Problem, upstream: Upstream, gradients: Gradients) -> None:
    """The gradients of attention."""
    backend = _backend(problem.query)
    if backend.name == "reference":
        reference.backward(problem, upstream, gradients)
        return
    target = _target(backend, problem.query)
    _run(backend, plan_backward(problem, upstream, gradients, target, _allocator(problem.query)), problem.query)


def execute_append(append: Append, sequences: SequenceLengths, key: Tensor, value: Tensor) -> None:
    """Writes new keys and values into a cache."""
    backend = _backend(append.key)
    if backend.name == "reference":
        reference.append(append, sequences, key, value)
        return
    _run(backend, plan_append(append, sequences, key, value, _target(backend, key)), append.key)


def execute_partials(problem: Problem, partials: Partials, first_chunk: int, total_keys: int) -> None:
    """Fills out (chunks, batch, head, token, column), reference and sum (chunks, batch, head, token)."""
    backend = _backend(problem.query)
    if backend.name == "reference":
        reference.forward_partials(problem, *partials, first_chunk, total_keys)
        return
    target = _target(backend, problem.query)
    _run(backend, [plan_partials(problem, _named(partials), first_chunk, total_keys, target)], problem.query)


def execute_combine(shards: Sequence[Partials], out: Tensor, lse: Tensor | None) -> None:
    """The fold over partial results of shards in ascending order; out (batch, head, token, column)."""
    backend = _backend(out)
    if backend.name == "reference":
        reference.combine(shards, out, lse or _allocator(out)(out.shape[:3], "float32"))
        return
    parts = [_named(shard) for shard in shards]
    _run(backend, plan_combine(parts, out, lse, _target(backend, out), _allocator(out)), out)


def _named(partials: Partials) -> dict[str, Tensor]:
    return dict(zip(("out", "reference", "sum"), partials, strict=True))


def _backend(like: Tensor) -> Backend:
    return backends.active().for_device(like.device)


def _target(backend: Backend, like: Tensor) -> Target:
    if backend.arch:
        return Target(backend.arch, EMULATED_PROCESSORS)
    return Target(device_architecture(like.device.index), processor_count(like.device.index))


def _allocator(like: Tensor) -> Allocate:
    return lambda shape, dtype: like.framework.empty(shape, dtype, like.device, like)


def _run(backend: Backend, launches: list[Launch], like: Tensor) -> None:
    replay.note(launches)
    if backend.name == "emulator":
        emulator.run(launches)
        return
    stream = like.framework.stream(like.device)
    for launch in launches:
        launch_kernel(launch, like.device.index, stream)
