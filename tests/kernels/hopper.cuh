// Small kernels of Hopper's asynchronous units, for tests of the emulator: products of single tiles, which the copy engine
// or threads bring. Those in which some threads work for others follow in hopper_roles.cuh, one that stores by the copy
// engine in hopper_stores.cuh.
#pragma once

#include <common/tensor_map.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <ptx/wgmma.cuh>

namespace cuattn {

// out (rows, columns) = left (rows, depth) * right^T, or * right where a kernel takes its columns; 16-bit and fp32.
struct HopperParams {
    TensorMap left_map, right_map;
    const u16 *left, *right;
    const float* start;  // added to; null: nothing
    float* out;
    int rows, columns, depth;
};

constexpr int row_bytes = 128, tile_bytes = 64 * row_bytes;  // of 64 rows

__device__ __forceinline__ u32 shared_start() { return ptx::shared_address(ptx::dynamic_shared()); }

// The place of a warpgroup's number i in its 64 rows: f(number, row, column).
template <int blocks, class Visit>
__device__ __forceinline__ void for_each(float (&d)[blocks][4], const Visit& visit) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
#pragma unroll
        for (int c = 0; c < 4; ++c) visit(d[b][c], warp * 16 + lane / 4 + c / 2 * 8, 8 * b + 2 * (lane % 4) + c % 2);
    }
}

template <int blocks>
__device__ __forceinline__ void load_start(float (&d)[blocks][4], const HopperParams& params) {
    for_each(d, [&](float& x, int row, int column) {
        x = params.start ? ptx::load_global_f32(params.start + row * params.columns + column) : 0.0f;
    });
}

template <int blocks>
__device__ __forceinline__ void store(float (&d)[blocks][4], const HopperParams& params, int first_row,
                                      int first_column) {
    for_each(d, [&](float x, int row, int column) {
        row += first_row, column += first_column;
        if (row < params.rows && column < params.columns) {
            ptx::store_global_f32(params.out + row * params.columns + column, x);
        }
    });
}

// d += left (64 x 64, a tile's rows) * right (a tile's rows).
template <bool bfloat16, int blocks>
__device__ __forceinline__ void multiply_rows(float (&d)[blocks][4], u32 left, u32 right, bool accumulate) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        ptx::wgmma_shared<bfloat16>(d, ptx::wgmma_advance(ptx::wgmma_rows(left), 32 * k),
                                    ptx::wgmma_advance(ptx::wgmma_rows(right), 32 * k), accumulate || k > 0);
    }
}

// A tile's 64 rows as left operands, 16 columns each.
__device__ __forceinline__ void load_left(u32 (&fragments)[4][4], u32 left) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        ptx::ldmatrix_x4(fragments[k], left + row * row_bytes + ((2 * k + lane / 16) ^ (row & 7)) * 16);
    }
}

// One block of 128 threads: all of right's rows in one box, left's 64 rows in another, and then in registers or not.
template <bool bfloat16, int blocks, bool in_registers>
__global__ void product_of_rows(const __grid_constant__ HopperParams params) {
    const u32 left = shared_start(), right = left + tile_bytes, barrier = right + 8 * blocks * row_bytes;
    if (threadIdx.x == 0) {
        ptx::tma_prefetch(params.left_map);
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_init_fence();
        ptx::mbarrier_arrive_expect(barrier, tile_bytes + 8 * blocks * row_bytes);
        ptx::tma_load_4d(left, params.left_map, 0, 0, 0, 0, barrier);
        ptx::tma_load_4d(right, params.right_map, 0, 0, 0, 0, barrier);
    }
    __syncthreads();
    float d[blocks][4];
    load_start(d, params);
    ptx::mbarrier_wait(barrier, 0);
    u32 fragments[4][4];
    if (in_registers) load_left(fragments, left);
    ptx::wgmma_fence();
    if constexpr (in_registers) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const u64 rows = ptx::wgmma_advance(ptx::wgmma_rows(right), 32 * k);
            ptx::wgmma_registers<bfloat16, false>(d, fragments[k], rows, params.start != nullptr || k > 0);
        }
    } else {
        multiply_rows<bfloat16>(d, left, right, params.start != nullptr);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    store(d, params, 0, 0);
}

// The same with left in registers and right's columns, in panels of 64.
template <bool bfloat16, int blocks>
__global__ void product_of_columns(const __grid_constant__ HopperParams params) {
    constexpr int panels = (blocks + 7) / 8;
    const u32 left = shared_start(), right = left + tile_bytes, barrier = right + panels * tile_bytes;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_init_fence();
        ptx::mbarrier_arrive_expect(barrier, (1 + panels) * tile_bytes);
        ptx::tma_load_4d(left, params.left_map, 0, 0, 0, 0, barrier);
        for (int i = 0; i < panels; ++i) {
            ptx::tma_load_4d(right + i * tile_bytes, params.right_map, 64 * i, 0, 0, 0, barrier);
        }
    }
    __syncthreads();
    float d[blocks][4];
    load_start(d, params);
    ptx::mbarrier_wait(barrier, 0);
    u32 fragments[4][4];
    load_left(fragments, left);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const u64 columns = ptx::wgmma_advance(ptx::wgmma_columns(right, tile_bytes), 2048 * k);
        ptx::wgmma_registers<bfloat16, true>(d, fragments[k], columns, params.start != nullptr || k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    store(d, params, 0, 0);
}

// Stores a tile of 64 rows of 64 numbers as the copy engine would; thread t half of row t / 2.
__device__ __forceinline__ void store_tile(u32 tile, const u16* from) {
    const int row = threadIdx.x / 2;
    for (int unit = threadIdx.x % 2 * 4; unit < threadIdx.x % 2 * 4 + 4; ++unit) {
        const uint4 x = ptx::load_global_u32x4(from + row * 64 + unit * 8);
        const u32 to = tile + row * row_bytes + (unit ^ (row & 7)) * 16;
        ptx::store_shared_u32(to, x.x);
        ptx::store_shared_u32(to + 4, x.y);
        ptx::store_shared_u32(to + 8, x.z);
        ptx::store_shared_u32(to + 12, x.w);
    }
}

// One block of 128 threads: both tiles by ordinary stores.
template <bool bfloat16>
__global__ void product_of_stored(const __grid_constant__ HopperParams params) {
    const u32 left = shared_start(), right = left + tile_bytes;
    store_tile(left, params.left);
    store_tile(right, params.right);
    ptx::fence_async_proxy();
    __syncthreads();
    float d[8][4];
    ptx::wgmma_fence();
    multiply_rows<bfloat16>(d, left, right, false);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    store(d, params, 0, 0);
}

}  // namespace cuattn
