// Small kernels in which some threads work for others, for tests of the emulator: a matrix product through a ring of stages,
// and a word that one warp writes and another one reads. Compiled behind hopper.cuh, as one unit.
#pragma once

namespace cuattn {

// Two warpgroups multiply tiles (128 x 64 and 64 x 64 numbers) that a thread of a third asks for; block b has columns 64 b.
template <bool bfloat16>
__global__ void ring(const __grid_constant__ HopperParams params) {
    constexpr int stages = 2, stage_bytes = 3 * tile_bytes, loader = 2;
    const u32 tiles = shared_start(), full = tiles + stages * stage_bytes, empty = full + stages * 8;
    const u32 results = full + 1024;  // (128, 64)
    const int steps = (params.depth + 63) / 64, column = blockIdx.x * 64, warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            ptx::mbarrier_init(full + i * 8, 1);
            ptx::mbarrier_init(empty + i * 8, 2);
        }
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup == loader) {
        ptx::release_registers<24>();
        if (threadIdx.x == loader * 128) {
            for (int step = 0; step < steps; ++step) {
                const int stage = step % stages;
                const u32 to = tiles + stage * stage_bytes;
                ptx::mbarrier_wait(empty + stage * 8, (step / stages + 1) % 2);
                ptx::mbarrier_arrive_expect(full + stage * 8, stage_bytes);
                ptx::tma_load_4d(to, params.left_map, step * 64, 0, 0, 0, full + stage * 8);
                ptx::tma_load_4d(to + 2 * tile_bytes, params.right_map, step * 64, column, 0, 0, full + stage * 8);
            }
        }
    } else {
        ptx::claim_registers<240>();
        float d[8][4];
        for (int step = 0; step < steps; ++step) {
            const int stage = step % stages;
            const u32 from = tiles + stage * stage_bytes;
            ptx::mbarrier_wait(full + stage * 8, step / stages % 2);
            ptx::wgmma_fence();
            multiply_rows<bfloat16>(d, from + warpgroup * tile_bytes, from + 2 * tile_bytes, step > 0);
            ptx::wgmma_commit();
            if (step > 0) {
                ptx::wgmma_wait<1>();
                if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + (step - 1) % stages * 8);
            }
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(d);
        for_each(d, [&](float x, int row, int i) {
            ptx::store_shared_u32(results + ((warpgroup * 64 + row) * 64 + i) * 4, __float_as_uint(x));
        });
        ptx::barrier_sync<128>(1 + warpgroup);
        const int row = threadIdx.x / 2;
        for (int i = threadIdx.x % 2 * 32; i < threadIdx.x % 2 * 32 + 32; ++i) {
            const u32 x = ptx::load_shared_u32(results + (row * 64 + i) * 4);
            if (row < params.rows && column + i < params.columns) {
                ptx::store_global_u32(params.out + row * params.columns + column + i, x);
            }
        }
    }
}

// A lane of warp 0 changes a word, which all lanes of warp 1 read: row i of out (rows, 32) has i's bits. One of the readers
// also arrives at a barrier of its own, and so is ahead of the others.
__global__ void turns(const __grid_constant__ HopperParams params) {
    const u32 word = shared_start(), written = word + 8, read = word + 16, counted = word + 24;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(written, 1);
        ptx::mbarrier_init(read, 32);
        ptx::mbarrier_init(counted, 1);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = 0; row < params.rows; ++row) {
        if (warp == 1) {
            ptx::mbarrier_wait(written, row % 2);
            if (lane == 0) ptx::mbarrier_arrive(counted);
            ptx::store_global_u32(params.out + row * 32 + lane, ptx::load_shared_u32(word));
            ptx::mbarrier_arrive(read);
        } else if (lane == 0) {
            ptx::mbarrier_wait(read, (row + 1) % 2);
            ptx::store_shared_u32(word, row);
            ptx::mbarrier_arrive(written);
        }
    }
}

}  // namespace cuattn
