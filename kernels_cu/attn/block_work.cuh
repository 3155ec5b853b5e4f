// What a block of forward_sm90 computes. For few rows any range of the chunks of any rows (work.cuh); for many rows some of
// the items: a tile of rows with all of their chunks or, where blocks share a tile, a piece of them.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>

namespace cuattn {

// Which tiles of keys a block passes over for its rows before packed row `end_row`.
struct Tiles {
    int first, end;

    __device__ __forceinline__ Tiles(const Work& work, int group, int end_row)
        : first(config::chunk_start(work.first_chunk) / config::key_tile), end(max(first, seen(work, group, end_row))) {
        if (config::split) end = max(first, min(end, config::chunk_start(work.end_chunk) / config::key_tile));
    }

    // Those of which the rows see something.
    __device__ __forceinline__ static int seen(const Work& work, int group, int end_row) {
        const int last = min(end_row, work.sequence.query_length * group) - 1;
        return (work.sequence.visible_keys(last / group) + config::key_tile - 1) / config::key_tile;
    }
};

// The block's item in a turn; where blocks share tiles each has one. Blocks go through the items forth and back: long rows
// and short ones, of which the first are long, even out.
__device__ __forceinline__ u32 item_of(u32 turn) {
    return turn * gridDim.x + (turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// The block's item in turn `turn`, of tiles of tile_rows rows; false if there are no such rows, or no chunks in it.
template <int tile_rows>
__device__ __forceinline__ bool tile_work(const ForwardParams& params, int pieces, u32 turn, int lane, Work& work) {
    const int group = params.group;
    const u32 item = item_of(turn);
    const u32 tile = config::split ? item / pieces : item;
    const Place<tile_rows, config::causal, config::ragged, config::paged> place(params, params.query_heads / group,
                                                                                group, lane, tile);
    work.sequence = place;
    work.key_head = place.head;
    work.first_row = place.first_row;
    work.slot = static_cast<int>(tile);
    work.turn = turn;
    work.first_chunk = 0;
    work.chunks = work.end_chunk = max(1, config::chunk_count(place.key_length));
    if (config::ragged && (!place.has_rows(group) || i64(place.query_length) * group <= params.sequences.few_rows)) {
        return false;
    }
    if constexpr (config::causal && !config::split) {
        // The last tile is full rather than the first one, which has the fewest keys.
        const int rows = place.query_length * group;
        work.first_row -= (rows + tile_rows - 1) / tile_rows * tile_rows - rows;
    }
    if constexpr (config::split) {
        // Pieces of equal numbers of tiles: each has the chunks that start in it, and the first one has the first chunk.
        const int tiles = Tiles::seen(work, group, place.first_row + tile_rows);
        const int piece = static_cast<int>(item % pieces);
        const auto start = [&](int number) {
            return max(1, config::chunk_count(static_cast<int>(i64(tiles) * number / pieces) * config::key_tile));
        };
        work.chunks = max(1, config::chunk_count(tiles * config::key_tile));
        work.first_chunk = piece == 0 ? 0 : start(piece);
        work.end_chunk = piece + 1 == pieces ? work.chunks : start(piece + 1);
        return work.first_chunk < work.end_chunk;
    }
    return true;
}

// What a block's warps find out together, before each goes its own way: one after the other they would wait for the same
// instructions and lengths. Of few rows that is the first work.
template <int tile_rows, bool few = config::few>
struct Start {
    __device__ __forceinline__ Start(const ForwardSm90Params&, int) {}
};
template <int tile_rows>
struct Start<tile_rows, true> {
    Ranges<tile_rows> ranges;
    Work work;
    bool any;

    __device__ __forceinline__ Start(const ForwardSm90Params& params, int lane)
        : ranges(params.call, lane), any(ranges.next(work)) {}
};

// Calls attend(work) for all that this block computes, and pass(item) for items in which there is nothing to do.
template <int tile_rows, class Attend, class Pass>
__device__ __forceinline__ void for_each_work(const ForwardSm90Params& params, int lane, const Start<tile_rows>& start,
                                              const Attend& attend, const Pass& pass) {
    if constexpr (config::few) {
        Ranges<tile_rows> ranges = start.ranges;
        Work work = start.work;
#pragma unroll 1
        for (bool more = start.any; more; more = ranges.next(work)) attend(work);
    } else {
        Work work;
        u32 turn = 0;
        do {
            if (tile_work<tile_rows>(params.call.forward, params.pieces, turn, lane, work)) {
                attend(work);
            } else {
                pass(item_of(turn));
            }
        } while (!config::split && item_of(++turn) < u32(params.items));
    }
}

template <int tile_rows, class Attend>
__device__ __forceinline__ void for_each_work(const ForwardSm90Params& params, int lane, const Start<tile_rows>& start,
                                              const Attend& attend) {
    for_each_work<tile_rows>(params, lane, start, attend, [](u32) {});
}

}  // namespace cuattn
