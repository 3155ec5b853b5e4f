// Natural logarithm in plain IEEE operations, so that every device and the emulator give the same bits.
#pragma once

#include <common/types.cuh>

namespace cuattn {

constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float ln2 = 0.693147180559945309f;

// ln(x) for a positive normal fp32 x or 0 (-inf); +inf and NaN come back as they are. Error below 1 ulp of the larger
// of |ln x| and 1/4. x = 2^e * f with f in [2/3, 4/3): ln(1 + t) = t - t^2 / 2 + t^3 p(t); p is a minimax fit
// (docs/numerics.md, LSE).
__device__ __forceinline__ float natural_log(float x) {
    const u32 bits = __float_as_uint(x);
    const int exponent = static_cast<int>(bits - 0x3f2aaaabu) >> 23;
    const float t = __fadd_rn(__uint_as_float(bits - (static_cast<u32>(exponent) << 23)), -1.0f);
    float p = 0.116374515f;
    p = __fmaf_rn(p, t, -0.124468617f);
    p = __fmaf_rn(p, t, 0.108481616f);
    p = __fmaf_rn(p, t, -0.122843958f);
    p = __fmaf_rn(p, t, 0.142965004f);
    p = __fmaf_rn(p, t, -0.166735306f);
    p = __fmaf_rn(p, t, 0.199998468f);
    p = __fmaf_rn(p, t, -0.249999419f);
    p = __fmaf_rn(p, t, 0.333333343f);
    const float square = __fmul_rn(t, t);
    const float tail = __fmaf_rn(__fmul_rn(square, t), p, __fmul_rn(square, -0.5f));
    const float e = static_cast<float>(exponent);
    // ln2 in two parts: the high one has trailing zeros, so that e * high is exact
    const float log = __fadd_rn(__fmul_rn(e, 0.693359375f), __fadd_rn(t, __fmaf_rn(e, -2.12194440e-4f, tail)));
    return x == 0.0f ? -infinity : x < infinity ? log : x;
}

}  // namespace cuattn
