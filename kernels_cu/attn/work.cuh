// Which chunks of which rows a block computes. A group is the rows of one tile: tile_rows packed rows of a key head.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using KeySequence = Sequence<config::causal, config::ragged, config::paged>;

// Chunks [first_chunk, end_chunk) of a group's `chunks`.
struct Work {
    KeySequence sequence;
    int key_head, first_row;
    int first_chunk, end_chunk, chunks;
    int slot;  // of the workspace
    u32 turn;  // in which the block has it (block_work.cuh)
};

__device__ __forceinline__ i64 warp_sum(i64 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// x / y for x that is not negative: by 32 bits where these do, which saves most of its time.
__device__ __forceinline__ i64 quotient(i64 x, u32 y) { return x >> 32 ? x / y : i64(static_cast<u32>(x) / y); }

// The key tiles of all groups in the order (sequence, key head, row tile, key tile), cut into as many equal ranges as there
// are blocks. A range has the chunks that start in it: which ones is all that depends on the batch.
template <int tile_rows>
class Ranges {
  public:
    __device__ __forceinline__ Ranges(const SplitParams& params, int lane) : params_(params) {
        const int count = params.forward.sequences.count;
        const i64 own = lane < count ? Shape(params, lane).size() : 0;
        i64 sum = own;
        for (int s = lane + 32; s < count; s += 32) sum += Shape(params, s).size();
        total_ = warp_sum(sum);
        place_ = range_start(blockIdx.x);
        end_ = range_start(blockIdx.x + 1);
        // the sequence that place_ is in
        for (int first = 0; place_ < end_ && first < count; first += 32) {
            const i64 size = first == 0 ? own : first + lane < count ? Shape(params, first + lane).size() : 0;
            const i64 together = warp_sum(size);
            if (base_ + together <= place_) {
                base_ += together;
                continue;
            }
            for (sequence_ = first;; ++sequence_) {
                const i64 next = __shfl_sync(0xffffffffu, size, sequence_ - first);
                if (base_ + next > place_) break;
                base_ += next;
            }
            break;
        }
    }

    // The next group's part of the range; false at its end. All threads of a warp call it together.
    __device__ __forceinline__ bool next(Work& work) {
        while (place_ < end_) {
            Shape shape(params_, sequence_);
            while (place_ >= base_ + shape.size()) {
                base_ += shape.size();
                shape = Shape(params_, ++sequence_);
            }
            const int group = static_cast<int>(quotient(place_ - base_, shape.key_tiles));
            const i64 group_place = base_ + i64(group) * shape.key_tiles;
            work.first_chunk = shape.first_chunk_from(static_cast<int>(place_ - group_place));
            work.end_chunk = shape.first_chunk_from(static_cast<int>(min(end_ - group_place, i64(shape.key_tiles))));
            place_ = group_place + shape.key_tiles;
            if (work.first_chunk >= work.end_chunk) continue;
            work.sequence = shape.sequence;
            work.key_head = group / shape.row_tiles;
            work.first_row = group % shape.row_tiles * tile_rows;
            work.chunks = shape.end_chunk;
            work.slot =
                params_.partials.by_group ? sequence_ * shape.heads * shape.row_tiles + group : range_of(group_place);
            return true;
        }
        return false;
    }

  private:
    // The groups of a sequence, and each one's key tiles and chunks: those of all keys, or of the caller's chunks.
    struct Shape {
        KeySequence sequence;
        int heads, row_tiles, first_tile, key_tiles, end_chunk;

        __device__ __forceinline__ Shape(const SplitParams& params, int index)
            : sequence(params.forward, index),
              heads(params.forward.query_heads / params.forward.group),
              first_tile(0),
              key_tiles(max(1, (sequence.key_length + config::key_tile - 1) / config::key_tile)),
              end_chunk(max(1, config::chunk_count(sequence.key_length))) {
            const i64 rows = i64(sequence.query_length) * params.forward.group;
            row_tiles =
                rows <= params.forward.sequences.few_rows ? static_cast<int>((rows + tile_rows - 1) / tile_rows) : 0;
            const Partials& partials = params.partials;
            if (partials.out && !partials.groups) {
                first_tile = config::chunk_start(partials.first_chunk) / config::key_tile;
                end_chunk = partials.end_chunk;
                key_tiles = min(key_tiles, config::chunk_start(end_chunk) / config::key_tile) - first_tile;
            }
        }
        __device__ __forceinline__ i64 size() const { return i64(heads) * row_tiles * key_tiles; }
        // The first chunk that starts at or behind a group's key tile `tile`.
        __device__ __forceinline__ int first_chunk_from(int tile) const {
            return tile >= key_tiles ? end_chunk : config::chunk_count((first_tile + tile) * config::key_tile);
        }
    };

    __device__ __forceinline__ i64 range_start(unsigned range) const { return quotient(range * total_, gridDim.x); }
    // The range that a place is in: the last one that starts at or before it.
    __device__ __forceinline__ int range_of(i64 place) const {
        return static_cast<int>(((place + 1) * gridDim.x - 1) / total_);
    }

    const SplitParams& params_;
    i64 total_, place_, end_;
    int sequence_ = 0;
    i64 base_ = 0;  // the place of the sequence's first key tile
};

}  // namespace cuattn
