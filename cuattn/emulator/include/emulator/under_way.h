// Registers that wait for a product hold a NaN of one payload, which no device makes and IEEE operations pass on.
#pragma once

#include <emulator/block.h>
#include <emulator/formats.h>

namespace emulator {

constexpr uint32_t under_way_bits = 0x7fc5ca1e;

inline bool is_under_way(float x) { return (bits_of(x) & 0x7fffffffu) == under_way_bits; }

// x, which must not come from a product under way.
inline float settled(float x) {
    if (x != x && is_under_way(x)) fail("result of wgmma used before its wait");
    return x;
}

}  // namespace emulator
