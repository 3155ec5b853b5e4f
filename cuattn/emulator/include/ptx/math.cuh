// Host twin of kernels_cu/ptx/math.cuh.
#pragma once

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

inline float exp2_approx(float x) { return emulator::exp2_approx(emulator::settled(x)); }

template <bool bfloat16>
u32 pack_16bit(float low, float high) {
    const auto convert = bfloat16 ? emulator::to_bf16 : emulator::to_fp16;
    return convert(emulator::settled(low)) | static_cast<u32>(convert(emulator::settled(high))) << 16;
}

template <bool bfloat16>
float2 unpack_16bit(u32 packed) {
    const auto convert = [](u32 bits) {
        return bfloat16 ? emulator::float_of(bits << 16) : emulator::from_fp16(static_cast<u16>(bits));
    };
    return {convert(packed & 0xffffu), convert(packed >> 16)};
}

}  // namespace cuattn::ptx
