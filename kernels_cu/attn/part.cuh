// A block's part of the chunks of its rows, where several blocks may share them.
#pragma once

#include <common/types.cuh>

namespace cuattn {

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

}  // namespace cuattn
