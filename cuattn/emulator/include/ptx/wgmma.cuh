// Host twin of kernels_cu/ptx/wgmma.cuh.
#pragma once

#include <emulator/wgmma.h>
#include <common/matrix_descriptor.cuh>
#include <common/types.cuh>

namespace cuattn::ptx {

inline void wgmma_fence() { emulator::current().wgmma_fence = true; }
inline void wgmma_commit() { emulator::commit_products(); }

template <int pending>
void wgmma_wait() {
    emulator::wait_for_products(pending);
}

template <int pending>
void wgmma_wait_after(float, u32) {
    wgmma_wait<pending>();
}

template <int blocks>
void wgmma_hold(float (&)[blocks][4]) {}

template <bool bfloat16, int blocks>
void wgmma_shared(float (&d)[blocks][4], u64 left, u64 right, bool accumulate) {
    static_assert(blocks == 8 || blocks == 16, "shapes that kernels use");
    emulator::issue_product<bfloat16, false, blocks>("wgmma_shared", {&d[0][0], nullptr, left, right, accumulate});
}

template <bool bfloat16, bool right_columns, int blocks>
void wgmma_registers(float (&d)[blocks][4], const u32 (&left)[4], u64 right, bool accumulate) {
    static_assert(blocks == 8 || blocks == 12 || blocks == 16 || blocks == 24 || blocks == 32,
                  "shapes that kernels use");
    emulator::issue_product<bfloat16, right_columns, blocks>("wgmma_registers", {&d[0][0], left, 0, right, accumulate});
}

}  // namespace cuattn::ptx
