// Host twin of kernels_cu/ptx/warpgroup.cuh.
#pragma once

#include <emulator/named_barrier.h>

namespace cuattn::ptx {

template <int registers>
void release_registers() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    emulator::set_registers("release_registers", registers);
}
template <int registers>
void claim_registers() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    emulator::set_registers("claim_registers", registers);
}

template <int threads>
void barrier_sync(int id) {
    static_assert(threads % 32 == 0 && threads > 0);
    emulator::arrive_named("barrier_sync", id, threads, true);
}
template <int threads>
void barrier_arrive(int id) {
    static_assert(threads % 32 == 0 && threads > 0);
    emulator::arrive_named("barrier_arrive", id, threads, false);
}

}  // namespace cuattn::ptx
