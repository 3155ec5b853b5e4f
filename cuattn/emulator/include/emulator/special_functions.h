// ex2.approx.ftz.f32 of a Hopper GPU, bit for bit (tests/test_hardware_model.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace emulator {

// 2^(i / 2^23) for i in [0, 2^23), as the hardware rounds it; filled in by the launcher.
inline thread_local const float* exp2_table = nullptr;

// The input is truncated to fixed point with 23 fraction bits (a negative one to its one's complement), its fraction
// looked up; results below 2^-126 are +0.
inline float exp2_approx(float x) {
    if (x != x) return std::numeric_limits<float>::quiet_NaN();
    const double magnitude =
        std::fabs(x) < 0x1p-126f ? 0.0 : std::floor(std::fmin(std::fabs(double{x}), 300.0) * 0x1p23);
    auto fixed = static_cast<int64_t>(magnitude);
    if (x < 0) fixed = fixed % (1 << 23) == 0 ? -fixed : -fixed - 1;
    const double value = std::ldexp(static_cast<double>(exp2_table[fixed & 0x7fffff]), static_cast<int>(fixed >> 23));
    return value < 0x1p-126 ? 0.0f : static_cast<float>(value);
}

}  // namespace emulator
