// Asynchronous copies from global to shared memory. PTX ISA: "cp.async", "cp.async.commit_group",
// "cp.async.wait_group".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// 16 bytes to the shared address `to`: from `from` where `valid`, else zeros without reading memory. Bypasses L1.
__device__ __forceinline__ void cp_async_16(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Closes the group of this thread's copies since the last commit (a group may be empty).
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are still under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace cuattn::ptx
