// Host twin of kernels_cu/ptx/memory.cuh. Shared addresses are offsets into the block's shared memory.
#pragma once

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

inline void* dynamic_shared() { return emulator::block->shared.bytes(); }

inline u32 shared_address(const void* pointer) {
    const auto offset = static_cast<const char*>(pointer) - emulator::block->shared.bytes();
    if (offset < 0 || offset >= emulator::block->shared.size()) emulator::fail("shared_address: not in shared memory");
    return static_cast<u32>(offset);
}

inline float4 load_shared_f32x4(u32 from) {
    float4 x;
    emulator::load_shared(&x, from, 16);
    return x;
}
inline void store_shared_f32x4(u32 to, float4 x) { emulator::store_shared(to, &x, 16); }

inline uint4 load_shared_u32x4(u32 from) {
    uint4 x;
    emulator::load_shared(&x, from, 16);
    return x;
}
inline void store_shared_u32(u32 to, u32 x) { emulator::store_shared(to, &x, 4); }

inline int load_global_s32(const int* from) {
    int x;
    emulator::load_global(&x, from, 4);
    return x;
}
inline void store_global_u32x4(void* to, uint4 x) { emulator::store_global(to, &x, 16); }

// Arithmetic on a device makes one NaN only, 0x7fffffff; the host's NaN have signs and payloads.
inline void store_global_f32(float* to, float x) {
    const u32 bits = x == x ? __float_as_uint(x) : 0x7fffffffu;
    emulator::store_global(to, &bits, 4);
}

}  // namespace cuattn::ptx
