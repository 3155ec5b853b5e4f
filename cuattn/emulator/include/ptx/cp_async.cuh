// Host twin of kernels_cu/ptx/cp_async.cuh.
#pragma once

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

inline void cp_async_16(u32 to, const void* from, bool valid) { emulator::start_copy(to, from, valid); }

inline void cp_async_commit() {
    emulator::Thread& me = emulator::current();
    me.groups.push_back(std::move(me.open_group));
    me.open_group.clear();
}

template <int pending>
void cp_async_wait() {
    emulator::finish_copies(pending);
}

}  // namespace cuattn::ptx
