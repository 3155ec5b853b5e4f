"""How the backward pass of a call is spread over the device. Nothing here can change a bit."""

from dataclasses import replace

import numpy as np

from cuattn import config as configs
from cuattn.attend import Attend
from cuattn.config import KernelConfig
from cuattn.config.backward import RECORD_BYTES
from cuattn.interop import Tensor
from cuattn.launches import LARGEST_GRID, Allocate, Launch, Target, strides_of
from cuattn.params import BackwardParams
from cuattn.problem import Gradients, Problem, Upstream
from cuattn.schedule import plan_scan


def plan_backward(
    problem: Problem, upstream: Upstream, gradients: Gradients, target: Target, allocate: Allocate
) -> list[Launch]:
    """The records of all rows, the list of those that contribute, the gradients of keys and values, those of queries.

    ``problem`` has no new keys, no block table and no num_splits.
    """
    launches: list[Launch] = []
    tables: dict[str, Tensor] = {}
    if problem.key_padding_mask:
        scan = plan_scan(problem.key_padding_mask, target, allocate)
        launches.append(scan)
        tables = scan.scratch
    attend = Attend(problem, upstream.out, upstream.lse, target, tables)
    p, shape = problem, (problem.head_dim, problem.value_dim, problem.query.dtype, target.arch)
    keys, queries = configs.KeysConfig(*shape), configs.QueriesConfig(*shape, paged=bool(tables))
    heads, count = p.query_heads, attend.params.sequences.count
    rows = p.batch * heads * p.query_length
    words = RECORD_BYTES // 4
    scratch = {
        "rows": allocate((max(1, rows), words), "int32"),
        "contributing": allocate((max(1, rows), words), "int32"),
        "counts": allocate((max(1, count * heads),), "int32"),
    }
    key_tiles = -(-p.key_length // keys.key_tile)
    if attend.packed:
        key_tiles = p.key_length // keys.key_tile + count
    attend.params.query_tiles = attend.tiles_of(queries.query_tile, 1)
    params = BackwardParams(
        forward=attend.params,
        dout=upstream.dout.pointer,
        dlse=upstream.dlse.pointer if upstream.dlse else None,
        dquery=gradients.query.pointer,
        dkey=gradients.key.pointer,
        dvalue=gradients.value.pointer,
        dout_strides=strides_of(upstream.dout),
        dquery_strides=strides_of(gradients.query),
        dkey_strides=strides_of(gradients.key),
        dvalue_strides=strides_of(gradients.value),
        **{name: tensor.pointer for name, tensor in scratch.items()},
        row_count=rows,
        key_heads=p.key_heads,
        key_tiles=key_tiles,
        scale=float(np.float32(p.scale)),
    )
    inputs = {"q": p.query, "k": p.key, "v": p.value, **upstream.arrays}
    if p.sequences:
        inputs |= p.sequences.arrays
    rows_config = configs.RowsConfig(p.value_dim, p.mask, p.query.dtype, target.arch)
    planned: list[tuple[KernelConfig, int, dict[str, Tensor]]] = [
        (rows_config, -(-rows // rows_config.block_rows), {}),
        (configs.CompactConfig(target.arch), count * heads, {}),
        (keys, p.batch * p.key_heads * key_tiles, {"dk": gradients.key, "dv": gradients.value}),
        (queries, p.batch * heads * attend.params.query_tiles, {"dq": gradients.query}),
    ]
    everything = Launch(rows_config, 0, params, inputs, scratch={**tables, **scratch})
    for config, grid, outputs in planned:
        if grid > LARGEST_GRID:
            raise ValueError(f"q: got work for {grid} blocks of {config.kernel}, expected at most {LARGEST_GRID}")
        if grid:
            launches.append(replace(everything, config=config, grid=grid, outputs=outputs))
    return launches
