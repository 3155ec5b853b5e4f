// Blocks that run together and meet in a barrier of theirs.
#pragma once

#include <cstdint>

#include <emulator/block.h>

namespace emulator {

// For each thread of the cluster; what they wrote to global memory before it the others may read behind it.
inline void meet_cluster() {
    Cluster& cluster = *block->cluster;
    Thread& me = current();
    ++block->progress;
    if (++block->arrived_in_cluster == block->threads) {
        block->arrived_in_cluster = 0;
        synchronize_threads(0, block->threads);
    }
    if (++cluster.arrived == cluster.blocks * block->threads) {
        cluster.arrived = 0;
        ++cluster.generation;
    } else {
        wait_for_end_of(cluster.generation);
    }
    me.met_cluster = true;
}

inline int cluster_size() { return block->cluster->blocks; }
inline int cluster_rank() { return static_cast<int>(block->number() - block->cluster->first_number); }

}  // namespace emulator
