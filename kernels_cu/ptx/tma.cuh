// Copies of boxes of a tensor by the copy engine (Tensor Memory Accelerator). PTX ISA: "cp.async.bulk.tensor",
// "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "prefetch.tensormap", "fence.proxy.async".
#pragma once

#include <common/tensor_map.cuh>
#include <common/types.cuh>

namespace cuattn::ptx {

// Asks for a description that copies will need soon. By one thread.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box at the given coordinates to the shared address `to`; what lies outside of the tensor becomes zeros.
// The bytes of the whole box count at `barrier`. `once`: nobody reads it again soon, and the L2 cache need not keep it. By one
// thread.
template <bool once = false>
__device__ __forceinline__ void tma_load_4d(u32 to, const TensorMap& map, int x, int y, int z, int w, u32 barrier) {
    if constexpr (once) {
        asm volatile(
            "{\n"
            ".reg .b64 policy;\n"
            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, "
            "{%2, %3, %4, %5}], [%6], policy;\n"
            "}" ::"r"(to),
            "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
            "%5}], "
            "[%6];" ::"r"(to),
            "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
            : "memory");
    }
}

// Copies the map's box from the shared address `from` to the given coordinates; what lies behind the tensor's end is left
// out, but no coordinate may be negative: on an H200 that was an illegal instruction. By one thread, which closes a group
// of such copies with tma_store_commit.
__device__ __forceinline__ void tma_store_4d(const TensorMap& map, int x, int y, int z, int w, u32 from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(x), "r"(y), "r"(z), "r"(w), "r"(from)
                 : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's groups have read shared memory, before that is written again or the thread ends.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Makes this thread's earlier stores to shared memory visible to wgmma and the copy engine, for those threads that a barrier
// then tells of them.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace cuattn::ptx
