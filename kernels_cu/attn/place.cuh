// Where a block works: which query rows of which head of which sequence.
#pragma once

#include <attn/params.cuh>
#include <attn/search.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// Which of `count` sequences, packed at `starts`, tile `tile` belongs to; tiles have tile_rows rows, tokens `token_rows`.
// Sequence s gets the tiles from starts[s] token_rows / tile_rows + s on: at least as many as it needs, known without a pass
// over the lengths before it.
template <int tile_rows>
__device__ __forceinline__ int find_sequence(const int* starts, int count, int tile, int token_rows, int lane) {
    return last_sequence(
        count, lane, [&](int s) { return i64(ptx::load_global_s32(starts + s)) * token_rows / tile_rows + s <= tile; });
}

// Blocks run (batch, head, tile), tile fastest, the longest causal rows first: the block scheduler fills the tail with
// short ones. Heads are `heads`; a token has token_rows rows in tiles of tile_rows rows; `block` counts the tiles of all.
template <int tile_rows, bool causal, bool ragged, bool paged>
struct Place : Sequence<causal, ragged, paged> {
    using Base = Sequence<causal, ragged, paged>;

    int first_row, head;  // of the sequence

    __device__ __forceinline__ Place(const ForwardParams& params, int heads, int token_rows, int lane,
                                     u32 block = blockIdx.x)
        : Place(params, params.query_tiles - 1 - static_cast<int>(block % params.query_tiles),
                block / params.query_tiles, heads, token_rows, lane) {}

    // False for the tiles that a packed sequence does not need, and for those of wrong cumulative lengths.
    __device__ __forceinline__ bool has_rows(int token_rows) const {
        return first_row >= 0 && first_row < this->query_length * token_rows;
    }

  private:
    __device__ __forceinline__ Place(const ForwardParams& params, int tile, u32 item, u32 heads, int token_rows,
                                     int lane)
        : Base(params, ragged && params.sequences.query_starts
                           ? find_sequence<tile_rows>(params.sequences.query_starts, params.sequences.count, tile,
                                                      token_rows, lane)
                           : static_cast<int>(item / heads)),
          head(static_cast<int>(item % heads)) {
        if (ragged && params.sequences.query_starts) {
            tile -= static_cast<int>(i64(this->query_start) * token_rows / tile_rows) + this->index;
        }
        first_row = tile * tile_rows;
    }
};

}  // namespace cuattn
