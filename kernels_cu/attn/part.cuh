// A block's rows, and its part of their chunks, where several blocks may share them.
#pragma once

#include <attn/params.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>

namespace cuattn {

// Tiles that rows of the block before `row` see.
template <class BlockPlace>
__device__ __forceinline__ int tiles_until(const BlockPlace& place, int group, int row) {
    const int last = min(row, place.query_length * group) - 1;
    return (place.visible_keys(last / group) + config::key_tile - 1) / config::key_tile;
}

// Blocks of the same rows follow each other.
template <class BlockPlace>
__device__ __forceinline__ BlockPlace block_place(const SplitParams& params, int pieces, int lane) {
    const ForwardParams& forward = params.forward;
    const u32 block = config::split ? blockIdx.x / pieces : blockIdx.x;
    return BlockPlace(forward, forward.query_heads / forward.group, forward.group, lane, block);
}

// What a block computes of its rows: tiles [first_tile, end_tile), and of the rows' `chunks` chunks [first_chunk, end_chunk).
struct Part {
    int first_tile, end_tile;
    int first_chunk, end_chunk, chunks;

    // Number `piece` of the parts of equal numbers of tiles, each with the chunks that start in it, and the first one with
    // the first chunk. The last keys' chunk may be cut off by the end of what rows see.
    __device__ __forceinline__ Part(int tiles, int piece, int pieces)
        : first_tile(0), end_tile(tiles), first_chunk(0), end_chunk(1), chunks(1) {
        if constexpr (config::split) {
            const auto start = [&](int piece) {
                return config::chunk_count(static_cast<int>(i64(tiles) * piece / pieces) * config::key_tile);
            };
            chunks = max(1, config::chunk_count(tiles * config::key_tile));
            first_chunk = piece == 0 ? 0 : max(1, start(piece));
            end_chunk = piece + 1 == pieces ? chunks : max(1, start(piece + 1));
            first_tile = config::chunk_start(first_chunk) / config::key_tile;
            end_tile = min(tiles, config::chunk_start(end_chunk) / config::key_tile);
        }
    }
    __device__ __forceinline__ bool is_whole() const { return !config::split || end_chunk - first_chunk == chunks; }
};

// The same as results.cuh has it. A group's place in the workspace is its number. A template, since only places of ragged
// batches are sequences of keys.
template <class RaggedPlace>
__device__ __forceinline__ Work work_of(const RaggedPlace& place, const Part& part, int pieces) {
    Work work;
    work.sequence = place;
    work.key_head = place.head;
    work.first_row = place.first_row;
    work.first_chunk = part.first_chunk;
    work.end_chunk = part.end_chunk;
    work.chunks = part.chunks;
    work.slot = static_cast<int>(blockIdx.x / pieces);
    return work;
}

}  // namespace cuattn
