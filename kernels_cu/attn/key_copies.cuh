// Copies of key and value tiles into the ring, in panels: boxes by the copy engine, of keys that lie a fixed distance apart or
// in pages.
#pragma once

#include <attn/params.cuh>
#include <attn/ring.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>

namespace cuattn {

// By the copy engine, to which one thread speaks. `once`: no other block reads the same keys. `copiers`: all threads of these
// warps run it and arrive at each slot, or 1: only the one that speaks does, and one warp runs it. `pages`: boxes have box_rows
// keys and lie in pages, each one in one of them; the lanes of the warp speak for one each.
template <class KeyTile, class ValueTile, int tile_rows, int slot_bytes, int slots, bool ragged, bool once, int copiers,
          class KeySequence, bool pages = false>
class BoxCopies {
    static_assert(!pages || copiers == 1);

  public:
    static constexpr int threads = 32, arrivals = copiers;

    __device__ __forceinline__ BoxCopies(const ForwardSm90Params& params, const KeySequence& sequence, int key_head,
                                         const RingAddress& ring, const RingPlace<slots>&, u32& landed_parity,
                                         int first_tile)
        : params_(params),
          sequence_(sequence),
          key_head_(key_head),
          ring_(ring),
          landed_parity_(landed_parity),
          lane_(threadIdx.x & 31),
          next_page_(pages ? page_of_tile(first_tile) : 0) {}

    // Asks for what copies will need soon. By one thread.
    __device__ __forceinline__ static void prepare(const ForwardSm90Params& params) {
        ptx::tma_prefetch(params.key_map);
        ptx::tma_prefetch(params.value_map);
    }

    // With pages keys of a tile come before its values, both before those of the next one.
    __device__ __forceinline__ void operator()(const RingPlace<slots>& place, bool values, int tile) {
        const u32 to = ring_.slots + place.slot * slot_bytes, filled = ring_.filled + place.slot * ptx::mbarrier_bytes;
        if (pages && !values) {
            page_ = next_page_;
            next_page_ = page_of_tile(tile + 1);
        }
        const int valid = sequence_.key_length - tile * tile_rows;
        if (ragged && values && valid < tile_rows) {
            // What lies behind the sequence's last value may be anything, and a weight of +0 does not make it nothing.
            if (threadIdx.x < 32) {
                copy(ring_.landed, to, true, tile);
                ptx::mbarrier_wait(ring_.landed, landed_parity_);
                landed_parity_ ^= 1;
                clear_rows(to, valid);
                ptx::fence_async_proxy();
                __syncwarp();
            }
            if (copiers > 1 || threadIdx.x == 0) ptx::mbarrier_arrive(filled);
        } else {
            copy(filled, to, values, tile);
            if (copiers > 1 && threadIdx.x > 0) ptx::mbarrier_arrive(filled);
        }
    }

    __device__ __forceinline__ void finish() const {}

  private:
    __device__ __forceinline__ void copy(u32 barrier, u32 to, bool values, int tile) const {
        if (!pages && threadIdx.x != 0) return;
        if (values) {
            copy_panels<ValueTile>(barrier, to, params_.value_map, tile);
        } else {
            copy_panels<KeyTile>(barrier, to, params_.key_map, tile);
        }
    }

    template <class Tile>
    __device__ __forceinline__ void copy_panels(u32 barrier, u32 to, const TensorMap& map, int tile) const {
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(barrier, tile_rows * Tile::row_bytes);
        int first = 0;
        int row = sequence_.key_start + tile * tile_rows + (KeySequence::by_tables ? sequence_.first_place : 0);
        int batch = sequence_.key_batch;
        if constexpr (pages) {
            __syncwarp();  // bytes are expected before they come
            first = lane_ * params_.box_rows;
            if (first >= tile_rows) return;
            row = KeySequence::row_in_page(params_.call.forward.sequences, tile * tile_rows + first);
            batch = page_;
        }
#pragma unroll
        for (int unit = 0; unit < Tile::units; unit += 8) {
            ptx::tma_load_4d<once>(to + Tile::offset(first, unit), map, unit * 8, row, key_head_, batch, barrier);
        }
    }

    // The page of this lane's box; where there are no such keys one that does not exist, of which the engine makes zeros.
    __device__ __forceinline__ int page_of_tile(int tile) const {
        const Sequences& sequences = params_.call.forward.sequences;
        const int key = tile * tile_rows + lane_ * params_.box_rows;
        return key < sequence_.key_length ? sequence_.page_at(sequences, key) : sequences.page_count;
    }

    // Zeros from row `first` on.
    __device__ __forceinline__ void clear_rows(u32 to, int first) const {
#pragma unroll 1
        for (int i = first * ValueTile::units + lane_; i < tile_rows * ValueTile::units; i += 32) {
            ptx::store_shared_f32x4(to + ValueTile::offset(i / ValueTile::units, i % ValueTile::units),
                                    make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        }
    }

    const ForwardSm90Params& params_;
    const KeySequence& sequence_;
    const int key_head_;
    const RingAddress ring_;
    u32& landed_parity_;
    const int lane_;
    int next_page_, page_ = 0;  // of this lane's box
};

}  // namespace cuattn
