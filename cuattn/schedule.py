"""How a call is spread over the device: the one place that sees the batch. Nothing here can change a bit."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

from cuattn import config as configs
from cuattn import contract
from cuattn.config import ColumnsConfig, ForwardConfig, KernelConfig
from cuattn.interop import Tensor
from cuattn.params import (
    AppendParams,
    ColumnsParams,
    CombineParams,
    ForwardParams,
    PartialParams,
    ScanParams,
    SequenceArrays,
    Strides,
)
from cuattn.problem import Append, Problem, Sequences
from cuattn.tensor_map import TensorMap

LARGEST_GRID = 2**31 - 1
#: Rows of a sequence and key head (queries times the heads that share a key) up to which chunks are spread over blocks.
FEW_ROWS = 64
#: Fields of SplitGroup in kernels_cu/attn/params.cuh.
GROUP_FIELDS = 7

#: Makes a workspace (shape, dtype) on the problem's device.
Allocate = Callable[[tuple[int, ...], str], Tensor]


@dataclass(frozen=True)
class Target:
    """The device: its architecture and how many multiprocessors it has."""

    arch: str
    processors: int


@dataclass(frozen=True)
class Launch:
    """One launch and the memory that it touches.

    inputs are read; outputs are written, by all launches of a call together completely and each element once; updates
    are caches, read and written in part; scratch is written and read by launches of this call. tensor_maps describe
    some of these tensors: they go to the fields of ``params`` of the same names, in the form that the device knows.
    """

    config: KernelConfig
    grid: int
    params: ctypes.Structure
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    tensor_maps: dict[str, TensorMap] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.config.threads

    @property
    def shared_bytes(self) -> int:
        return self.config.shared_bytes


def plan_forward(problem: Problem, out: Tensor, lse: Tensor, target: Target, allocate: Allocate) -> list[Launch]:
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
    few = problem.num_splits is not None or (not packed and problem.query_length * problem.group <= FEW_ROWS)
    if few or mixed:
        launches += attend.few_rows(allocate, FEW_ROWS if mixed and not few else LARGEST_GRID)
    if not few:
        launches.append(attend.many_rows(FEW_ROWS if mixed else 0))
    return launches


def spread(groups: int, splits: int, blocks: int) -> int:
    """Blocks for groups of rows of which each can be cut into ``splits`` parts at most, on a device that runs
    ``blocks`` at a time.

    A chunk is never cut, so parts shorter than one would leave multiprocessors idle; and parts that start where a group
    does end evenly. Where that leaves more than a tenth of the device idle, ranges run across groups.
    """
    even = groups * min(splits, max(1, blocks // max(1, groups)))
    return even if even == groups * splits or 0.9 * blocks <= even <= blocks else blocks


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
    shards: list[dict[str, Tensor]], out: Tensor, lse: Tensor, target: Target, allocate: Allocate
) -> list[Launch]:
    """The fold over the partial results of shards in ascending order, as in `plan_partials`, into ``out`` (batch, query
    heads, query length, value dim) and ``lse``.
    """
    batch, heads, length, value_dim = out.shape
    rows = batch * heads * length
    config = configs.CombineConfig(value_dim, out.dtype, target.arch)
    forward = ForwardParams(
        out=out.pointer, lse=lse.pointer, out_strides=strides_of(out), query_heads=heads, group=1, query_length=length
    )
    carried = _partial_tensors(1, rows, value_dim, allocate) if len(shards) > 1 else {}
    launches = []
    for number, shard in enumerate(shards):
        last = number == len(shards) - 1
        params = CombineParams(
            forward=forward,
            partials=_partial_params(shard, shard["sum"].shape[0], rows),
            carried=_partial_params(carried, 1, rows),
            load_carried=number > 0,
            store_carried=not last,
        )
        inputs = {f"partials.{name}": tensor for name, tensor in shard.items()}
        scratch = {f"carried.{name}": tensor for name, tensor in carried.items()}
        outputs = {"out": out, "lse": lse} if last else {}
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
        sequences=_arrays(sequences, key),
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


class Attend:
    """The launches that compute attention for one problem. Keys start at ``first_key`` of ``total_keys``."""

    def __init__(
        self,
        problem: Problem,
        out: Tensor | None,
        lse: Tensor | None,
        target: Target,
        tables: dict[str, Tensor],
        first_key: int = 0,
        total_keys: int | None = None,
    ) -> None:
        self.problem = problem
        self.target = target
        self.tables = tables
        self.outputs = {"out": out, "lse": lse} if out and lse else {}
        self.key_length = problem.key_length if total_keys is None else total_keys
        self.paged = problem.paged or bool(tables)
        self.packed = problem.sequences is not None and problem.sequences.query_starts is not None
        factor, negate = contract.softmax_factor(problem.scale)
        key, value = problem.key, problem.value
        self.params = ForwardParams(
            query=problem.query.pointer,
            # the kernel counts keys from the sequence's first one
            key=key.pointer - first_key * key.strides[2] * key.itemsize,
            value=value.pointer - first_key * value.strides[2] * value.itemsize,
            out=out.pointer if out else None,
            lse=lse.pointer if lse else None,
            query_strides=strides_of(problem.query),
            key_strides=strides_of(key, problem.paged, bool(tables)),
            value_strides=strides_of(value, problem.paged, bool(tables)),
            out_strides=strides_of(out) if out else Strides(),
            sequences=self._sequences(),
            query_heads=problem.query_heads,
            group=problem.group,
            query_length=problem.query_length,
            key_length=self.key_length,
            factor=factor,
            negate_scores=negate,
        )

    def many_rows(self, few_rows: int) -> Launch:
        """A block for each tile of rows; sequences of at most ``few_rows`` rows are left to another launch."""
        problem = self.problem
        sequences = problem.sequences
        shape = (problem.head_dim, problem.value_dim, problem.mask, problem.query.dtype, self.target.arch)
        config = configs.many_rows(*shape, sequences is not None or self.paged, self.paged)
        self.params.sequences.few_rows = few_rows
        if isinstance(config, ForwardConfig):
            self.params.query_tiles = self.tiles_of(config.query_tile, 1)
            grid = problem.batch * problem.query_heads * self.params.query_tiles
            return self._launch(config, grid, self.params, config.query_tile)
        self.params.query_tiles = self.tiles_of(config.row_tile, problem.group)
        grid = problem.batch * problem.key_heads * self.params.query_tiles
        return self._launch(config, grid, ColumnsParams(self.params, PartialParams()), config.row_tile)

    def few_rows(self, allocate: Allocate, few_rows: int) -> list[Launch]:
        """Chunks spread evenly over blocks, and the fold of those of a row that several blocks had.

        Sequences of more than ``few_rows`` rows are left to another launch.
        """
        problem, config = self.problem, self._few_rows_config()
        tiles = self.tiles_of(config.row_tile, problem.group)
        groups = problem.batch * problem.key_heads * tiles
        chunks = max(1, contract.chunk_count(self.key_length))
        key_tiles = max(1, -(-self.key_length // config.key_tile))
        if groups * key_tiles > LARGEST_GRID:
            raise ValueError(
                f"q: got {groups * key_tiles} tiles of {config.row_tile} rows and {config.key_tile} keys, expected at "
                f"most {LARGEST_GRID} where few rows or num_splits are given"
            )
        if problem.num_splits is not None:
            blocks = problem.num_splits * groups
        else:
            longest = contract.chunk_length(contract.chunk_start(chunks - 1)) // config.key_tile
            most = self.target.processors * config.blocks_per_multiprocessor
            blocks = spread(groups, max(1, key_tiles // longest), most)
        blocks = min(blocks, groups * chunks, LARGEST_GRID)
        self.params.query_tiles = tiles
        self.params.sequences.few_rows = few_rows
        if blocks == 0:
            return []
        rows = config.row_tile if self.packed else min(config.row_tile, problem.query_length * problem.group)
        even = problem.sequences is None and not self.tables  # every group has as many key tiles
        by_group = not self.packed and groups < blocks
        slots = groups if by_group else blocks
        scratch: dict[str, Tensor] = {}
        if chunks > 1 and not (even and groups % blocks == 0):
            scratch = _partial_tensors(slots * chunks, rows, problem.value_dim, allocate)
            scratch["groups"] = allocate((slots, GROUP_FIELDS), "int32")
        partials = _partial_params(scratch, chunks, rows, by_group=by_group)
        forward = self._launch(config, blocks, ColumnsParams(self.params, partials), config.row_tile, scratch)
        if not scratch:
            return [forward]
        combine = configs.CombineConfig(problem.value_dim, problem.query.dtype, self.target.arch)
        params = CombineParams(forward=self.params, partials=partials)
        return [forward, Launch(combine, slots * rows, params, {}, self.outputs, scratch=scratch)]

    def partials(self, partials: dict[str, Tensor], first_chunk: int) -> Launch:
        config = self._few_rows_config()
        problem = self.problem
        self.params.query_tiles = self.tiles_of(config.row_tile, problem.group)
        self.params.sequences.few_rows = LARGEST_GRID
        chunks = partials["sum"].shape[0]
        rows = problem.batch * problem.query_heads * problem.query_length
        groups = problem.batch * problem.key_heads * self.params.query_tiles
        params = _partial_params(partials, chunks, rows, first_chunk=first_chunk)
        grid = min(groups * chunks, self.target.processors * config.blocks_per_multiprocessor)
        launch = self._launch(config, grid, ColumnsParams(self.params, params), config.row_tile)
        outputs = {f"partials.{name}": tensor for name, tensor in partials.items()}
        return Launch(config, grid, launch.params, launch.inputs, outputs)

    def _few_rows_config(self) -> ColumnsConfig:
        p = self.problem
        return configs.few_rows(p.head_dim, p.value_dim, p.mask, p.query.dtype, self.target.arch, self.paged)

    def tiles_of(self, tile_rows: int, token_rows: int) -> int:
        """Tiles of a head and batch entry; of packed sequences as many as they could need, for lengths are not known
        here (kernels_cu/attn/place.cuh)."""
        rows = self.problem.query_length * token_rows
        if self.packed and self.problem.sequences:
            return rows // tile_rows + self.problem.sequences.count
        return -(-rows // tile_rows)

    def _launch(
        self,
        config: KernelConfig,
        grid: int,
        params: ctypes.Structure,
        tile_rows: int,
        scratch: dict[str, Tensor] | None = None,
    ) -> Launch:
        if grid > LARGEST_GRID:
            raise ValueError(f"q: got {grid} tiles of {tile_rows} rows, expected at most {LARGEST_GRID}")
        problem = self.problem
        inputs = {"q": problem.query, "k": problem.key, "v": problem.value}
        if problem.sequences:
            inputs |= problem.sequences.arrays
        return Launch(config, grid, params, inputs, self.outputs, scratch={**self.tables, **(scratch or {})})

    def _sequences(self) -> SequenceArrays:
        if self.tables:
            arrays = SequenceArrays(count=self.problem.batch)
            arrays.pages, arrays.seen = (self.tables[name].pointer for name in ("positions", "seen"))
            _set_pages(arrays, 1, self.tables["positions"].shape[1], self.key_length)
            return arrays
        if self.problem.sequences:
            return _arrays(self.problem.sequences, self.problem.key)
        return SequenceArrays(count=self.problem.batch)


def _arrays(sequences: Sequences, key: Tensor) -> SequenceArrays:
    def pointer(tensor: Tensor | None) -> int | None:
        return tensor.pointer if tensor else None

    arrays = SequenceArrays(
        query_starts=pointer(sequences.query_starts),
        key_starts=pointer(sequences.key_starts),
        key_lengths=pointer(sequences.key_lengths),
        pages=pointer(sequences.block_table),
        count=sequences.count,
        cached=sequences.cached,
        new_keys=sequences.new_keys,
    )
    if sequences.block_table:
        _set_pages(arrays, key.shape[2], sequences.block_table.shape[1], key.shape[0])
    return arrays


def _set_pages(arrays: SequenceArrays, page_size: int, pages_per_sequence: int, page_count: int) -> None:
    """The shape of a block table, and the division by the page size as a multiplication.

    For j < 2**31, ``j // d == (2 * j * m) >> 32 >> s`` with ``s = ceil(log2(d))`` and ``m = ceil(2**(31 + s) / d)``
    (Granlund and Montgomery, "Division by invariant integers using multiplication", theorem 4.2).
    """
    arrays.page_size, arrays.pages_per_sequence, arrays.page_count = page_size, pages_per_sequence, page_count
    arrays.page_shift = (page_size - 1).bit_length()
    arrays.page_magic = -(-(2 ** (31 + arrays.page_shift)) // page_size)


def strides_of(tensor: Tensor, paged: bool = False, by_position: bool = False, unit: int = 1) -> Strides:
    """by_position: tables say where each single key of a batch entry lies. ``unit`` is 1 for elements."""
    first, head, token = (stride * unit for stride in tensor.strides[:3])
    return Strides(0 if paged else first, head, token, first if paged else token if by_position else 0)


def _partial_tensors(chunks: int, rows: int, value_dim: int, allocate: Allocate) -> dict[str, Tensor]:
    return {
        "out": allocate((chunks, rows, value_dim), "float32"),
        "reference": allocate((chunks, rows), "float32"),
        "sum": allocate((chunks, rows), "float32"),
    }


def _partial_params(
    tensors: dict[str, Tensor], chunks: int, rows: int, first_chunk: int = 0, by_group: bool = False
) -> PartialParams:
    pointers = {name: tensor.pointer for name, tensor in tensors.items()}
    end = first_chunk + chunks
    return PartialParams(
        **pointers, chunks=chunks, rows=rows, first_chunk=first_chunk, end_chunk=end, by_group=by_group
    )
