// What warps of a block do together, short of all of them. PTX ISA: "setmaxnreg", "bar.sync", "bar.arrive".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// Gives registers back, or asks for more, until this thread may use `registers`. By all threads of a warpgroup (four warps).
template <int registers>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Barrier `id` (1 to 15) of `threads` threads, whole warps: those that wait, and those that only say that they have come.
template <int threads>
__device__ __forceinline__ void barrier_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}
template <int threads>
__device__ __forceinline__ void barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

}  // namespace cuattn::ptx
