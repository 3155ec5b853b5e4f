// A key padding mask as tables of places: one block for each batch entry. The including unit defines namespace
// cuattn::config with the constants of one ScanConfig (cuattn/jit/unit.py).
#pragma once

#include <attn/compaction.cuh>
#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::threads;

using Places = Compaction<threads / 32, 4>;

struct SharedMemory : Places::Counts {};
static_assert(sizeof(SharedMemory) <= config::shared_bytes);

extern "C" __global__ void __launch_bounds__(threads) scan_mask(const __grid_constant__ ScanParams params) {
    const int length = params.key_length;
    const unsigned char* const mask = params.mask + blockIdx.x * params.batch_stride;
    int* const positions = params.positions + i64(blockIdx.x) * length;
    int* const seen = params.seen + blockIdx.x * (i64(length) + 2);
    const int keys = Places::run(
        length, *static_cast<SharedMemory*>(ptx::dynamic_shared()),
        [&](int place) { return ptx::load_global_u8(mask + place * params.token_stride) != 0; },
        [&](int place, int before, bool is_key) {
            ptx::store_global_s32(seen + place, before);
            if (is_key) ptx::store_global_s32(positions + before, place);
        });
    for (int j = keys + threadIdx.x; j < length; j += threads) ptx::store_global_s32(positions + j, 0);
    __syncthreads();  // the positions have been written
    if (threadIdx.x > 0) return;
    const int first = keys > 0 ? ptx::load_written_s32(positions) : 0;
    const bool in_one_piece = keys == 0 || ptx::load_written_s32(positions + keys - 1) - first == keys - 1;
    ptx::store_global_s32(seen + length, keys);
    ptx::store_global_s32(seen + length + 1, in_one_piece ? first : -1);
}

}  // namespace cuattn
