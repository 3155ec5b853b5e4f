"""How attention is spread over the device: the one place that sees the batch. Nothing here can change a bit."""

import ctypes
import functools
import math
from dataclasses import replace

from cuattn import config as configs
from cuattn import contract
from cuattn.config import ColumnsConfig, DecodeConfig, ForwardConfig, ForwardSm90Config, KernelConfig, hopper
from cuattn.interop import Tensor
from cuattn.launches import LARGEST_GRID, Allocate, Launch, Target, sequence_arrays, set_pages, strides_of
from cuattn.params import (
    CombineParams,
    ForwardParams,
    ForwardSm90Params,
    PartialParams,
    SequenceArrays,
    SplitParams,
    Strides,
)
from cuattn.problem import Problem
from cuattn.tensor_map import TensorMap, can_map
from cuattn.turns import block_count

#: Rows of a box that can lie anywhere in a tile: the swizzle repeats after so many.
SMALLEST_BOX = 8
#: Blocks of a cluster, on every device that has clusters.
LARGEST_CLUSTER = 8
#: The most of a device's multiprocessors that clusters can be sure to find: of some parts of it they use a few alone.
CLUSTERED = 0.75
#: Fields of SplitGroup in kernels_cu/attn/params.cuh.
GROUP_FIELDS = 7


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
        self.outputs = outputs_of(out, lse)
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

    @functools.cached_property
    def many_rows_config(self) -> ForwardSm90Config | ForwardConfig | ColumnsConfig:
        return configs.many_rows(*self._shape, self.problem.sequences is not None or self.paged, self.paged)

    @property
    def _shape(self) -> tuple[int, int, str, str, str]:
        """What every choice of a kernel depends on."""
        problem = self.problem
        return (problem.head_dim, problem.value_dim, problem.mask, problem.query.dtype, self.target.arch)

    @property
    def shares_many_rows(self) -> bool:
        """Whether several blocks can share the chunks of many rows."""
        return isinstance(self.many_rows_config, ForwardSm90Config)

    def _boxes(self, rows: int) -> dict[str, TensorMap]:
        """What the copy engine needs to know of keys and values; nothing where it cannot fetch them.

        It fetches boxes of ``rows`` keys, or of fewer that lie in one page.
        """
        problem, tensors = self.problem, {"key_map": self.problem.key, "value_map": self.problem.value}
        rows = math.gcd(rows, problem.key.shape[2]) if problem.paged else rows
        if rows < SMALLEST_BOX or not all(map(can_map, tensors.values())):
            return {}
        return {name: TensorMap.of(tensor, rows) for name, tensor in tensors.items()}

    def _out_boxes(self) -> dict[str, TensorMap]:
        """What the copy engine needs to know to store a warp's rows; nothing where they are no box of the outputs."""
        out, group = self.outputs["out"], self.problem.group
        if hopper.WARP_ROWS % group or not can_map(out):
            return {}
        return {"out_map": TensorMap.of(out, hopper.WARP_ROWS // group, group)}

    def many_rows(self, allocate: Allocate, few_rows: int) -> list[Launch]:
        """A block for each tile of rows; sequences of at most ``few_rows`` rows are left to another launch."""
        problem, config = self.problem, self.many_rows_config
        self.params.sequences.few_rows = few_rows
        if isinstance(config, ForwardSm90Config):
            return self._many_rows_sm90(config, allocate)
        if isinstance(config, ForwardConfig):
            self.params.query_tiles = self.tiles_of(config.query_tile, 1)
            grid = problem.batch * problem.query_heads * self.params.query_tiles
            return [self._launch(config, grid, self.params, config.query_tile)]
        self.params.query_tiles = self.tiles_of(config.row_tile, problem.group)
        grid = problem.batch * problem.key_heads * self.params.query_tiles
        return [self._launch(config, grid, SplitParams(self.params, PartialParams()), config.row_tile)]

    def _many_rows_sm90(self, config: ForwardSm90Config, allocate: Allocate) -> list[Launch]:
        """Where tiles of rows leave multiprocessors idle, or the caller says so, blocks share a tile's chunks."""
        problem = self.problem
        self.params.query_tiles = self.tiles_of(config.row_tile, problem.group)
        groups = problem.batch * problem.key_heads * self.params.query_tiles
        chunks = contract.chunk_count(self.key_length)
        pieces = max(1, min(chunks, problem.num_splits or self.target.processors // max(1, groups)))
        scratch: dict[str, Tensor] = {}
        if pieces > 1:
            config = replace(config, ragged=True, split=True)
            scratch = _workspace(groups, chunks, config.row_tile, problem.value_dim, allocate)
        partials = partial_params(scratch, chunks, config.row_tile, by_group=True)
        items = groups * pieces
        blocks = items
        if pieces == 1:
            longest_first = problem.mask == "causal" and self.key_length == problem.query_length
            blocks = block_count(
                items,
                self.params.query_tiles,
                longest_first,
                self.target.processors,
                known=problem.sequences is None,
            )
        launch = self._launch_sm90(config, blocks, partials, scratch, allocate, pieces, items)
        return [launch, *self._combine(groups, partials, scratch)]

    def _launch_sm90(
        self,
        config: ForwardSm90Config | DecodeConfig,
        blocks: int,
        partials: PartialParams,
        scratch: dict[str, Tensor],
        allocate: Allocate,
        pieces: int,
        items: int = 0,
    ) -> Launch:
        """The copy engine reads keys and values through maps of them where they lie in one piece; where they do not, or
        there is no such map, threads read them. It may also store outputs."""
        problem = self.problem
        pages = problem.paged and isinstance(config, ForwardSm90Config)  # whose rows threads read
        maps = {} if pages else self._boxes(config.key_tile)
        if isinstance(config, ForwardSm90Config) and (self.paged or not maps):
            config = replace(config, ragged=True, paged=True)
        if isinstance(config, ForwardSm90Config) and config.may_store_boxes:
            maps |= self._out_boxes()
            config = replace(config, out_boxes="out_map" in maps)
        finished = {}
        if config.merged_floats and contract.chunk_count(self.key_length) > 1:
            finished["merged"] = allocate((blocks, config.merged_floats), "float32")
        params = ForwardSm90Params(
            call=SplitParams(self.params, partials),
            merged=finished["merged"].pointer if finished else None,
            mapped="key_map" in maps,
            box_rows=maps["key_map"].rows if "key_map" in maps else 0,
            pieces=pieces,
            items=items,
            group_shift=problem.group.bit_length() - 1,
        )
        launch = self._launch(config, blocks, params, config.row_tile, {**scratch, **finished})
        return replace(launch, tensor_maps=maps)

    def _combine(self, slots: int, partials: PartialParams, scratch: dict[str, Tensor]) -> list[Launch]:
        """The merge of what several blocks have of the same rows, if any."""
        if not scratch:
            return []
        config = configs.CombineConfig(self.problem.value_dim, self.problem.query.dtype, self.target.arch)
        params = CombineParams(forward=self.params, partials=partials)
        return [Launch(config, slots * partials.rows, params, {}, self.outputs, scratch=scratch)]

    def few_rows(self, allocate: Allocate, few_rows: int) -> list[Launch]:
        """Chunks spread evenly over blocks, and the fold of those of a row that several blocks had.

        Sequences of more than ``few_rows`` rows are left to another launch.
        """
        problem = self.problem
        rows = LARGEST_GRID if self.packed else problem.query_length * problem.group
        boxes = not self.tables and bool(self._boxes(contract.key_tile(max(problem.head_dim, problem.value_dim))))
        config = configs.few_rows(*self._shape, self.paged, rows, boxes)
        tiles = self.tiles_of(config.row_tile, problem.group)
        groups = problem.batch * problem.key_heads * tiles
        chunks = max(1, contract.chunk_count(self.key_length))
        key_tiles = self._key_tiles(config, groups)
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
        # of one sequence, or of equal ones, a cluster of blocks has a group's chunks, and merges them itself
        pieces, rest = divmod(blocks, groups)
        clustered = isinstance(config, DecodeConfig) and rest == 0 and pieces <= LARGEST_CLUSTER
        clustered = clustered and (even or problem.batch == 1)
        clustered = clustered and (problem.num_splits is not None or blocks <= CLUSTERED * self.target.processors)
        scratch: dict[str, Tensor] = {}
        if clustered and pieces > 1:
            scratch = partial_tensors(groups * chunks, rows, problem.value_dim, allocate)
        elif not clustered and chunks > 1 and not (even and groups % blocks == 0):
            scratch = _workspace(slots, chunks, rows, problem.value_dim, allocate)
        partials = partial_params(scratch, chunks, rows, by_group=by_group)
        if isinstance(config, ColumnsConfig):
            forward = self._launch(config, blocks, SplitParams(self.params, partials), config.row_tile, scratch)
        else:
            forward = self._launch_sm90(config, blocks, partials, scratch, allocate, pieces if clustered else 0)
        if clustered:
            return [replace(forward, cluster=pieces)]
        return [forward, *self._combine(slots, partials, scratch)]

    def _key_tiles(self, config: DecodeConfig | ForwardSm90Config | ColumnsConfig, groups: int) -> int:
        """Tiles of keys, which blocks count through for all groups of rows, by 32 bits."""
        key_tiles = max(1, -(-self.key_length // config.key_tile))
        if groups * key_tiles > LARGEST_GRID:
            raise ValueError(
                f"q: got {groups * key_tiles} tiles of {config.row_tile} rows and {config.key_tile} keys, expected at "
                f"most {LARGEST_GRID} for few rows, num_splits or partial results"
            )
        return key_tiles

    def partials(self, partials: dict[str, Tensor], first_chunk: int) -> Launch:
        config = configs.columns(*self._shape, self.paged, split=True)
        problem = self.problem
        self.params.query_tiles = self.tiles_of(config.row_tile, problem.group)
        self.params.sequences.few_rows = LARGEST_GRID
        chunks = partials["sum"].shape[0]
        rows = problem.batch * problem.query_heads * problem.query_length
        groups = problem.batch * problem.key_heads * self.params.query_tiles
        self._key_tiles(config, groups)
        params = partial_params(partials, chunks, rows, first_chunk=first_chunk)
        grid = min(groups * chunks, self.target.processors * config.blocks_per_multiprocessor)
        launch = self._launch(config, grid, SplitParams(self.params, params), config.row_tile)
        outputs = {f"partials.{name}": tensor for name, tensor in partials.items()}
        return Launch(config, grid, launch.params, launch.inputs, outputs)

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
            set_pages(arrays, 1, self.tables["positions"].shape[1], self.key_length)
            return arrays
        if self.problem.sequences:
            return sequence_arrays(self.problem.sequences, self.problem.key)
        return SequenceArrays(count=self.problem.batch)


def outputs_of(out: Tensor | None, lse: Tensor | None) -> dict[str, Tensor]:
    """Those that there are, by name."""
    return {name: tensor for name, tensor in (("out", out), ("lse", lse)) if tensor}


def spread(groups: int, splits: int, blocks: int) -> int:
    """Blocks for groups of rows of which each can be cut into ``splits`` parts at most, on a device that runs
    ``blocks`` at a time.

    A chunk is never cut, so parts shorter than one would leave multiprocessors idle; and parts that start where a group
    does end evenly. Where that leaves more than a tenth of the device idle, ranges run across groups.
    """
    even = groups * min(splits, max(1, blocks // max(1, groups)))
    return even if even == groups * splits or 0.9 * blocks <= even <= blocks else blocks


def partial_tensors(chunks: int, rows: int, value_dim: int, allocate: Allocate) -> dict[str, Tensor]:
    return {
        "out": allocate((chunks, rows, value_dim), "float32"),
        "reference": allocate((chunks, rows), "float32"),
        "sum": allocate((chunks, rows), "float32"),
    }


def _workspace(slots: int, chunks: int, rows: int, value_dim: int, allocate: Allocate) -> dict[str, Tensor]:
    """For the results of chunks of groups of rows, and what the merge must know of each group."""
    tensors = partial_tensors(slots * chunks, rows, value_dim, allocate)
    return {**tensors, "groups": allocate((slots, GROUP_FIELDS), "int32")}


def partial_params(
    tensors: dict[str, Tensor], chunks: int, rows: int, first_chunk: int = 0, by_group: bool = False
) -> PartialParams:
    pointers = {name: tensor.pointer for name, tensor in tensors.items()}
    end = first_chunk + chunks
    return PartialParams(
        **pointers, chunks=chunks, rows=rows, first_chunk=first_chunk, end_chunk=end, by_group=by_group
    )
