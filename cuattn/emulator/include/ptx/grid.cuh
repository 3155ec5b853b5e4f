// Host twin of kernels_cu/ptx/grid.cuh. Launches run one after the other; access.h checks that a kernel which may start early
// waits before it touches global memory.
#pragma once

#include <emulator/block.h>

namespace cuattn::ptx {

inline void wait_for_earlier_launches() { emulator::current().waited = true; }
inline void let_later_launches_start() {}

}  // namespace cuattn::ptx
