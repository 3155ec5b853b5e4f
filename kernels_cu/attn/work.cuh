// Which chunks of which rows a block computes, where several may share them.
#pragma once

#include <attn/groups.cuh>
#include <attn/params.cuh>
#include <common/types.cuh>

namespace cuattn {

// Where `pieces` blocks, one behind the other, share the chunks of a group, and sequences have one tile of rows: this block's
// piece, which has the chunks that start in an equal part of the key tiles; false if there are none.
template <int tile_rows>
__device__ __forceinline__ bool find_piece(const SplitParams& params, int pieces, bool rehearses, Work& work) {
    const ForwardParams& forward = params.forward;
    const u32 group = blockIdx.x / u32(pieces), piece = blockIdx.x - group * pieces;
    const u32 heads = forward.query_heads / forward.group, sequence = group / heads;
    const Shape<tile_rows> shape(params, sequence, length_entry(forward, sequence, rehearses));
    // rounded up: the first piece is never empty
    const auto start = [&](int n) { return static_cast<int>((u32(shape.key_tiles) * n + pieces - 1) / u32(pieces)); };
    work.slot = static_cast<int>(group);
    work.folded = shape.first_chunk_from(start(1));
    return shape.set(work, start(piece), start(piece + 1), group - sequence * heads, 0, forward.group);
}

// The key tiles of all groups in the order (sequence, key head, row tile, key tile), fewer than 2^31, cut into as many equal
// ranges as there are blocks; the first ones may have one more. A range has the chunks that start in it: which ones is all that
// depends on the batch. `rehearses`: lengths are not read, and sequences are as long as they can be.
template <int tile_rows>
class Ranges {
  public:
    // No range.
    __device__ __forceinline__ Ranges() : place_(0), end_(0) {}
    __device__ __forceinline__ Ranges(const SplitParams& params, int lane, bool rehearses = false)
        : heads_(params.forward.query_heads / params.forward.group) {
        const int count = params.forward.sequences.count;
        const auto entry_of = [&](int s) { return length_entry(params.forward, s, rehearses); };
        entry_ = lane < count ? entry_of(lane) : 0;
        const int own = lane < count ? size_of(Groups(params, lane, entry_)) : 0;
        int sum = own;
#pragma unroll 1
        for (int s = lane + 32; s < count; s += 32) sum += size_of(Groups(params, s, entry_of(s)));
        const u32 total = __reduce_add_sync(0xffffffffu, sum);
        least_ = total / gridDim.x;
        longer_ = total % gridDim.x;
        place_ = range_start(blockIdx.x);
        end_ = range_start(blockIdx.x + 1);
        // the sequence that place_ is in
#pragma unroll 1
        for (int first = 0; place_ < end_ && first < count; first += 32) {
            const int s = first + lane, size = first == 0  ? own
                                               : s < count ? size_of(Groups(params, s, entry_of(s)))
                                                           : 0;
            const int together = static_cast<int>(__reduce_add_sync(0xffffffffu, size));
            if (base_ + together <= place_) {
                base_ += together;
                continue;
            }
#pragma unroll 1
            for (sequence_ = first;; ++sequence_) {
                const int next = __shfl_sync(0xffffffffu, size, sequence_ - first);
                if (base_ + next > place_) break;
                base_ += next;
            }
            break;
        }
    }

    // The next group's part of the range; false at its end. All threads of a warp call it together.
    __device__ __forceinline__ bool next(const SplitParams& params, Work& work, bool rehearses = false) {
#pragma unroll 1
        while (place_ < end_) {
            int entry = __shfl_sync(0xffffffffu, entry_, sequence_ & 31);
            if (sequence_ >= 32) entry = length_entry(params.forward, sequence_, rehearses);
            const Groups shape(params, sequence_, entry);
            const int size = size_of(shape);
            if (place_ >= base_ + size) {
                base_ += size;
                ++sequence_;
                continue;
            }
            const int group = static_cast<int>(u32(place_ - base_) / u32(shape.key_tiles));
            const int group_place = base_ + group * shape.key_tiles, first = place_ - group_place;
            const int key_head = static_cast<int>(u32(group) / u32(shape.row_tiles));
            place_ = group_place + shape.key_tiles;
            if (!shape.set(work, first, min(end_ - group_place, shape.key_tiles), key_head,
                           group - key_head * shape.row_tiles, params.forward.group)) {
                continue;
            }
            work.slot = params.partials.by_group ? sequence_ * heads_ * shape.row_tiles + group : range_of(group_place);
            return true;
        }
        return false;
    }

  private:
    using Groups = Shape<tile_rows>;

    // Key tiles of all groups of a sequence.
    __device__ __forceinline__ int size_of(const Groups& shape) const {
        return heads_ * shape.row_tiles * shape.key_tiles;
    }
    __device__ __forceinline__ int range_start(u32 range) const {
        return static_cast<int>(range * least_ + min(range, longer_));
    }
    // The range that a place is in.
    __device__ __forceinline__ int range_of(u32 place) const {
        const u32 first = longer_ * (least_ + 1);  // behind the longer ranges
        return static_cast<int>(place < first ? place / (least_ + 1) : longer_ + (place - first) / least_);
    }

    int heads_;           // that keys have
    int entry_;           // of sequence number `lane`
    u32 least_, longer_;  // key tiles of a range; ranges that have one more
    int place_, end_;
    int sequence_ = 0;
    int base_ = 0;  // the place of the sequence's first key tile
};

}  // namespace cuattn
