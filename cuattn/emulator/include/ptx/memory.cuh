// Host twin of kernels_cu/ptx/memory.cuh. Shared addresses are offsets into the block's shared memory.
#pragma once

#include <initializer_list>

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

namespace host {

inline void store_floats(float* to, std::initializer_list<float> numbers) {
    u32 bits[4];
    int count = 0;
    for (const float x : numbers) bits[count++] = emulator::device_bits_of(emulator::settled(x));
    emulator::store_global(to, bits, 4 * count);
}

}  // namespace host

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
inline void store_shared_f32x4(u32 to, float4 x) {
    for (const float each : {x.x, x.y, x.z, x.w}) emulator::settled(each);
    emulator::store_shared(to, &x, 16);
}

inline float2 load_shared_f32x2(u32 from) {
    float2 x;
    emulator::load_shared(&x, from, 8);
    return x;
}
inline void store_shared_f32x2(u32 to, float2 x) {
    for (const float each : {x.x, x.y}) emulator::settled(each);
    emulator::store_shared(to, &x, 8);
}

inline u32 load_shared_u32(u32 from) {
    u32 x;
    emulator::load_shared(&x, from, 4);
    return x;
}
inline void store_shared_u32(u32 to, u32 x) { emulator::store_shared(to, &x, 4); }

inline void store_shared_f32(u32 to, float x) {
    emulator::settled(x);
    emulator::store_shared(to, &x, 4);
}

inline u32 load_global_u32(const void* from) {
    u32 x;
    emulator::load_global(&x, from, 4);
    return x;
}
inline int load_global_s32(const int* from) {
    int x;
    emulator::load_global(&x, from, 4);
    return x;
}
inline int load_written_s32(const int* from) {
    int x;
    emulator::load_global(&x, from, 4);
    return x;
}
inline u32 load_global_u8(const unsigned char* from) {
    unsigned char x;
    emulator::load_global(&x, from, 1);
    return x;
}
inline uint4 load_global_u32x4(const void* from) {
    uint4 x;
    emulator::load_global(&x, from, 16);
    return x;
}
inline float load_global_f32(const float* from) {
    float x;
    emulator::load_global(&x, from, 4);
    return x;
}
inline float4 load_global_f32x4(const float* from) {
    float4 x;
    emulator::load_global(&x, from, 16);
    return x;
}
inline void store_global_u32(void* to, u32 x) { emulator::store_global(to, &x, 4); }
inline void store_global_s32(int* to, int x) { emulator::store_global(to, &x, 4); }
inline void store_global_u32x4(void* to, uint4 x) { emulator::store_global(to, &x, 16); }

inline void store_global_f32(float* to, float x) { host::store_floats(to, {x}); }
inline void store_global_u32x4_if(bool condition, void* to, uint4 x) {
    if (condition) store_global_u32x4(to, x);
}
inline void store_global_f32_if(bool condition, float* to, float x) {
    if (condition) store_global_f32(to, x);
}
inline void store_global_f32x2(float* to, float2 x) { host::store_floats(to, {x.x, x.y}); }
inline void store_global_f32x4(float* to, float4 x) { host::store_floats(to, {x.x, x.y, x.z, x.w}); }

}  // namespace cuattn::ptx
