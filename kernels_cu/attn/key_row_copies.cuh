// Copies of key and value tiles into the ring, in panels, row by row: keys may lie anywhere.
#pragma once

#include <attn/params.cuh>
#include <attn/ring.cuh>
#include <attn/row_copies.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>

namespace cuattn {

// By four warps, each of which copies a quarter of a tile's rows: a lane knows the place of one of them.
template <class KeyTile, class ValueTile, int head_dim, int value_dim, int tile_rows, int slot_bytes, int slots,
          class KeySequence>
class RowCopies {
  public:
    static constexpr int threads = 128, arrivals = threads;

    // The first tile is number first_tile, and its place `first`.
    __device__ __forceinline__ RowCopies(const ForwardSm90Params& params, const KeySequence& sequence, int key_head,
                                         const RingAddress& ring, const RingPlace<slots>& first, u32&, int first_tile)
        : params_(params.call.forward),
          sequence_(sequence),
          ring_(ring),
          lane_(threadIdx.x & 31),
          first_row_(threadIdx.x / 32 * warp_rows),
          key_head_(key_head),
          next_page_(page_of_tile(first_tile)),
          announced_(first) {}

    // Keys of tile j come before values of tile j - 1.
    __device__ __forceinline__ void operator()(const RingPlace<slots>& place, bool values, int tile) {
        const u32 to = ring_.slots + place.slot * slot_bytes;
        if (values) {
            copy<ValueTile, value_dim>(to, params_.value, params_.value_strides, tile, value_page_);
            value_page_ = key_page_;
        } else {
            value_page_ = started_ == 0 ? next_page_ : key_page_;
            key_page_ = next_page_;
            next_page_ = page_of_tile(tile + 1);
            copy<KeyTile, head_dim>(to, params_.key, params_.key_strides, tile, key_page_);
        }
        ptx::cp_async_commit();
        if (++started_ > lag) announce<lag>();
    }

    __device__ __forceinline__ void finish() {
        if (started_ == 0) return;
        if (lag > 1) announce<1>();
        if (lag > 0) announce<0>();
    }

  private:
    // Steps under way while the next one's copies start; a slot becomes free only after the step behind its own is filled.
    static constexpr int lag = slots > 3 ? 2 : slots - 2;
    static constexpr int warp_rows = tile_rows / 4;

    __device__ __forceinline__ int key_of(int tile) const { return tile * tile_rows + first_row_ + lane_; }

    // The page of this lane's key, to be asked for some time before its place is needed; anything where there is no such key.
    __device__ __forceinline__ int page_of_tile(int tile) const {
        const int key = key_of(tile);
        return lane_ < warp_rows && key < params_.key_length ? sequence_.page_at(params_.sequences, key) : 0;
    }

    template <class Tile, int columns>
    __device__ __forceinline__ void copy(u32 to, const void* data, const Strides& strides, int tile, int page) const {
        const i64 place = sequence_.offset_in(params_.sequences, strides, key_of(tile), page) / row_unit;
        copy_rows<Tile, columns, warp_rows>(to, first_row_, tile * tile_rows + first_row_, sequence_.key_length,
                                            sequence_.start_of(static_cast<const u16*>(data), strides,
                                                               sequence_.key_batch, key_head_, sequence_.key_start),
                                            static_cast<int>(place));
    }

    // Of the steps that have not been announced, the oldest is filled when at most `pending` newer ones are not.
    template <int pending>
    __device__ __forceinline__ void announce() {
        ptx::cp_async_wait<pending>();
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(ring_.filled + announced_.slot * ptx::mbarrier_bytes);
        announced_ = announced_.next();
    }

    const ForwardParams& params_;
    const KeySequence& sequence_;
    const RingAddress ring_;
    const int lane_, first_row_, key_head_;
    int next_page_, key_page_ = 0, value_page_ = 0;
    int started_ = 0;
    RingPlace<slots> announced_;
};

}  // namespace cuattn
