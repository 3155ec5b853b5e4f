// The ring of tiles between the warps that copy and the warpgroups that compute. A slot's barrier `filled` ends a phase when
// its tile is there, `free` when every warp that reads it has. Steps are in the order of use: K0 K1 V0 K2 V1 ... V(n - 1), or
// without keys_ahead K0 V0 K1 V1 ...
#pragma once

#include <common/types.cuh>
#include <ptx/mbarrier.cuh>

namespace cuattn {

// Where the ring is: shared addresses of its first slot and barriers.
struct RingAddress {
    u32 slots, filled, free;
    u32 landed;  // a barrier for the copy of a tile that needs more than a copy

    // Makes the barriers ready: so many arrivals fill a slot, and so many free it. By one thread.
    __device__ __forceinline__ void init(int slots, int fillers, int readers) const {
        for (int i = 0; i < slots; ++i) {
            ptx::mbarrier_init(filled + i * ptx::mbarrier_bytes, fillers);
            ptx::mbarrier_init(free + i * ptx::mbarrier_bytes, readers);
        }
        ptx::mbarrier_init(landed, 1);
        ptx::mbarrier_init_fence();
    }
};

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
// free. The first one's place is `place`, which becomes that of the step behind the last one.
template <int slots, bool keys_ahead, class Copy>
__device__ __forceinline__ void fill_ring(u32 free, RingPlace<slots>& place, int first, int end, Copy& copy) {
    const auto step = [&](bool values, int tile) {
        ptx::mbarrier_wait(free + place.slot * ptx::mbarrier_bytes, place.parity ^ 1);
        __syncwarp();  // all lanes have seen it, before one of them may begin the slot's next turn
        copy(place, values, tile);
        place = place.next();
    };
#pragma unroll 1
    for (int tile = first; tile < end + keys_ahead; ++tile) {
        if (tile < end) step(false, tile);
        if (tile >= first + keys_ahead) step(true, tile - keys_ahead);
    }
}

}  // namespace cuattn
