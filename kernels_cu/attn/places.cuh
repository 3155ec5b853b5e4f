// Where the rows of keys and values lie: a fixed distance apart, or, paged, in tables that a block keeps of two or more
// tiles in shared memory, so that every place is looked up once and not by each thread that copies a part of it.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// Distances from the head's first row, in units of 16 bytes, up to 32 GiB, of each key of `tiles` tiles. A base class of a block's
// shared memory, so that it takes no room where keys are not paged.
template <bool paged, int tiles, int key_tile>
struct SharedPlaces {
    alignas(1024) int key[tiles][key_tile];
    int value[tiles][key_tile];
};
template <int tiles, int key_tile>
struct SharedPlaces<false, tiles, key_tile> {};

// The rows of one head, which starts at `key` and `value`. Tables are filled at least one barrier before they are read.
template <class Element, bool paged, class KeySequence, int tiles, int key_tile>
class KeyRows {
  public:
    using Tables = SharedPlaces<paged, tiles, key_tile>;

    __device__ __forceinline__ KeyRows(const ForwardParams& params, const KeySequence& sequence, int key_head,
                                       Tables& tables)
        : params_(params),
          sequence_(sequence),
          key_(start(params.key, params.key_strides, key_head)),
          value_(start(params.value, params.value_strides, key_head)),
          tables_(ptx::shared_address(&tables)) {}

    // The page of this thread's key of tile `tile`, to be asked for some time before `fill` needs it; of any number where
    // there is no such key. The table's length is the bound, for the number of keys may be on its way from memory.
    __device__ __forceinline__ int look_up(int tile) const {
        const int key = tile * key_tile + threadIdx.x;
        if (!paged || threadIdx.x >= key_tile || key >= params_.key_length) return 0;
        return sequence_.page_at(params_.sequences, key);
    }

    // Writes down where the keys of tile `tile` lie, of which each thread knows one's page.
    __device__ __forceinline__ void fill(int tile, int page) const {
        if (!paged || threadIdx.x >= key_tile) return;
        const int key = tile * key_tile + threadIdx.x;
        const auto units = [&](const Strides& strides) {
            return static_cast<int>(sequence_.offset_in(params_.sequences, strides, key, page) / unit);
        };
        const u32 to = tables_ + (tile % tiles * key_tile + threadIdx.x) * 4;
        ptx::store_shared_u32(to, units(params_.key_strides));
        ptx::store_shared_u32(to + tiles * key_tile * 4, units(params_.value_strides));
    }

    // Copies `rows` keys, or values, from number `first` of tile `tile` on into a tile in shared memory.
    template <class Tile, int columns, int rows, int threads>
    __device__ __forceinline__ void load(u32 to, bool values, int tile, int first) const {
        const Element* const head = values ? value_ : key_;
        const int start = tile * key_tile + first, existing = sequence_.key_length - start;
        bool looked_up = paged;
        if constexpr (paged) looked_up = sequence_.first_place < 0;
        if (looked_up) {
            const u32 places = tables_ + ((values ? tiles : 0) + tile % tiles) * (key_tile * 4) + first * 4;
            Tile::template load<columns, rows, threads>(
                to, existing, threadIdx.x, [&](int row) { return ptx::load_shared_u32(places + row * 4); },
                [&](u32 place) { return head + static_cast<i64>(static_cast<int>(place)) * unit; });
        } else {
            const i64 stride = values ? params_.value_strides.token : params_.key_strides.token;
            const Element* const from = head + (start + (paged ? sequence_.first_place : 0)) * stride;
            Tile::template load<columns, rows, threads>(to, existing, threadIdx.x,
                                                        [&](int row) { return from + row * stride; });
        }
    }

  private:
    static constexpr int unit = 16 / sizeof(Element);  // elements

    __device__ __forceinline__ const Element* start(const void* data, const Strides& strides, int key_head) const {
        return sequence_.start_of(static_cast<const Element*>(data), strides, sequence_.key_batch, key_head) +
               (paged ? 0 : sequence_.key_start * strides.token);
    }

    const ForwardParams& params_;
    const KeySequence& sequence_;
    const Element *key_, *value_;
    u32 tables_;
};

}  // namespace cuattn
