// Arithmetic that C++ has no exact name for. PTX ISA: "ex2", "cvt".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// 2^x in hardware precision; subnormal inputs and results are flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two fp32 values rounded to nearest even and packed, `low` in the low half.
template <bool bfloat16>
__device__ __forceinline__ u32 pack_16bit(float low, float high) {
    u32 packed;
    if constexpr (bfloat16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

// The two numbers of a packed pair.
template <bool bfloat16>
__device__ __forceinline__ float2 unpack_16bit(u32 packed) {
    if constexpr (bfloat16) {
        return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
    } else {
        float2 x;
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
            : "=f"(x.x), "=f"(x.y)
            : "r"(packed));
        return x;
    }
}

}  // namespace cuattn::ptx
