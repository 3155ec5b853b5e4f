// Shared memory to mma fragments, and back. PTX ISA: "Warp-level matrix load instruction: ldmatrix", "Warp-level matrix
// store instruction: stmatrix".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the shared address of row r (16 bytes) of matrix i.
// r[i]: row lane / 4, columns 2 (lane % 4) and the next, of matrix i.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// The same with every matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// The way back of ldmatrix_x4; sm_90 and later.
__device__ __forceinline__ void stmatrix_x4(u32 row, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

}  // namespace cuattn::ptx
