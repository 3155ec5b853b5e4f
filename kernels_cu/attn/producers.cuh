// The warps that fetch keys and values into the ring.
#pragma once

#include <attn/block_work.cuh>
#include <attn/params.cuh>
#include <attn/results.cuh>
#include <attn/ring.cuh>
#include <common/types.cuh>

namespace cuattn {

// Fills the ring with the tiles of `work`.
template <class Copies, bool keys_ahead = true, int slots>
__device__ __forceinline__ void fill(const ForwardSm90Params& params, const Work& work, const Tiles& tiles,
                                     const RingAddress& ring, RingPlace<slots>& place, u32& landed_parity) {
    Copies copies(params, work.sequence, work.key_head, ring, place, landed_parity, tiles.first);
    fill_ring<slots, keys_ahead>(ring.free, place, tiles.first, tiles.end, copies);
    copies.finish();
}

// Calls fill_tiles(work, tiles) for all works of the block, and says which groups of rows go on in other blocks.
template <int block_rows, class FillTiles>
__device__ __forceinline__ void produce(const ForwardSm90Params& params, const Start<block_rows>& start, int lane,
                                        const FillTiles& fill_tiles) {
    const Partials& partials = params.call.partials;
    const bool leader = config::split && threadIdx.x == 0 && partials.groups;
    bool told = false;  // about the one group that starts here and ends in a later block
    for_each_work<block_rows>(
        params, lane, start,
        [&](const Work& work) {
            fill_tiles(work,
                       config::few ? work.tiles : Tiles(work, params.call.forward.group, work.first_row + block_rows));
            const bool goes_on = work.first_chunk == 0 && work.end_chunk < work.chunks;
            if (leader && (goes_on || (partials.by_group && work.first_chunk == 0))) {
                store_group(params.call, work, work.slot, block_rows, work.end_chunk, goes_on ? work.chunks : 0);
                told = true;
            }
        },
        [&](u32 item) {
            if (leader && item % params.pieces == 0) {
                store_group(params.call, Work{}, static_cast<int>(item / params.pieces), block_rows, 0, 0);
            }
        });
    if (config::few && leader && !told && !partials.by_group) {
        store_group(params.call, Work{}, blockIdx.x, block_rows, 0, 0);
    }
}

}  // namespace cuattn
