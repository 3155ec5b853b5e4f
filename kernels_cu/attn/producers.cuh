// The warps of forward_sm90 that fetch: keys and values into the ring, and queries for each consumer.
#pragma once

#include <attn/block_sm90.cuh>
#include <attn/block_work.cuh>
#include <attn/params.cuh>
#include <attn/query_copies.cuh>
#include <attn/results.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>

namespace cuattn {

template <class Copies>
__device__ __forceinline__ void fill(const ForwardSm90Params& params, const Work& work, const Tiles& tiles,
                                     const RingAddress& ring, At& place, u32& landed_parity) {
    Copies copies(params, work.sequence, work.key_head, ring, place, landed_parity, tiles.first);
    fill_ring<ring_slots>(ring.free, place, tiles.first, tiles.end, copies);
    copies.finish();
}

// Fills the ring for all works of the block, and says which groups of rows go on in other blocks.
__device__ __forceinline__ void produce(const ForwardSm90Params& params, const Start<block_rows>& start,
                                        const RingAddress& ring, int lane) {
    const int group = params.call.forward.group;
    const Partials& partials = params.call.partials;
    const bool leader = split && threadIdx.x == 0 && partials.groups;
    bool told = false;  // about the one group that starts here and ends in a later block
    At place;
    u32 landed_parity = 0;
    for_each_work<block_rows>(
        params, lane, start,
        [&](const Work& work) {
            const Tiles tiles(work, group, work.first_row + block_rows);
            if (!config::paged || (finds_pieces && params.mapped && work.sequence.first_place >= 0)) {
                fill<KeyBoxes>(params, work, tiles, ring, place, landed_parity);
            } else {
                fill<KeyRows>(params, work, tiles, ring, place, landed_parity);
            }
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

// Fetches the queries of consumer `number` for all works of the block. By one warp.
__device__ __forceinline__ void produce_queries(const ForwardSm90Params& params, const Start<block_rows>& start,
                                                SharedMemory& shared, int number, int lane) {
    const u32 query = ptx::shared_address(shared.query[number]);
    const u32 filled = ptx::shared_address(&shared.queries_filled[number]),
              free = ptx::shared_address(&shared.queries_free[number]);
    u32 parity = 0;
    for_each_work<block_rows>(params, lane, start, [&](const Work& work) {
        ptx::mbarrier_wait(free, parity ^ 1);
        parity ^= 1;
        __syncwarp();  // all lanes have seen it, before one of them may begin the next turn
        copy_queries<QueryTile, head_dim, group_rows>(params.call.forward, work, work.first_row + number * group_rows,
                                                      0, query);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(filled);
    });
}

}  // namespace cuattn
