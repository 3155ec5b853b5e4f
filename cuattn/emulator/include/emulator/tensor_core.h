// Bit-exact dot-add of the tensor cores: d = rz_fp32(trunc(c) + sum of trunc(a_k b_k)), every term aligned to the
// largest exponent among those that are not zero, and truncated to a number of fraction bits. Subnormal operands keep
// their format's smallest exponent, zeros are +0, and what exceeds fp32 is infinite. After Khattak and Mikaitis, arXiv
// 2512.07004, and MMA-Sim, arXiv 2511.10909; equal to an H200 on all captured vectors (tests/test_hardware_model.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include <emulator/formats.h>

namespace emulator {

// Terms of one step of 16-bit operands and their fraction bits; a step of TF32 has half as many terms. Hopper and
// Blackwell: 16 and 25. Ampere and Ada: 8 (two steps) and 24.
struct TensorCore {
    int terms, fraction_bits;
};
inline thread_local TensorCore tensor_core{16, 25};

// value = significand * 2^(exponent - fraction), significand below 2^(fraction + 1) in magnitude. `fraction`: 23 for
// fp32.
struct Operand {
    int significand, exponent;
};
constexpr int zero_exponent = -4096, not_finite_exponent = 16384;  // sums of two show that one of these is among them
constexpr int smallest_exponent = -252, largest_exponent = 254;    // of products of finite numbers

template <int columns>
struct OperandRow {
    int significand[columns], exponent[columns];

    void set(int column, Operand value) { significand[column] = value.significand, exponent[column] = value.exponent; }
};

// From a format's parts; `bias` as in IEEE 754. Of an infinity or NaN the significand tells which it is.
inline Operand operand(bool negative, int biased_exponent, int fraction_bits, int fraction, int bias) {
    const int infinity = 2 * bias + 1;
    const int significand = fraction_bits | (biased_exponent ? 1 << fraction : 0);
    const int exponent = biased_exponent == infinity ? not_finite_exponent
                         : significand == 0          ? zero_exponent
                                                     : std::max(biased_exponent, 1) - bias;
    return {negative ? -significand : significand, exponent};
}
inline Operand operand(float x) {
    const uint32_t bits = bits_of(x);
    return operand(bits >> 31, bits >> 23 & 255, bits & 0x7fffff, 23, 127);
}
inline Operand bf16_operand(uint16_t bits) { return operand(bits >> 15, bits >> 7 & 255, bits & 127, 7, 127); }
inline Operand fp16_operand(uint16_t bits) { return operand(bits >> 15, bits >> 10 & 31, bits & 1023, 10, 15); }
inline Operand tf32_operand(uint32_t bits) { return operand(bits >> 31, bits >> 23 & 255, bits >> 13 & 1023, 10, 127); }

// value / 2^shift, truncated toward zero.
inline int shift_right(int value, int shift) {
    const int sign = value >> 31;
    return ((((value ^ sign) - sign) >> std::min(shift, 31)) ^ sign) - sign;
}

// sum * 2^exponent, truncated to fp32; what becomes zero is +0.
inline float round_toward_zero(double sum, int exponent) {
    const double exact = sum * power_of_two(exponent);
    const auto nearest = static_cast<float>(exact);
    if (std::fabs(exact) >= 0x1p128) return nearest;
    return float_of(bits_of(nearest) - (std::fabs(nearest) > std::fabs(exact))) + 0.0f;
}

// One element where an operand is an infinity or NaN: as in IEEE arithmetic.
template <int columns>
float dot_add_not_finite(float c, const Operand* a, const OperandRow<columns>* b, int column, int terms, int fraction) {
    const auto value = [&](int significand, int exponent) {
        if (exponent != not_finite_exponent) return std::ldexp(static_cast<double>(significand), exponent - fraction);
        return std::abs(significand) == 1 << fraction ? significand * std::numeric_limits<double>::infinity()
                                                      : std::numeric_limits<double>::quiet_NaN();
    };
    double sum = c;
    for (int k = 0; k < terms; ++k) {
        sum += value(a[k].significand, a[k].exponent) * value(b[k].significand[column], b[k].exponent[column]);
    }
    return static_cast<float>(sum);
}

// One step of `terms` products for a row of elements; `fraction`: that of the operands.
template <int columns>
void dot_add(float (&c)[columns], const Operand* a, const OperandRow<columns>* b, int terms, int fraction) {
    const int bits = tensor_core.fraction_bits, scale = 1 << (bits - 2 * fraction);
    int largest[columns], sum[2][columns];  // eight terms below 2^27 and the accumulator stay below 2^31
    OperandRow<columns> old;
    for (int n = 0; n < columns; ++n) old.set(n, operand(c[n]));
    for (int n = 0; n < columns; ++n) largest[n] = std::max(old.exponent[n], smallest_exponent);
    for (int k = 0; k < terms; ++k) {
        for (int n = 0; n < columns; ++n) largest[n] = std::max(largest[n], a[k].exponent + b[k].exponent[n]);
    }
    for (int n = 0; n < columns; ++n) {
        sum[0][n] = shift_right(old.significand[n] * (1 << (bits - 23)), largest[n] - old.exponent[n]);
        sum[1][n] = 0;
    }
    for (int k = 0; k < terms; ++k) {
        const int significand = a[k].significand * scale, exponent = a[k].exponent;
        for (int n = 0; n < columns; ++n) {
            sum[k / 8][n] += shift_right(significand * b[k].significand[n], largest[n] - exponent - b[k].exponent[n]);
        }
    }
    for (int n = 0; n < columns; ++n) {
        const double total = static_cast<double>(sum[0][n]) + static_cast<double>(sum[1][n]);
        c[n] = largest[n] <= largest_exponent ? round_toward_zero(total, largest[n] - bits)
                                              : dot_add_not_finite(c[n], a, b, n, terms, fraction);
    }
}

// c (rows x columns) += a (rows x depth) * b (depth x columns), all operands of one type.
template <int rows, int columns, int depth>
void multiply_add(float (&c)[rows][columns], const Operand (&a)[rows][depth], const OperandRow<columns> (&b)[depth],
                  int fraction) {
    const int terms = tensor_core.terms * depth / 16;
    for (int m = 0; m < rows; ++m) {
        for (int k = 0; k < depth; k += terms) dot_add(c[m], &a[m][k], &b[k], terms, fraction);
    }
}

}  // namespace emulator
