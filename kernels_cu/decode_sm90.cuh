// Forward attention of a few rows for Hopper (sm_90a) in 16 bits: the copy engine, mbarriers, and mma.sync with keys and values
// as left operands, so that 8 queries are computed where forward_sm90 would compute 64. The including unit defines namespace
// cuattn::config with the constants of one DecodeConfig (cuattn/jit/unit.py).
//
// A block computes block_rows packed rows of one key head for the chunks that start in its range of the batch's key tiles
// (attn/work.cuh), and then others. Warp 0 fills the ring with tiles of keys and values. Some warps make a tile's weights
// (attn/decode_weights.cuh) while others use those of the tile before (attn/decode_outputs.cuh). What a row computes, and in
// which order, depends on absolute key positions alone (docs/numerics.md), and is what the other kernels compute.
#pragma once

#include <attn/block_work.cuh>
#include <attn/decode_block.cuh>
#include <attn/decode_outputs.cuh>
#include <attn/decode_weights.cuh>
#include <attn/params.cuh>
#include <attn/producers.cuh>
#include <attn/ring.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/grid.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

extern "C" __global__ void __launch_bounds__(threads, 1) decode_sm90(const __grid_constant__ ForwardSm90Params params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const int lane = threadIdx.x & 31;
    const RingAddress ring{ptx::shared_address(shared.ring), ptx::shared_address(shared.filled),
                           ptx::shared_address(shared.free), ptx::shared_address(&shared.landed)};
    if (threadIdx.x == 0) {
        KeyBoxes::prepare(params);
        init_barriers(shared, ring);
    }
    const Start<block_rows> start(params, lane);
    __syncthreads();
    ptx::let_later_launches_start();
    // the same for all lanes of a warp, and the compiler must know
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
        RingPlace<ring_slots> place;
        u32 landed_parity = 0;
        produce<block_rows>(params, start, lane, [&](const Work& work, const Tiles& tiles) {
            fill<KeyBoxes, false>(params, work, tiles, ring, place, landed_parity);
        });
    } else if (warp == 1) {
        Summation summation(params, shared, lane);
        for_each_work<block_rows>(params, lane, start, [&](const Work& work) { summation.attend(work); });
    } else if (warp < first_value_warp) {
        Weigher weigher(params, ring, shared, warp - first_score_warp, lane);
        for_each_work<block_rows>(params, lane, start, [&](const Work& work) { weigher.attend(work); });
    } else {
        Outputs outputs(params, ring, shared, warp - first_value_warp, lane);
        for_each_work<block_rows>(params, lane, start, [&](const Work& work) { outputs.attend(work); });
    }
}

}  // namespace cuattn
