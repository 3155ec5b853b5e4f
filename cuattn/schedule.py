"""How a launch is spread over the device: the one place that sees the batch. Nothing here can change a bit."""

from dataclasses import dataclass

from cuattn.config import KernelConfig
from cuattn.contract import softmax_factor
from cuattn.interop import Tensor
from cuattn.params import ForwardParams, SequenceArrays, Strides
from cuattn.problem import Problem, Sequences

LARGEST_GRID = 2**31 - 1


@dataclass(frozen=True)
class LaunchPlan:
    """Blocks, threads and shared memory of one launch, and the kernel's argument."""

    grid: int
    threads: int
    shared_bytes: int
    params: ForwardParams


def plan_forward(config: KernelConfig, problem: Problem, out: Tensor, lse: Tensor) -> LaunchPlan:
    """One block for each (batch, query head, query tile). ``lse`` is contiguous (batch, query heads, query length).

    Packed sequences get as many tiles as they could need: their lengths are not known here (kernels_cu/attn/place.cuh).
    """
    sequences = problem.sequences
    if sequences and sequences.query_starts:
        query_tiles = problem.query_length // config.query_tile + sequences.count
    else:
        query_tiles = -(-problem.query_length // config.query_tile)
    grid = problem.batch * problem.query_heads * query_tiles
    if grid > LARGEST_GRID:
        raise ValueError(f"q: got {grid} tiles of {config.query_tile} rows, expected at most {LARGEST_GRID}")
    factor, negate = softmax_factor(problem.scale)
    params = ForwardParams(
        query=problem.query.pointer,
        key=problem.key.pointer,
        value=problem.value.pointer,
        out=out.pointer,
        lse=lse.pointer,
        query_strides=Strides(*problem.query.strides[:3]),
        key_strides=Strides(*problem.key.strides[:3]),
        value_strides=Strides(*problem.value.strides[:3]),
        out_strides=Strides(*out.strides[:3]),
        sequences=_arrays(sequences) if sequences else SequenceArrays(),
        query_heads=problem.query_heads,
        group=problem.query_heads // problem.key_heads,
        query_length=problem.query_length,
        key_length=problem.key_length,
        query_tiles=query_tiles,
        factor=factor,
        negate_scores=negate,
    )
    return LaunchPlan(grid, config.warps * 32, config.shared_bytes, params)


def _arrays(sequences: Sequences) -> SequenceArrays:
    tensors = (sequences.query_starts, sequences.key_starts, sequences.key_lengths)
    return SequenceArrays(*(tensor.pointer if tensor else None for tensor in tensors), sequences.count)
