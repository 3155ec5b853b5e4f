// A key padding mask as tables of places: one block for each batch entry. The including unit defines namespace
// cuattn::config with the constants of one ScanConfig (cuattn/jit/unit.py).
//
// The block passes over the keys in tiles. A warp has keys_per_lane times 32 neighbouring keys of a tile and votes on 32
// at a time; what stands before its keys it learns from the counts of all warps.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::threads;

constexpr int keys_per_lane = 4;
constexpr int warps = threads / 32;
constexpr u32 all_lanes = 0xffffffffu;
static_assert(warps == 32, "each lane adds up the count of one warp");

struct SharedMemory {
    u32 counts[2][warps];  // in turn, so that a tile's may be written while the last tile's are read
};

extern "C" __global__ void __launch_bounds__(threads) scan_mask(const __grid_constant__ ScanParams params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, length = params.key_length;
    const unsigned char* const mask = params.mask + blockIdx.x * params.batch_stride;
    int* const positions = params.positions + i64(blockIdx.x) * length;
    int* const seen = params.seen + blockIdx.x * (i64(length) + 1);

    int before = 0;  // valid keys before the tile
    int buffer = 0;
    for (int tile = 0; tile < length; tile += threads * keys_per_lane, buffer ^= 1) {
        const int first = tile + warp * 32 * keys_per_lane + lane;
        bool valid[keys_per_lane];
#pragma unroll
        for (int i = 0; i < keys_per_lane; ++i) {
            const int key = first + 32 * i;
            valid[i] = key < length && ptx::load_global_u8(mask + key * params.token_stride) != 0;
        }
        u32 votes[keys_per_lane], count = 0;
#pragma unroll
        for (int i = 0; i < keys_per_lane; ++i) {
            votes[i] = __ballot_sync(all_lanes, valid[i]);
            count += __popc(votes[i]);
        }
        if (lane == 0) ptx::store_shared_u32(ptx::shared_address(&shared.counts[buffer][warp]), count);
        __syncthreads();
        const u32 counted = ptx::load_shared_u32(ptx::shared_address(&shared.counts[buffer][lane]));
        int place = before + static_cast<int>(__reduce_add_sync(all_lanes, lane < warp ? counted : 0));
        before += static_cast<int>(__reduce_add_sync(all_lanes, counted));
#pragma unroll
        for (int i = 0; i < keys_per_lane; ++i) {
            const int key = first + 32 * i, mine = place + __popc(votes[i] & ((1u << lane) - 1));
            if (key < length) ptx::store_global_s32(seen + key, mine);
            if (valid[i]) ptx::store_global_s32(positions + mine, key);
            place += __popc(votes[i]);
        }
    }
    for (int j = before + threadIdx.x; j < length; j += threads) ptx::store_global_s32(positions + j, 0);
    if (threadIdx.x == 0) ptx::store_global_s32(seen + length, before);
}

}  // namespace cuattn
