// Compaction: where in a list of the elements that count each of them goes. A block passes over the elements in tiles. A
// warp has per_lane times 32 neighbouring ones and votes on 32 at a time; what stands before its own it learns from the
// counts of all warps.
#pragma once

#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

template <int warps, int per_lane>
struct Compaction {
    static_assert(warps <= 32, "each lane adds up the count of one warp");

    // A base class of a block's shared memory; two counts in turn, so that a tile's may be written while the last tile's
    // are read.
    struct Counts {
        u32 counts[2][warps];
    };

    // Calls put(i, place, counts) for each element i < length: `place` of those before it count. Returns how many count.
    // All threads of the block call it together.
    template <class Counting, class Put>
    __device__ __forceinline__ static int run(int length, Counts& shared, const Counting& counts, const Put& put) {
        constexpr u32 all_lanes = 0xffffffffu;
        const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
        int before = 0;  // of earlier tiles
        int buffer = 0;
        for (int tile = 0; tile < length; tile += warps * 32 * per_lane, buffer ^= 1) {
            const int first = tile + warp * 32 * per_lane + lane;
            bool mine[per_lane];
#pragma unroll
            for (int i = 0; i < per_lane; ++i) mine[i] = first + 32 * i < length && counts(first + 32 * i);
            u32 votes[per_lane], count = 0;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                votes[i] = __ballot_sync(all_lanes, mine[i]);
                count += __popc(votes[i]);
            }
            if (lane == 0) ptx::store_shared_u32(ptx::shared_address(&shared.counts[buffer][warp]), count);
            __syncthreads();
            const u32 counted =
                lane < warps ? ptx::load_shared_u32(ptx::shared_address(&shared.counts[buffer][0]) + 4 * lane) : 0;
            int place = before + static_cast<int>(__reduce_add_sync(all_lanes, lane < warp ? counted : 0));
            before += static_cast<int>(__reduce_add_sync(all_lanes, counted));
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                const int element = first + 32 * i;
                if (element < length) put(element, place + __popc(votes[i] & ((1u << lane) - 1)), mine[i]);
                place += __popc(votes[i]);
            }
        }
        return before;
    }
};

}  // namespace cuattn
