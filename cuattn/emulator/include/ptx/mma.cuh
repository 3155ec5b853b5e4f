// Host twin of kernels_cu/ptx/mma.cuh.
#pragma once

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

namespace host {

struct Fragments {
    float* d;
    const u32* a;
    u32 b[2];
};

// The product of a warp's fragments, `depth` columns of a; `fill(a, b, fragments, g, t)` writes down what a lane holds.
template <int depth, class Fill>
void multiply(const void* const* all, int fraction, const Fill& fill) {
    emulator::Operand a[16][depth];
    emulator::OperandRow<8> b[depth];
    float c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& f = *static_cast<const Fragments*>(all[lane]);
        fill(a, b, f, lane / 4, lane % 4);
        for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2] = f.d[i];
    }
    emulator::multiply_add(c, a, b, fraction);
    for (int lane = 0; lane < 32; ++lane) {
        const auto& f = *static_cast<const Fragments*>(all[lane]);
        for (int i = 0; i < 4; ++i) f.d[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
}

}  // namespace host

template <bool bfloat16>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const host::Fragments mine{d, a, {b0, b1}};
    emulator::warp_collective(bfloat16 ? "mma.bf16" : "mma.f16", 0xffffffffu, &mine, [](const void* const* all) {
        const auto element = [](u32 pair, int i) {
            const u16 bits = static_cast<u16>(pair >> (16 * i));
            return bfloat16 ? emulator::bf16_operand(bits) : emulator::fp16_operand(bits);
        };
        host::multiply<16>(all, bfloat16 ? 7 : 10, [&](auto& a, auto& b, const host::Fragments& f, int g, int t) {
            for (int i = 0; i < 8; ++i) a[g + (i / 2) % 2 * 8][2 * t + i % 2 + i / 4 * 8] = element(f.a[i / 2], i % 2);
            for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8].set(g, element(f.b[i / 2], i % 2));
        });
    });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const host::Fragments mine{d, a, {b0, b1}};
    emulator::warp_collective("mma.tf32", 0xffffffffu, &mine, [](const void* const* all) {
        host::multiply<8>(all, 10, [](auto& a, auto& b, const host::Fragments& f, int g, int t) {
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = emulator::tf32_operand(f.a[i]);
            for (int i = 0; i < 2; ++i) b[t + 4 * i].set(g, emulator::tf32_operand(f.b[i]));
        });
    });
}

}  // namespace cuattn::ptx
