// Copies of packed query rows to a tile for wgmma.
#pragma once

#include <attn/params.cuh>
#include <attn/row_copies.cuh>
#include <attn/rows.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>

namespace cuattn {

// By one warp: `rows` rows, from number `first` of the tile on, whose first row is packed row `tile_row` of the sequence,
// which may be negative.
template <class Tile, int head_dim, int rows>
__device__ __forceinline__ void copy_queries(const ForwardParams& params, const Work& work, int tile_row, int first,
                                             u32 to) {
    constexpr int together = rows < 32 ? rows : 32;
    const KeySequence& sequence = work.sequence;
#pragma unroll 1
    for (int row = first; row < first + rows; row += together) {
        const PackedRow packed(params, work.key_head, tile_row + row + (threadIdx.x & 31));
        const i64 place = packed.offset(params.query_strides, sequence.query_batch, sequence.query_start) / row_unit;
        copy_rows<Tile, head_dim, together>(to, row, tile_row + row, sequence.query_length * params.group,
                                            static_cast<const u16*>(params.query), static_cast<int>(place));
    }
}

}  // namespace cuattn
