// Description of a tensor in memory for the copy engine of Hopper GPUs. CUDA driver API: "CUtensorMap", of which only
// the driver knows the inside; the emulator has a form of its own (cuattn/tensor_map.py).
#pragma once

#include <common/types.cuh>

namespace cuattn {

struct alignas(64) TensorMap {
    u64 words[16];
};

}  // namespace cuattn
