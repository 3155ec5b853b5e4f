// Paged caches: which page of the cache holds a position of a sequence.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>

namespace cuattn {

// The number, within its sequence, of the page that holds a position: position / page_size.
__device__ __forceinline__ int page_of(const Sequences& sequences, int position) {
    return static_cast<int>(__umulhi(2u * position, sequences.page_magic) >> sequences.page_shift);
}

}  // namespace cuattn
