// Matrix products of a warpgroup (128 threads, 64 rows), which run while the threads go on. PTX ISA: "Asynchronous
// Warpgroup Level Matrix Instructions: wgmma". Of a warpgroup's warps number w holds the rows 16 w and following of the
// result, in the form of mma.cuh: blocks of 8 columns, with d[b][c] in row lane / 4 + 8 (c / 2), column 8 b + 2 (lane % 4) + c % 2.
//
// Between wgmma_fence and the wait for a group neither its results nor its register operands may be touched.
#pragma once

#include <common/matrix_descriptor.cuh>
#include <common/types.cuh>

namespace cuattn::ptx {

// Before the first product, and after registers that products read or add to were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` of the newest groups are still under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The same, but not before `x` is known, which is not -2^-149: ptxas would wait at once, and nothing would run beside the
// products. A store that never happens holds it up; `address` may be any of shared memory.
template <int pending>
__device__ __forceinline__ void wgmma_wait_after(float x, u32 address) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.eq.u32 never, %0, 0x80000001;\n@never st.volatile.shared.u32 [%1], %0;\n}" ::"r"(
            __float_as_uint(x)),
        "r"(address)
        : "memory");
    wgmma_wait<pending>();
}

// Keeps the compiler from moving uses of results to before this point.
template <int blocks>
__device__ __forceinline__ void wgmma_hold(float (&d)[blocks][4]) {
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
#pragma unroll
        for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[b][c])::"memory");
    }
}

#define CUATTN_LIST(...) __VA_ARGS__
#define CUATTN_BLOCK(b) "+f"(d[b][0]), "+f"(d[b][1]), "+f"(d[b][2]), "+f"(d[b][3])
#define CUATTN_BLOCKS_4(b) CUATTN_BLOCK(b), CUATTN_BLOCK(b + 1), CUATTN_BLOCK(b + 2), CUATTN_BLOCK(b + 3)
#define CUATTN_BLOCKS_8(b) CUATTN_BLOCKS_4(b), CUATTN_BLOCKS_4(b + 4)
#define CUATTN_REGISTERS_0                                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define CUATTN_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CUATTN_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUATTN_REGISTERS_64                                                                                            \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CUATTN_REGISTERS_96                                                                                            \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CUATTN_SHARED(columns, registers, results, a, b, add, type)                                             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add                                                  \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, %" #a \
                 ", %" #b ", add, 1, 1, 0, 0;\n}"                                                               \
                 : results                                                                                      \
                 : "l"(left), "l"(right), "r"(int(accumulate)))
#define CUATTN_REGISTER(columns, registers, results, a0, a1, a2, a3, b, add, trans, type)                         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add                                                    \
                 ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, {%" #a0 \
                 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", add, 1, 1, %" #trans ";\n}"                           \
                 : results                                                                                        \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(int(accumulate)),      \
                   "n"(int(right_columns)))

// d (64 x 8 blocks) = left (64 x 16) * right^T (8 blocks x 16), both tiles' rows; or added to d where `accumulate`.
template <bool bfloat16, int blocks>
__device__ __forceinline__ void wgmma_shared(float (&d)[blocks][4], u64 left, u64 right, bool accumulate) {
    static_assert(blocks == 8 || blocks == 16, "shapes that kernels use");
    if constexpr (blocks == 8 && bfloat16) {
        CUATTN_SHARED(64, CUATTN_REGISTERS_0, CUATTN_LIST(CUATTN_BLOCKS_8(0)), 32, 33, 34, "bf16");
    } else if constexpr (blocks == 8) {
        CUATTN_SHARED(64, CUATTN_REGISTERS_0, CUATTN_LIST(CUATTN_BLOCKS_8(0)), 32, 33, 34, "f16");
    } else if constexpr (blocks == 16 && bfloat16) {
        CUATTN_SHARED(128, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48,
                      CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8)), 64, 65, 66, "bf16");
    } else if constexpr (blocks == 16) {
        CUATTN_SHARED(128, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48,
                      CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8)), 64, 65, 66, "f16");
    }
}

