// The records of the rows that contribute to gradients, one behind the other: one block for each sequence and query head.
// The including unit defines namespace cuattn::config with the constants of one CompactConfig (cuattn/jit/unit.py).
#pragma once

#include <attn/compaction.cuh>
#include <attn/params.cuh>
#include <attn/records.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::threads;
using Places = Compaction<threads / 32, 4>;

struct SharedMemory : Places::Counts {};
static_assert(sizeof(SharedMemory) <= config::shared_bytes);

extern "C" __global__ void __launch_bounds__(threads) compact_rows(const __grid_constant__ BackwardParams params) {
    const ForwardParams& forward = params.forward;
    const int head = blockIdx.x % forward.query_heads, index = blockIdx.x / forward.query_heads;
    const Sequence<false, true, false> sequence(forward, index);
    const i64 start = first_record(forward, sequence.query_batch, sequence.query_start, head);
    const int count = Places::run(
        sequence.query_length, *static_cast<SharedMemory*>(ptx::dynamic_shared()),
        [&](int row) { return ptx::load_global_s32(&params.rows[start + row].visible) > 0; },
        [&](int row, int before, bool contributes) {
            if (!contributes) return;
            ptx::store_global_u32x4(params.contributing + start + before,
                                    ptx::load_global_u32x4(params.rows + start + row));
        });
    if (threadIdx.x == 0) ptx::store_global_s32(params.counts + blockIdx.x, count);
}

}  // namespace cuattn
