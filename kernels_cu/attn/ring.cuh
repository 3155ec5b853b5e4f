// The ring of tiles between the warps that copy and the warpgroups that compute. A slot's barrier `filled` ends a phase when
// its tile is there, `free` when every consumer warp has read it. Steps are in the order of
// use: K0 K1 V0 K2 V1 ... V(n - 1).
#pragma once

#include <common/types.cuh>
#include <ptx/mbarrier.cuh>

namespace cuattn {

// The slot of a step, and the parity of its turn.
template <int slots>
struct RingPlace {
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ RingPlace next() const {
        return slot + 1 == slots ? RingPlace{0, parity ^ 1} : RingPlace{slot + 1, parity};
    }
};

// Calls copy(place, values, tile) for the keys (values false) and values of tiles [first, end), each as soon as its slot is
// free.
template <int slots, class Copy>
__device__ __forceinline__ void fill_ring(u32 free, int first, int end, Copy& copy) {
    RingPlace<slots> place;
    const auto step = [&](bool values, int tile) {
        ptx::mbarrier_wait(free + place.slot * ptx::mbarrier_bytes, place.parity ^ 1);
        copy(place, values, tile);
        place = place.next();
    };
#pragma unroll 1
    for (int tile = first; tile <= end; ++tile) {
        if (tile < end) step(false, tile);
        if (tile > first) step(true, tile - 1);
    }
}

}  // namespace cuattn
