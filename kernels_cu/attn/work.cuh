// Which chunks of which rows a block computes. A group is the rows of one tile: tile_rows packed rows of a key head.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using KeySequence = Sequence<config::causal, config::ragged, config::paged, config::packed>;

struct Work;

// Which tiles of keys a block passes over for its rows before packed row `end_row`.
struct Tiles {
    int first, end;

    __device__ __forceinline__ Tiles() {}
    __device__ __forceinline__ Tiles(const Work& work, int group, int end_row);
    // Those of which the rows see something.
    __device__ __forceinline__ static int seen(const Work& work, int group, int end_row);
};

// Chunks [first_chunk, end_chunk) of a group's `chunks`.
struct Work {
    KeySequence sequence;
    int key_head, first_row;
    int first_chunk, end_chunk, chunks;
    int slot;     // of the workspace
    u32 turn;     // of many rows: in which the block has it (block_work.cuh)
    Tiles tiles;  // of few rows: of the group's rows
    int folded;   // of a piece: the group's chunks that its first piece has
};

__device__ __forceinline__ Tiles::Tiles(const Work& work, int group, int end_row)
    : first(config::chunk_start(work.first_chunk) / config::key_tile), end(max(first, seen(work, group, end_row))) {
    if (config::split) end = max(first, min(end, config::chunk_start(work.end_chunk) / config::key_tile));
}

__device__ __forceinline__ int Tiles::seen(const Work& work, int group, int end_row) {
    const int last = min(end_row, work.sequence.query_length * group) - 1;
    return (work.sequence.visible_keys(last / group) + config::key_tile - 1) / config::key_tile;
}

// A sequence's entry of key_lengths, if there is any. `rehearses`: it is not read, and the sequence as long as it can be.
__device__ __forceinline__ int length_entry(const ForwardParams& params, int sequence, bool rehearses) {
    const int* const entries = params.sequences.key_lengths;
    return rehearses || !entries ? params.key_length : ptx::load_global_s32(entries + sequence);
}

// The groups of a sequence, and each one's key tiles and chunks: those of all keys, or of the caller's chunks.
template <int tile_rows>
struct Shape {
    KeySequence sequence;
    int row_tiles, first_tile, key_tiles, end_chunk;

    __device__ __forceinline__ Shape(const SplitParams& params, int index, int entry)
        : sequence(params.forward, index, entry),
          first_tile(0),
          key_tiles(max(1, (sequence.key_length + config::key_tile - 1) / config::key_tile)),
          end_chunk(max(1, config::chunk_count(sequence.key_length))) {
        const i64 rows = i64(sequence.query_length) * params.forward.group;
        row_tiles =
            rows <= params.forward.sequences.few_rows ? static_cast<int>((rows + tile_rows - 1) / tile_rows) : 0;
        const Partials& partials = params.partials;
        if (config::partial_results && partials.out && !partials.groups) {
            first_tile = config::chunk_start(partials.first_chunk) / config::key_tile;
            end_chunk = partials.end_chunk;
            key_tiles = min(key_tiles, config::chunk_start(end_chunk) / config::key_tile) - first_tile;
        }
    }
    // The first chunk that starts at or behind a group's key tile `tile`.
    __device__ __forceinline__ int first_chunk_from(int tile) const {
        return tile >= key_tiles ? end_chunk : config::chunk_count((first_tile + tile) * config::key_tile);
    }

    // Its chunks that start in the key tiles [first, end) of group `group`, which is tile `row_tile` of head `key_head`; false if
    // there are none.
    __device__ __forceinline__ bool set(Work& work, int first, int end, int key_head, int row_tile,
                                        int token_rows) const {
        work.first_chunk = first_chunk_from(first);
        work.end_chunk = first_chunk_from(end);
        work.sequence = sequence;
        work.key_head = key_head;
        work.first_row = row_tile * tile_rows;
        work.chunks = end_chunk;
        if (work.first_chunk >= work.end_chunk) return false;
        work.tiles = Tiles(work, token_rows, work.first_row + tile_rows);
        return true;
    }
};

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
