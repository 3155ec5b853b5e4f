// Host twin of kernels_cu/ptx/mbarrier.cuh.
#pragma once

#include <emulator/mbarrier.h>
#include <common/types.cuh>

namespace cuattn::ptx {

constexpr int mbarrier_bytes = emulator::mbarrier_bytes;

inline void mbarrier_init(u32 barrier, int arrivals) { emulator::init_mbarrier(barrier, arrivals); }

inline void mbarrier_init_fence() { emulator::fence_mbarriers(); }

inline void mbarrier_arrive(u32 barrier) { emulator::arrive("mbarrier_arrive", barrier, 0); }

inline void mbarrier_arrive_expect(u32 barrier, int bytes) {
    emulator::arrive("mbarrier_arrive_expect", barrier, bytes);
}

inline void mbarrier_wait(u32 barrier, u32 parity) { emulator::wait_for_phase(barrier, parity); }

}  // namespace cuattn::ptx
