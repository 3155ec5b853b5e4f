"""The launches of each kind of call."""

from cuattn import config as configs
from cuattn import contract
from cuattn.attend import Attend, outputs_of, partial_params, partial_tensors
from cuattn.interop import Tensor
from cuattn.launches import LARGEST_GRID, Allocate, Launch, Target, sequence_arrays, strides_of
from cuattn.params import AppendParams, CombineParams, ForwardParams, ScanParams
from cuattn.problem import Append, Problem, Sequences

#: Rows of a sequence and key head (queries times the heads that share a key) up to which chunks are spread over blocks.
FEW_ROWS = 64


def plan_forward(problem: Problem, out: Tensor, lse: Tensor | None, target: Target, allocate: Allocate) -> list[Launch]:
    """Attention, with what must run before it. ``lse`` is contiguous (batch, query heads, query length)."""
    launches: list[Launch] = []
    if problem.append and problem.sequences:
        launches += plan_append(problem.append, problem.sequences, problem.key, problem.value, target)
    tables: dict[str, Tensor] = {}
    if problem.key_padding_mask:
        scan = plan_scan(problem.key_padding_mask, target, allocate)
        launches.append(scan)
        tables = scan.scratch
    attend = Attend(problem, out, lse, target, tables)
    packed = problem.sequences is not None and problem.sequences.query_starts is not None
    mixed = packed and problem.sequences is not None and problem.sequences.cached
    few = not packed and problem.query_length * problem.group <= FEW_ROWS
    few = few or (problem.num_splits is not None and not attend.shares_many_rows)
    if few or mixed:
        launches += attend.few_rows(allocate, FEW_ROWS if mixed and not few else LARGEST_GRID)
    if not few:
        launches += attend.many_rows(allocate, FEW_ROWS if mixed else 0)
    return launches


def plan_partials(
    problem: Problem, partials: dict[str, Tensor], first_chunk: int, total_keys: int, target: Target
) -> Launch:
    """The unmerged results of all chunks of a shard of the keys, which starts with chunk ``first_chunk``.

    ``partials`` has "out" (chunks, batch, query heads, query length, value dim), "reference" and "sum" (chunks, batch,
    query heads, query length), fp32 and contiguous.
    """
    attend = Attend(problem, None, None, target, {}, contract.chunk_start(first_chunk), total_keys)
    return attend.partials(partials, first_chunk)


def plan_combine(
    shards: list[dict[str, Tensor]], out: Tensor, lse: Tensor | None, target: Target, allocate: Allocate
) -> list[Launch]:
    """The fold over the partial results of shards in ascending order, as in `plan_partials`, into ``out`` (batch, query
    heads, query length, value dim) and ``lse``.
    """
    batch, heads, length, value_dim = out.shape
    rows = batch * heads * length
    config = configs.CombineConfig(value_dim, out.dtype, target.arch)
    forward = ForwardParams(
        out=out.pointer,
        lse=lse.pointer if lse else None,
        out_strides=strides_of(out),
        query_heads=heads,
        group=1,
        query_length=length,
    )
    carried = partial_tensors(1, rows, value_dim, allocate) if len(shards) > 1 else {}
    launches = []
    for number, shard in enumerate(shards):
        last = number == len(shards) - 1
        params = CombineParams(
            forward=forward,
            partials=partial_params(shard, shard["sum"].shape[0], rows),
            carried=partial_params(carried, 1, rows),
            load_carried=number > 0,
            store_carried=not last,
        )
        inputs = {f"partials.{name}": tensor for name, tensor in shard.items()}
        scratch = {f"carried.{name}": tensor for name, tensor in carried.items()}
        outputs = outputs_of(out, lse) if last else {}
        launches.append(Launch(config, rows, params, inputs, outputs, scratch=scratch))
    return launches


def plan_append(append: Append, sequences: Sequences, key: Tensor, value: Tensor, target: Target) -> list[Launch]:
    """New keys and values into a cache."""
    heads, length = append.key.shape[1:3]
    paged = sequences.block_table is not None
    capacity = sequences.block_table.shape[1] * key.shape[2] if sequences.block_table else key.shape[2]
    params = AppendParams(
        new_key=append.key.pointer,
        new_value=append.value.pointer,
        key=key.pointer,
        value=value.pointer,
        new_key_strides=strides_of(append.key, unit=key.itemsize),
        new_value_strides=strides_of(append.value, unit=key.itemsize),
        key_strides=strides_of(key, paged, unit=key.itemsize),
        value_strides=strides_of(value, paged, unit=key.itemsize),
        sequences=sequence_arrays(sequences, key),
        heads=heads,
        new_length=length,
        key_length=capacity,
        key_bytes=key.shape[3] * key.itemsize,
        value_bytes=value.shape[3] * value.itemsize,
    )
    config = configs.AppendConfig(target.arch)
    rows = append.key.shape[0] * heads * length  # a warp each
    grid = min(-(-rows * 32 // config.threads), 8 * target.processors)
    inputs = {"k_new": append.key, "v_new": append.value, **sequences.arrays}
    return [Launch(config, grid, params, inputs, updates={"k_cache": key, "v_cache": value})] if grid else []


def plan_scan(mask: Tensor, target: Target, allocate: Allocate) -> Launch:
    """The tables of a key padding mask, in the launch's scratch as "positions" and "seen"."""
    batch, length = mask.shape
    tables = {
        "positions": allocate((batch, max(1, length)), "int32"),
        "seen": allocate((batch, length + 2), "int32"),
    }
    params = ScanParams(
        mask=mask.pointer,
        positions=tables["positions"].pointer,
        seen=tables["seen"].pointer,
        batch_stride=mask.strides[0],
        token_stride=mask.strides[1],
        key_length=length,
    )
    return Launch(configs.ScanConfig(target.arch), batch, params, {"key_padding_mask": mask}, scratch=tables)
