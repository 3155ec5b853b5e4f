// A small kernel of the copy engine's way back, for tests of the emulator. Compiled behind hopper.cuh, as one unit.
#pragma once

namespace cuattn {

// out's bits, which right_map describes, become left's: 64 rows of 128 columns. One block of 128 threads; a warp has room for
// half of its 16 rows' columns.
__global__ void stores(const __grid_constant__ HopperParams params) {
    constexpr int room_bytes = 16 * row_bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 left = shared_start(), room = left + 2 * tile_bytes + warp * room_bytes,
              barrier = left + 2 * tile_bytes + 4 * room_bytes;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_init_fence();
        ptx::mbarrier_arrive_expect(barrier, 2 * tile_bytes);
        for (int i = 0; i < 2; ++i) {
            ptx::tma_load_4d(left + i * tile_bytes, params.left_map, 64 * i, 0, 0, 0, barrier);
        }
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    for (int i = 0; i < 2; ++i) {
        u32 fragments[4][4];
        load_left(fragments, left + i * tile_bytes);
        if (lane == 0) ptx::tma_store_wait();
        __syncwarp();
        for (int k = 0; k < 4; ++k) {
            const int row = lane % 16;
            ptx::stmatrix_x4(room + row * row_bytes + ((2 * k + lane / 16) ^ (row & 7)) * 16, fragments[k]);
        }
        ptx::fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            ptx::tma_store_4d(params.right_map, 64 * i, 16 * warp, 0, 0, room);
            ptx::tma_store_commit();
        }
    }
    if (lane == 0) ptx::tma_store_wait();
}

}  // namespace cuattn
