// Warp-level matrix multiply-accumulate. PTX ISA: "Multiply-and-Accumulate Instruction: mma", shapes
// .m16n8k16 and .m16n8k8.
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// d (16 x 8 fp32) += a (16 x 16) * b (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8 (pairs); b: rows 2t and 2t + 8 (pairs) of column g;
//   d: row g, columns 2t and 2t + 1, then row g + 8.
template <bool bfloat16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (bfloat16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// d (16 x 8 fp32) += a (16 x 8) * b (8 x 8) in TF32: of the fp32 numbers the upper 19 bits count. A lane holds
//   a: rows g, g + 8, g, g + 8 of columns t, t, t + 4, t + 4; b: rows t and t + 4 of column g; d: as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuattn::ptx
