// What the warps of a block of decode_sm90 share: its shape, its shared memory and the barriers in it.
#pragma once

#include <attn/fragments.cuh>
#include <attn/key_copies.cuh>
#include <attn/ring.cuh>
#include <attn/rows.cuh>
#include <attn/tile.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/warpgroup.cuh>

namespace cuattn {

using config::head_dim, config::value_dim, config::tile_dim, config::value_tile_dim, config::key_tile,
    config::row_blocks, config::score_warps, config::value_warps, config::ring_slots;

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(head_dim % 8 == 0 && value_dim % 8 == 0);
static_assert(config::chunk_length(0) % key_tile == 0, "a chunk is a whole number of tiles");
static_assert(key_tile % (16 * score_warps) == 0 && value_tile_dim % (16 * value_warps) == 0);

// Warp 0 fetches, warp 1 adds up the weights, then come those that make weights and those that multiply values.
constexpr int first_score_warp = 2, first_value_warp = first_score_warp + score_warps;
constexpr int threads = (first_value_warp + value_warps) * 32;
constexpr int block_rows = 8 * row_blocks;

using Operands = Fragments<false, config::bfloat16>;
using KeyTile = Tile<tile_dim, 2, key_tile>;
using ValueTile = Tile<value_tile_dim, 2, key_tile>;

constexpr int slot_elements = key_tile * (tile_dim > value_tile_dim ? tile_dim : value_tile_dim);
constexpr int slot_readers = 8;  // arrivals that free a slot
static_assert(slot_readers % score_warps == 0 && slot_readers % value_warps == 0);
using KeyBoxes =
    BoxCopies<KeyTile, ValueTile, key_tile, slot_elements * 2, ring_slots, true, true, 1, KeySequence, config::paged>;

// Numbers from row to row in shared memory. Of rounded weights the 8 rows of an ldmatrix phase lie in 8 different bank groups,
// and every other row of scores in another one.
constexpr int weight_stride = key_tile + 8, score_stride = key_tile + 4;

// A tile's weights, and the row's running maximum with what a new one asks for.
struct TileWeights {
    alignas(16) u16 rounded[block_rows][weight_stride];
    alignas(16) float exact[block_rows][score_stride];
    float reference[block_rows], rescale[block_rows];
};

struct SharedMemory {
    alignas(1024) u16 ring[ring_slots][slot_elements];
    TileWeights weights[2];
    alignas(16) float score[2][block_rows][score_stride];
    float normalisation[block_rows];
    unsigned char start[config::start_bytes];
    u64 filled[ring_slots], free[ring_slots], landed;
};
static_assert(sizeof(SharedMemory) <= config::shared_bytes);

// The slots of either the keys or the values, which take turns, as one warp of `warps` that read them goes through them.
template <int warps>
class Slots {
  public:
    __device__ __forceinline__ Slots(const RingAddress& ring, bool values) : ring_(ring) {
        if (values) place_ = place_.next();
    }

    // The address of the next one, once it is filled.
    __device__ __forceinline__ u32 take() const {
        ptx::mbarrier_wait(ring_.filled + place_.slot * ptx::mbarrier_bytes, place_.parity);
        return ring_.slots + place_.slot * (slot_elements * 2);
    }
    // The warp has read it.
    __device__ __forceinline__ void leave(int lane) {
        __syncwarp();
        if (lane < slot_readers / warps) ptx::mbarrier_arrive(ring_.free + place_.slot * ptx::mbarrier_bytes);
        place_ = place_.next().next();
    }

  private:
    const RingAddress ring_;
    RingPlace<ring_slots> place_;
};

// Named barriers: of the warps that make weights, of those that use them, and of both.
enum Barriers { scores_known = 1, users_met, weights_known };

// The slots of weights, as a warp that makes or uses them goes through them. Both meet once for each tile: weights are made while
// those of the tile before are used.
class WeightSlots {
  public:
    __device__ __forceinline__ explicit WeightSlots(SharedMemory& shared) : shared_(shared) {}

    // Of this warp's next tile.
    __device__ __forceinline__ TileWeights& weights() const { return shared_.weights[slot_]; }
    __device__ __forceinline__ auto& scores() const { return shared_.score[slot_]; }
    __device__ __forceinline__ void next() { slot_ ^= 1; }

    __device__ __forceinline__ static void meet() {
        __syncwarp();  // one lane alone has stored something
        ptx::barrier_sync<(score_warps + value_warps + 1) * 32>(weights_known);
    }

  private:
    SharedMemory& shared_;
    int slot_ = 0;
};

// All warps that use weights.
__device__ __forceinline__ void meet() { ptx::barrier_sync<(1 + value_warps) * 32>(users_met); }

// A row of the tile that there is, else the last one: what such rows compute nobody stores.
__device__ __forceinline__ PackedRow packed_row(const ForwardParams& params, const Work& work, int row) {
    const int last = work.sequence.query_length * params.group - 1;
    return PackedRow(params, work.key_head, min(work.first_row + row, last));
}

// Where the partial result of a chunk of row `row` of the group goes, in rows of the arrays.
__device__ __forceinline__ i64 partial_index(const SplitParams& params, const Work& work, int chunk, int row) {
    return (i64(work.slot) * params.partials.chunks + chunk) * params.partials.rows + row;
}

// Whether the block has all chunks of the rows.
__device__ __forceinline__ bool is_whole(const Work& work) {
    return work.first_chunk == 0 && work.end_chunk == work.chunks;
}

// Goes through the tiles of `work` chunk by chunk: start(), then add(tile) for each tile, then end(chunk, last).
template <class StartChunk, class AddTile, class EndChunk>
__device__ __forceinline__ void for_each_chunk(const Work& work, const StartChunk& start, const AddTile& add,
                                               const EndChunk& end) {
    int tile = work.tiles.first;
#pragma unroll 1
    for (int chunk = work.first_chunk;; ++chunk) {
        start();
        const int chunk_end = min(config::chunk_start(chunk + 1) / key_tile, work.tiles.end);
#pragma unroll 1
        for (; tile < chunk_end; ++tile) add(tile);
        // Chunks of which no row sees anything change nothing in a fold.
        const bool last = chunk + 1 >= work.end_chunk || (work.first_chunk == 0 && tile >= work.tiles.end);
        end(chunk, last);
        if (last) break;
    }
}

}  // namespace cuattn
