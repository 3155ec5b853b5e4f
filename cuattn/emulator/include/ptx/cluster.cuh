// Host twin of kernels_cu/ptx/cluster.cuh.
#pragma once

#include <emulator/cluster.h>

namespace cuattn::ptx {

inline int cluster_size() { return emulator::cluster_size(); }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline void meet_cluster() { emulator::meet_cluster(); }

}  // namespace cuattn::ptx
