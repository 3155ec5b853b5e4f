// Which chunks of which rows a block computes. A group is the rows of one tile: tile_rows packed rows of a key head.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using KeySequence = Sequence<config::causal, true, true>;

// Chunks [first_chunk, end_chunk) of a group's `chunks`.
struct Work {
    KeySequence sequence;
    int key_head, first_row;
    int first_chunk, end_chunk, chunks;
    int slot;  // of the workspace
};

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// The chunks of all groups in the order (sequence, key head, tile, chunk), cut into as many equal ranges as there are
// blocks. Which chunks a range holds is all that depends on the batch.
template <int tile_rows>
class Ranges {
  public:
    __device__ __forceinline__ Ranges(const ColumnsParams& params, int lane) : params_(params) {
        const int count = params.forward.sequences.count;
        int sum = 0;
        for (int s = lane; s < count; s += 32) sum += Shape(params, s).items();
        total_ = warp_sum(sum);
        item_ = range_start(blockIdx.x);
        end_ = range_start(blockIdx.x + 1);
        // the first sequence with items behind item_
        for (int first = 0; item_ < end_ && first < count; first += 32) {
            const int items = first + lane < count ? Shape(params, first + lane).items() : 0;
            const int together = warp_sum(items);
            if (base_ + together <= item_) {
                base_ += together;
                continue;
            }
            for (sequence_ = first;; ++sequence_) {
                const int next = __shfl_sync(0xffffffffu, items, sequence_ - first);
                if (base_ + next > item_) break;
                base_ += next;
            }
            break;
        }
    }

    // The next group's part of the range; false at its end. All threads of a warp call it together.
    __device__ __forceinline__ bool next(Work& work) {
        if (item_ >= end_) return false;
        Shape shape(params_, sequence_);
        while (item_ >= base_ + shape.items()) {
            base_ += shape.items();
            shape = Shape(params_, ++sequence_);
        }
        const int group = (item_ - base_) / shape.chunks, group_item = base_ + group * shape.chunks;
        work.sequence = shape.sequence;
        work.key_head = group / shape.tiles;
        work.first_row = group % shape.tiles * tile_rows;
        work.chunks = shape.chunks;
        work.first_chunk = item_ - group_item;
        work.end_chunk = min(shape.chunks, work.first_chunk + (end_ - item_));
        work.slot = params_.partials.by_group ? sequence_ * shape.heads * shape.tiles + group : range_of(group_item);
        item_ += work.end_chunk - work.first_chunk;
        return true;
    }

  private:
    // The groups of a sequence and the chunks of each.
    struct Shape {
        KeySequence sequence;
        int heads, tiles, chunks;

        __device__ __forceinline__ Shape(const ColumnsParams& params, int index)
            : sequence(params.forward, index), heads(params.forward.query_heads / params.forward.group) {
            const i64 rows = i64(sequence.query_length) * params.forward.group;
            const Partials& partials = params.partials;
            tiles =
                rows <= params.forward.sequences.few_rows ? static_cast<int>((rows + tile_rows - 1) / tile_rows) : 0;
            const bool to_caller = partials.out && !partials.groups;
            chunks = to_caller ? partials.chunks : max(1, config::chunk_count(sequence.key_length));
        }
        __device__ __forceinline__ int items() const { return heads * tiles * chunks; }
    };

    __device__ __forceinline__ int range_start(unsigned range) const {
        return static_cast<int>(i64(range) * total_ / gridDim.x);
    }
    // The range that holds an item: the last one that starts at or before it.
    __device__ __forceinline__ int range_of(int item) const {
        return static_cast<int>(((i64(item) + 1) * gridDim.x - 1) / total_);
    }

    const ColumnsParams& params_;
    int total_, item_, end_;
    int sequence_ = 0, base_ = 0;  // base_: items of the sequences before
};

}  // namespace cuattn
