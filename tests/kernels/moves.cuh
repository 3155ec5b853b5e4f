// One word at a time from place to place in one memory, for tests of what the emulator says about global memory.
#pragma once

#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

struct MovesParams {
    int* words;
    const int* places;  // (blocks, moves, 2): in turn, which word is read (none if negative), which is written likewise
    int moves;
};

extern "C" __global__ void moves(const __grid_constant__ MovesParams params) {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < params.moves; ++i) {
        const int* const places = params.places + 2 * (blockIdx.x * params.moves + i);
        const int from = ptx::load_global_s32(places), to = ptx::load_global_s32(places + 1);
        const int word = from < 0 ? 1 : ptx::load_global_s32(params.words + from);
        if (to >= 0) ptx::store_global_s32(params.words + to, word);
    }
}

}  // namespace cuattn
