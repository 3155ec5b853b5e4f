// A kernel that hands its argument back: tensor maps in whatever form they came, and what stands behind them.
#pragma once

#include <common/tensor_map.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// test_tensor_map.py mirrors it field by field.
struct MappedParams {
    TensorMap key_map, value_map;
    u64* out;  // (33): the maps, then `last`
    int last;
};

extern "C" __global__ void mapped(const __grid_constant__ MappedParams params) {
    static_assert(sizeof(MappedParams) == 320 && alignof(MappedParams) == 64);
    if (threadIdx.x >= 17) return;
    const int i = threadIdx.x;
    for (int map = 0; map < 2 && i < 16; ++map) {
        const u64 word = (map ? params.value_map : params.key_map).words[i];
        ptx::store_global_u32(params.out + 16 * map + i, static_cast<u32>(word));
        ptx::store_global_u32(reinterpret_cast<u32*>(params.out + 16 * map + i) + 1, static_cast<u32>(word >> 32));
    }
    if (i == 16) {
        ptx::store_global_u32(params.out + 32, params.last);
        ptx::store_global_u32(reinterpret_cast<u32*>(params.out + 32) + 1, 0);
    }
}

}  // namespace cuattn
