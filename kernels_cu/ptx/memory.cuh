// Ordinary loads and stores. PTX ISA: "ld", "st", "cvta". Every access of a kernel to memory goes through a wrapper, so
// that the emulator can check it.
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// The block's dynamic shared memory.
__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char bytes[];
    return bytes;
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float4 load_shared_f32x4(u32 from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_shared_f32x4(u32 to, float4 x) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

__device__ __forceinline__ float2 load_shared_f32x2(u32 from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared_f32x2(u32 to, float2 x) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ u32 load_shared_u32(u32 from) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared_u32(u32 to, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared_f32(u32 to, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

// Memory that nobody writes to while the kernel runs. Volatile: the compiler takes other asm for free of effects, and
// moves it out of the condition that says whether there is such memory.
__device__ __forceinline__ int load_global_s32(const int* from) {
    int x;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

__device__ __forceinline__ u32 load_global_u32(const void* from) {
    u32 x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

// Memory that this kernel writes to, or that one before it has not finished to write when it starts.
__device__ __forceinline__ int load_written_s32(const int* from) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ u32 load_global_u8(const unsigned char* from) {
    u32 x;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ uint4 load_global_u32x4(const void* from) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

__device__ __forceinline__ float load_global_f32(const float* from) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ float4 load_global_f32x4(const float* from) {
    float4 x;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_global_u32(void* to, u32 x) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_global_f32x2(float* to, float2 x) {
    asm volatile("st.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ void store_global_f32x4(float* to, float4 x) {
    asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// Where `condition` holds; without a branch.
__device__ __forceinline__ void store_global_u32x4_if(bool condition, void* to, uint4 x) {
    asm volatile(
        "{\n"
        ".reg .pred condition;\n"
        "setp.ne.u32 condition, %0, 0;\n"
        "@condition st.global.v4.u32 [%1], {%2,%3,%4,%5};\n"
        "}" ::"r"(u32(condition)),
        "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
}
__device__ __forceinline__ void store_global_f32_if(bool condition, float* to, float x) {
    asm volatile(
        "{\n"
        ".reg .pred condition;\n"
        "setp.ne.u32 condition, %0, 0;\n"
        "@condition st.global.f32 [%1], %2;\n"
        "}" ::"r"(u32(condition)),
        "l"(to), "f"(x)
        : "memory");
}

__device__ __forceinline__ void store_global_s32(int* to, int x) {
    asm volatile("st.global.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_global_u32x4(void* to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ void store_global_f32(float* to, float x) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

}  // namespace cuattn::ptx
