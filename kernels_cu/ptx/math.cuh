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

}  // namespace cuattn::ptx
