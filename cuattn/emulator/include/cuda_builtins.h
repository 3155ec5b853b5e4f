// What the CUDA compiler knows without an #include, for the host compiler. Every emulated unit includes it first.
#pragma once

#include <algorithm>
#include <cmath>

#include <emulator/access.h>
#include <emulator/block.h>
#include <emulator/formats.h>
#include <emulator/special_functions.h>
#include <emulator/tensor_core.h>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct float4 {
    float x, y, z, w;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }

inline unsigned __float_as_uint(float x) { return emulator::bits_of(x); }
inline float __uint_as_float(unsigned bits) { return emulator::float_of(bits); }

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
inline float __shfl_xor_sync(unsigned mask, float x, int lane_mask) {
    struct Exchange {
        float in;
        int lane_mask;
        mutable float out;
    };
    const Exchange mine{x, lane_mask, 0.0f};
    emulator::warp_collective("__shfl_xor_sync", mask, &mine, [&](const void* const* all) {
        const auto* const* lanes = reinterpret_cast<const Exchange* const*>(all);
        for (int i = 0; i < 32; ++i) {
            if (lanes[i]->lane_mask != lane_mask) emulator::fail("__shfl_xor_sync: lanes differ in the lane mask");
            lanes[i]->out = lanes[i ^ lane_mask]->in;
        }
    });
    return mine.out;
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
