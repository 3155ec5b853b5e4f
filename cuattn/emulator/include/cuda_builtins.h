// What the CUDA compiler knows without an #include, for the host compiler. Every emulated unit includes it first.
#pragma once

#include <algorithm>
#include <cmath>

#include <emulator/access.h>
#include <emulator/block.h>
#include <emulator/formats.h>
#include <emulator/special_functions.h>
#include <emulator/tensor_core.h>
#include <emulator/under_way.h>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline float __fadd_rn(float a, float b) { return emulator::settled(a + b); }
inline float __fsub_rn(float a, float b) {  // a kernel may take the bits
    return emulator::float_of(emulator::device_bits_of(emulator::settled(a - b)));
}
inline float __fmul_rn(float a, float b) { return emulator::settled(a * b); }
inline float __fmaf_rn(float a, float b, float c) { return emulator::settled(std::fma(a, b, c)); }
inline float __frcp_rn(float a) { return 1.0f / a; }

inline unsigned __float_as_uint(float x) { return emulator::bits_of(emulator::settled(x)); }
inline float __uint_as_float(unsigned bits) { return emulator::float_of(bits); }

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }

namespace emulator {

// Each lane gets what lane source % 32 gives; `source` may differ from lane to lane.
template <class T>
T shuffle(const char* what, unsigned mask, T x, int source) {
    struct Exchange {
        T in;
        int source;
        mutable T out;
    };
    const Exchange mine{x, source, T{}};
    warp_collective(what, mask, &mine, [](const void* const* all) {
        const auto* const* lanes = reinterpret_cast<const Exchange* const*>(all);
        for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[lanes[i]->source & 31]->in;
    });
    return mine.out;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
    return emulator::shuffle("__shfl_sync", mask, x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask) {
    return emulator::shuffle("__shfl_xor_sync", mask, x, emulator::lane_number() ^ lane_mask);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
    for (int step = 1; step < 32; step *= 2) {
        x += emulator::shuffle("__reduce_add_sync", mask, x, emulator::lane_number() ^ step);
    }
    return x;
}
inline int __reduce_max_sync(unsigned mask, int x) {
    for (int step = 1; step < 32; step *= 2) {
        const int other = emulator::shuffle("__reduce_max_sync", mask, x, emulator::lane_number() ^ step);
        x = x > other ? x : other;
    }
    return x;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Vote {
        bool in;
        mutable unsigned out;
    };
    const Vote mine{predicate != 0, 0};
    emulator::warp_collective("a vote", mask, &mine, [](const void* const* all) {
        const auto* const* lanes = reinterpret_cast<const Vote* const*>(all);
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= lanes[i]->in ? 1u << i : 0;
        for (int i = 0; i < 32; ++i) lanes[i]->out = votes;
    });
    return mine.out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(a * 1ull * b >> 32); }