// The same with the left operand in registers, as mma.cuh has it, and the right one a tile's columns (16 x 8 blocks) or rows.
template <bool bfloat16, bool right_columns, int blocks>
__device__ __forceinline__ void wgmma_registers(float (&d)[blocks][4], const u32 (&left)[4], u64 right,
                                                bool accumulate) {
    static_assert(blocks == 8 || blocks == 12 || blocks == 16 || blocks == 24 || blocks == 32,
                  "shapes that kernels use");
    if constexpr (blocks == 8 && bfloat16) {
        CUATTN_REGISTER(64, CUATTN_REGISTERS_0, CUATTN_LIST(CUATTN_BLOCKS_8(0)), 32, 33, 34, 35, 36, 37, 38, "bf16");
    } else if constexpr (blocks == 8) {
        CUATTN_REGISTER(64, CUATTN_REGISTERS_0, CUATTN_LIST(CUATTN_BLOCKS_8(0)), 32, 33, 34, 35, 36, 37, 38, "f16");
    } else if constexpr (blocks == 12 && bfloat16) {
        CUATTN_REGISTER(96, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32, CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_4(8)),
                        48, 49, 50, 51, 52, 53, 54, "bf16");
    } else if constexpr (blocks == 12) {
        CUATTN_REGISTER(96, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32, CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_4(8)),
                        48, 49, 50, 51, 52, 53, 54, "f16");
    } else if constexpr (blocks == 16 && bfloat16) {
        CUATTN_REGISTER(128, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48,
                        CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8)), 64, 65, 66, 67, 68, 69, 70, "bf16");
    } else if constexpr (blocks == 16) {
        CUATTN_REGISTER(128, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48,
                        CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8)), 64, 65, 66, 67, 68, 69, 70, "f16");
    } else if constexpr (blocks == 24 && bfloat16) {
        CUATTN_REGISTER(192, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48 CUATTN_REGISTERS_64,
                        CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8), CUATTN_BLOCKS_8(16)), 96, 97, 98, 99, 100,
                        101, 102, "bf16");
    } else if constexpr (blocks == 24) {
        CUATTN_REGISTER(192, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48 CUATTN_REGISTERS_64,
                        CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8), CUATTN_BLOCKS_8(16)), 96, 97, 98, 99, 100,
                        101, 102, "f16");
    } else if constexpr (blocks == 32 && bfloat16) {
        CUATTN_REGISTER(
            256, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48 CUATTN_REGISTERS_64 CUATTN_REGISTERS_96,
            CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8), CUATTN_BLOCKS_8(16), CUATTN_BLOCKS_8(24)), 128, 129,
            130, 131, 132, 133, 134, "bf16");
    } else if constexpr (blocks == 32) {
        CUATTN_REGISTER(
            256, CUATTN_REGISTERS_0 CUATTN_REGISTERS_32 CUATTN_REGISTERS_48 CUATTN_REGISTERS_64 CUATTN_REGISTERS_96,
            CUATTN_LIST(CUATTN_BLOCKS_8(0), CUATTN_BLOCKS_8(8), CUATTN_BLOCKS_8(16), CUATTN_BLOCKS_8(24)), 128, 129,
            130, 131, 132, 133, 134, "f16");
    }
}

#undef CUATTN_BLOCK
#undef CUATTN_BLOCKS_4
#undef CUATTN_BLOCKS_8
#undef CUATTN_REGISTERS_0
#undef CUATTN_REGISTERS_32
#undef CUATTN_REGISTERS_48
#undef CUATTN_REGISTERS_64
#undef CUATTN_REGISTERS_96
#undef CUATTN_SHARED
#undef CUATTN_REGISTER
#undef CUATTN_LIST

}  // namespace cuattn::ptx
