// Clusters: blocks that run at the same time, as many as the launch says. PTX ISA: "barrier.cluster", "%cluster_nctaid".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

__device__ __forceinline__ int cluster_size() {
    int x;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(x));
    return x;
}

// The block's number in its cluster.
__device__ __forceinline__ int cluster_rank() {
    int x;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(x));
    return x;
}

// For all threads of all blocks of the cluster; what they wrote before it can be read behind it.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace cuattn::ptx
