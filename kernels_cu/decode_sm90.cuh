// Forward attention of a few rows for Hopper (sm_90a) in 16 bits: the copy engine, mbarriers, and mma.sync with keys and values
// as left operands, so that 8 queries are computed where forward_sm90 would compute 64. The including unit defines namespace
// cuattn::config with the constants of one DecodeConfig (cuattn/jit/unit.py).
//
// A block computes block_rows packed rows of one key head for the chunks that start in its range of the batch's key tiles
// (attn/work.cuh), and then others. Warp 0 fills the ring with tiles of keys and values. Some warps make a tile's weights
// (attn/decode_weights.cuh) while others use those of the tile before (attn/decode_outputs.cuh, decode_sums.cuh). Or a cluster of blocks shares
// the chunks of a group, and merges them. What a row computes, and in
// which order, depends on absolute key positions alone (docs/numerics.md), and is what the other kernels compute.
#pragma once

#include <attn/block_work.cuh>
#include <attn/decode_block.cuh>
#include <attn/decode_outputs.cuh>
#include <attn/decode_sums.cuh>
#include <attn/decode_weights.cuh>
#include <attn/merge.cuh>
#include <attn/params.cuh>
#include <attn/producers.cuh>
#include <attn/ring.cuh>
#include <attn/rows.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/cluster.cuh>
#include <ptx/grid.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

static_assert(sizeof(Start<block_rows>) * 32 <= config::start_bytes);

// The fold over the chunks of a group whose pieces the blocks of a cluster have, a row for each of their warps. For all threads.
__device__ __forceinline__ void merge_pieces(const ForwardSm90Params& params, const Work& work, int lane) {
    const ForwardParams& forward = params.call.forward;
    const Partials& partials = params.call.partials;
    const KeySequence& sequence = work.sequence;
    __syncwarp();
    ptx::meet_cluster();
    const int row = ptx::cluster_rank() + params.pieces * (threadIdx.x / 32);
    if (row >= sequence.query_length * forward.group || work.folded == work.chunks) return;
    const i64 index = partial_index(params.call, work, 0, row);
    const PackedRow packed(forward, work.key_head, row);
#pragma unroll 1
    for (int column = 4 * lane; column < value_dim; column += 128) {
        auto merged = Merged<value_dim>::load(partials, index, column);
        merged.add_chunks(partials, index, work.folded, work.chunks, partials.rows, column);
        merged.template store<false, config::bfloat16>(
            forward, packed.offset(forward.out_strides, sequence.query_batch, sequence.query_start),
            packed.index(forward, sequence.query_batch, sequence.query_start), column);
    }
}

extern "C" __global__ void __launch_bounds__(threads, 1) decode_sm90(const __grid_constant__ ForwardSm90Params params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const int lane = threadIdx.x & 31;
    const RingAddress ring{ptx::shared_address(shared.ring), ptx::shared_address(shared.filled),
                           ptx::shared_address(shared.free), ptx::shared_address(&shared.landed)};
    if (threadIdx.x == 0) {
        KeyBoxes::prepare(params);
        ring.init(ring_slots, 1, slot_readers);
    }
    // the same for all lanes of a warp, and the compiler must know
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    // One warp finds out what comes first: so many instructions for all would take turns.
    Start<block_rows> start;
    const u32 found = ptx::shared_address(shared.start);
    if (warp == 0) {
        start.find(params, lane);
        start.store(found, lane);
    } else {
        ptx::wait_for_earlier_launches();
    }
    __syncthreads();
    ptx::let_later_launches_start();
    if (warp > 0) start.load(found, lane);
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
    if (params.pieces > 1) merge_pieces(params, start.work, lane);
}

}  // namespace cuattn
