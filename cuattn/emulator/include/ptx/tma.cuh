// Host twin of kernels_cu/ptx/tma.cuh.
#pragma once

#include <emulator/tma.h>
#include <common/tensor_map.cuh>
#include <common/types.cuh>

namespace cuattn::ptx {

inline void tma_prefetch(const TensorMap& map) { emulator::Tensor4d{map}; }

template <bool once = false>
inline void tma_load_4d(u32 to, const TensorMap& map, int x, int y, int z, int w, u32 barrier) {
    emulator::start_box(to, map, {x, y, z, w}, barrier);
}

inline void tma_store_4d(const TensorMap& map, int x, int y, int z, int w, u32 from) {
    emulator::start_store(map, {x, y, z, w}, from);
}
inline void tma_store_commit() { emulator::commit_stores(); }
inline void tma_store_wait() { emulator::finish_stores(); }

inline void fence_async_proxy() {
    emulator::Moment& now = emulator::current().now;
    now.fenced = now.epoch++;
}

}  // namespace cuattn::ptx
