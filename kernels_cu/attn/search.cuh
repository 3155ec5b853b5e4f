// Finding the sequence of a packed batch that a token or a tile belongs to.
#pragma once

#include <common/types.cuh>

namespace cuattn {

// The last of `count` sequences that `starts_before` is true of, the first if there is none: it is true of some first
// ones and false of the others. The warp searches together, 32 ways at a time; a lane may be asked about any sequence.
template <class StartsBefore>
__device__ __forceinline__ int last_sequence(int count, int lane, const StartsBefore& starts_before) {
    int first = 0;
    while (count > 1) {
        const int step = (count + 31) / 32, offset = lane * step;
        const bool before = offset < count && starts_before(first + offset);
        const int found = max(0, __popc(__ballot_sync(0xffffffffu, before)) - 1);
        first += found * step;
        count = min(step, count - found * step);
    }
    return first;
}

// The same by one thread alone, which may ask about another place than its neighbours.
template <class StartsBefore>
__device__ __forceinline__ int last_sequence_alone(int count, const StartsBefore& starts_before) {
    int first = 0;
    while (count > 1) {
        const int half = count / 2;
        if (starts_before(first + half)) {
            first += half;
            count -= half;
        } else {
            count = half;
        }
    }
    return first;
}

}  // namespace cuattn
