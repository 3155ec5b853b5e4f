// Bit-exact dot-add of the tensor cores: d = rz_fp32(trunc(c) + sum of trunc(a_k b_k)), every term aligned to the largest
// exponent and truncated to a number of fraction bits. Model: Khattak and Mikaitis, arXiv 2512.07004; MMA-Sim, arXiv
// 2511.10909; equal to an H200 on all captured vectors (tests/test_hardware_model.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emulator {

// Terms of one step and their fraction bits. Hopper and Blackwell: 16 and 25. Ampere and Ada: 8 (two steps) and 24.
struct TensorCore {
    int terms, fraction_bits;
};
inline thread_local TensorCore tensor_core{16, 25};

// value = significand * 2^(exponent - fraction), significand below 2^(fraction + 1); zero has the exponent -126.
struct Operand {
    int significand, exponent;
    bool finite;
};

inline float fp16_value(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}
inline float bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// `fraction`: explicit significand bits kept (7 for bf16, 10 for fp16, 23 for fp32). fp16 subnormals are normal in fp32.
inline Operand operand(float x, int fraction) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const int biased = static_cast<int>(bits >> 23 & 255);
    int significand = static_cast<int>(bits & 0x7fffff) | (biased ? 0x800000 : 0);
    significand >>= 23 - fraction;
    return {bits >> 31 ? -significand : significand, biased ? biased - 127 : -126, biased != 255};
}

inline int64_t aligned(int64_t significand, int shift_left, int shift_right) {
    if (shift_right > 62) return 0;
    const int64_t magnitude = ((significand < 0 ? -significand : significand) << shift_left) >> shift_right;
    return significand < 0 ? -magnitude : magnitude;
}

// sum * 2^exponent, truncated to fp32.
inline float round_toward_zero(int64_t sum, int exponent) {
    double v = std::ldexp(static_cast<double>(sum), exponent);
    if (std::fabs(v) >= 0x1p-126) {
        uint64_t bits;
        std::memcpy(&bits, &v, 8);
        bits &= ~uint64_t{0x1fffffff};
        std::memcpy(&v, &bits, 8);
    } else {
        v = std::ldexp(std::trunc(std::ldexp(v, 149)), -149);
    }
    return static_cast<float>(v);
}

// One step of `terms` products for one element; `fraction` as in operand().
inline float dot_add(const Operand* a, const Operand* b, int stride_b, float c, int terms, int fraction) {
    const Operand oc = operand(c, 23);
    int largest = oc.exponent;
    bool finite = oc.finite;
    for (int k = 0; k < terms; ++k) {
        const int e = a[k].exponent + b[k * stride_b].exponent;
        largest = e > largest ? e : largest;
        finite = finite && a[k].finite && b[k * stride_b].finite;
    }
    if (!finite) {  // infinities and NaN as in IEEE arithmetic, NaN canonical
        double sum = c;
        for (int k = 0; k < terms; ++k) {
            const auto value = [&](const Operand& o) {
                if (o.finite) return std::ldexp(static_cast<double>(o.significand), o.exponent - fraction);
                const bool nan = (o.significand < 0 ? -o.significand : o.significand) != 1 << fraction;
                return nan ? std::numeric_limits<double>::quiet_NaN()
                           : o.significand * std::numeric_limits<double>::infinity();
            };
            sum += value(a[k]) * value(b[k * stride_b]);
        }
        return static_cast<float>(sum);
    }
    const int bits = tensor_core.fraction_bits;
    int64_t sum = aligned(oc.significand, bits - 23, largest - oc.exponent);
    for (int k = 0; k < terms; ++k) {
        const Operand &x = a[k], &y = b[k * stride_b];
        sum += aligned(int64_t{x.significand} * y.significand, bits - 2 * fraction, largest - x.exponent - y.exponent);
    }
    return round_toward_zero(sum, largest - bits);
}

// c (rows x columns) += a (rows x 16) * b (16 x columns), all operands of one 16-bit type.
template <int rows, int columns>
void multiply_add(float (&c)[rows][columns], const Operand (&a)[rows][16], const Operand (&b)[16][columns],
                  int fraction) {
    for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < columns; ++n) {
            for (int k = 0; k < 16; k += tensor_core.terms) {
                c[m][n] = dot_add(&a[m][k], &b[k][n], columns, c[m][n], tensor_core.terms, fraction);
            }
        }
    }
}

}  // namespace emulator
