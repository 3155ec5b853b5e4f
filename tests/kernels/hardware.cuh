// One instruction or function at a time on given inputs, for tests of the emulator's hardware model. One warp a block.
#pragma once

#include <common/logarithm.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>

namespace cuattn {

struct HardwareParams {
    const void* a;  // products: (blocks, 16, 16), 16-bit, or (blocks, 16, 8), TF32; functions: (blocks, 32, 4), fp32
    const void* b;  // products: (blocks, 8, 16), 16-bit, or (blocks, 8, 8), TF32
    const void* c;  // products: (blocks, 16, 8), fp32
    float* out;     // products: as c; functions: (blocks, 32, 4, 2), of each x: 2^x and ln(x)
    u16* packed;    // functions: (blocks, 32, 2, 4), of each four x: bf16, then fp16
};

// Copies units of 16 bytes, one a lane.
__device__ __forceinline__ void copy_units(u32 to, const void* from, int units) {
    const int lane = threadIdx.x;
    if (lane < units) {
        const auto* source = static_cast<const unsigned char*>(from) + (i64{blockIdx.x} * units + lane) * 16;
        ptx::cp_async_16(to + lane * 16, source, true);
    }
}

// A row of an operand has 32 bytes in every type, and so lanes hold the same units of them.
template <void (*multiply_add)(float (&)[4], const u32 (&)[4], u32, u32)>
__device__ __forceinline__ void product(const HardwareParams& params) {
    const int lane = threadIdx.x;
    const u32 a = ptx::shared_address(ptx::dynamic_shared()), b = a + 512, c = b + 256;
    copy_units(a, params.a, 32);
    copy_units(b, params.b, 16);
    copy_units(c, params.c, 32);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    u32 fragment_a[4], fragment_b[4];  // of b: the matrices of its two halves, twice
    ptx::ldmatrix_x4(fragment_a, a + (lane & 15) * 32 + (lane >> 4) * 16);
    ptx::ldmatrix_x4(fragment_b, b + (lane & 7) * 32 + (lane >> 3 & 1) * 16);
    float d[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float4 four = ptx::load_shared_f32x4(c + (lane / 4 + 8 * half) * 32 + (lane & 2) * 8);
        d[2 * half] = (lane & 1) ? four.z : four.x;
        d[2 * half + 1] = (lane & 1) ? four.w : four.y;
    }
    multiply_add(d, fragment_a, fragment_b[0], fragment_b[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane & 3) + (i & 1);
        ptx::store_global_f32(params.out + (i64{blockIdx.x} * 16 + row) * 8 + column, d[i]);
    }
}

extern "C" __global__ void product_bfloat16(const __grid_constant__ HardwareParams params) {
    product<ptx::mma_m16n8k16<true>>(params);
}
extern "C" __global__ void product_float16(const __grid_constant__ HardwareParams params) {
    product<ptx::mma_m16n8k16<false>>(params);
}
extern "C" __global__ void product_tf32(const __grid_constant__ HardwareParams params) {
    product<ptx::mma_m16n8k8_tf32>(params);
}

extern "C" __global__ void functions(const __grid_constant__ HardwareParams params) {
    const u32 shared = ptx::shared_address(ptx::dynamic_shared());
    copy_units(shared, params.a, 32);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    const float4 four = ptx::load_shared_f32x4(shared + threadIdx.x * 16);
    const float x[4] = {four.x, four.y, four.z, four.w};
    const i64 thread = i64{blockIdx.x} * 32 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        ptx::store_global_f32(params.out + (thread * 4 + i) * 2, ptx::exp2_approx(x[i]));
        ptx::store_global_f32(params.out + (thread * 4 + i) * 2 + 1, natural_log(x[i]));
    }
    const uint4 packed = {ptx::pack_16bit<true>(x[0], x[1]), ptx::pack_16bit<true>(x[2], x[3]),
                          ptx::pack_16bit<false>(x[0], x[1]), ptx::pack_16bit<false>(x[2], x[3])};
    ptx::store_global_u32x4(params.packed + thread * 8, packed);
}

}  // namespace cuattn
