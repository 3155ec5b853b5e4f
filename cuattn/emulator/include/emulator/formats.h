// Floating-point formats and conversions between them. Rounding is to nearest even; the one NaN is a GPU's: all bits
// but the sign.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// Arithmetic on a device makes one NaN only; the host's NaN have signs and payloads.
inline uint32_t device_bits_of(float x) { return x == x ? bits_of(x) : 0x7fffffffu; }

// For exponents of normal fp64 numbers.
inline double power_of_two(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_fp16(float x) {
    if (x != x) return 0x7fff;
    const uint32_t magnitude = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
    uint32_t rounded;
    if (magnitude >= bits_of(0x1p16f)) {
        rounded = 0x7c00;
    } else if (magnitude >= bits_of(0x1p-14f)) {
        rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {  // subnormal: a multiple of 2^-24
        rounded = static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f));
    }
    return static_cast<uint16_t>(sign | rounded);
}

inline float from_fp16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? float_of(0x7fffffff) : (bits >> 15 ? -HUGE_VALF : HUGE_VALF);
    const float magnitude =
        std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

}  // namespace emulator
