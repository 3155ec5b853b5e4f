// What a block of Hopper's kernels computes. For few rows any range of the chunks of any rows (work.cuh); for many rows some of
// the items: a tile of rows with all of their chunks or, where blocks share a tile, a piece of them.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/grid.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

constexpr int first_row_unit = 16;  // first rows of tiles are multiples of a warp's rows

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
        // The last tile is full, to first_row_unit, rather than the first one, which has the fewest keys.
        const int rows = place.query_length * group, missing = (rows + tile_rows - 1) / tile_rows * tile_rows - rows;
        work.first_row -= missing / first_row_unit * first_row_unit;
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
    // Waits for earlier launches, too.
    __device__ __forceinline__ void find(const ForwardSm90Params&, int) { ptx::wait_for_earlier_launches(); }
};
template <int tile_rows>
struct Start<tile_rows, true> {
    Ranges<tile_rows> ranges;
    Work work;
    int any;

    // Where no lengths of queries are to be read, a rehearsal comes before the wait: then the instructions are at hand, which
    // takes longer than the work itself.
    __device__ __forceinline__ void find(const ForwardSm90Params& params, int lane) {
#pragma unroll 1
        for (int rehearses = !config::packed; rehearses >= 0; --rehearses) {
            if (!rehearses) ptx::wait_for_earlier_launches();
            if (!config::packed && params.pieces > 0) {
                any = find_piece<tile_rows>(params.call, params.pieces, rehearses, work);
            } else {
                ranges = Ranges<tile_rows>(params.call, lane, rehearses);
                any = ranges.next(params.call, work, rehearses);
            }
        }
    }

    // Between warps, word by word: what each lane has, in sizeof(Start) * 32 bytes of shared memory.
    __device__ __forceinline__ void store(u32 to, int lane) const {
        u32 word[sizeof(Start) / 4];
        memcpy(word, this, sizeof word);
#pragma unroll
        for (int i = 0; i < sizeof word / 4; ++i) ptx::store_shared_u32(to + (i * 32 + lane) * 4, word[i]);
    }
    __device__ __forceinline__ void load(u32 from, int lane) {
        u32 word[sizeof(Start) / 4];
#pragma unroll
        for (int i = 0; i < sizeof word / 4; ++i) word[i] = ptx::load_shared_u32(from + (i * 32 + lane) * 4);
        memcpy(this, word, sizeof word);
    }
};

// Calls attend(work) for all that this block computes, and pass(item) for items in which there is nothing to do.
template <int tile_rows, class Attend, class Pass>
__device__ __forceinline__ void for_each_work(const ForwardSm90Params& params, int lane, const Start<tile_rows>& start,
                                              const Attend& attend, const Pass& pass) {
    if constexpr (config::few) {
        Ranges<tile_rows> ranges = start.ranges;
        Work work = start.work;
#pragma unroll 1
        for (bool more = start.any; more; more = ranges.next(params.call, work)) attend(work);
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
