// Online softmax of a warpgroup's tile while a product with values is under way.
#pragma once

#include <attn/softmax.cuh>
#include <common/types.cuh>
#include <ptx/wgmma.cuh>

namespace cuattn {

// `x`, but not before `y` is known, a result of exp2_approx: the compiler has an order of its own otherwise. It does not know
// that these are never this number, -2^-149.
__device__ __forceinline__ float known_behind(float x, float y) { return __float_as_uint(y) == 0x80000001u ? y : x; }

// softmax_tile, and the packed weights, in the place of those that the product reads, which adds to `out`: it is waited for when
// weights of the first half are wanted, of which ptxas computes the named one first. Waits before the maxima, and behind half of
// the exponentials or all, were slower. `address`: any of shared memory.
template <class Products, int key_blocks, int value_blocks>
__device__ __forceinline__ void softmax_beside_product(float (&score)[key_blocks][4],
                                                       typename Products::Weights& weight,
                                                       float (&out)[value_blocks][4], RowStatistics& rows, float factor,
                                                       float (&rescale)[2], u32 address) {
    constexpr int half = key_blocks / 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rescale[row] = raise_reference(score, row, rows, factor);
        make_weights<0, half>(score, row, rows, factor);
    }
    ptx::wgmma_wait_after<0>(score[half - 1][3], address);
    ptx::wgmma_hold(out);
#pragma unroll
    for (int row = 0; row < 2; ++row) make_weights<half, key_blocks>(score, row, rows, factor);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rows.sum[row] = known_behind(__fmul_rn(rows.sum[row], rescale[row]), score[half - 1][3]);
        add_weights<0, key_blocks>(score, row, rows);
    }
    Products::pack(weight, score);
}

}  // namespace cuattn
