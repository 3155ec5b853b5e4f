// The same as fragments.cuh with the operands' places exchanged.
#pragma once

#include <attn/fragments.cuh>
#include <common/types.cuh>

namespace cuattn {

// The same products with the operands' places exchanged: what is a right operand of Fragments stands on the left of the
// instruction, and the result is transposed, with the same bits.
template <bool float32, bool bfloat16>
struct TransposedFragments : Fragments<float32, bfloat16> {};
template <>
struct TransposedFragments<true, false> : Fragments<true, false> {
    template <class Rows>
    __device__ __forceinline__ static Left load_left(u32 rows, int group, int lane) {
        return split<false>(Fragments<false, false>::load_left<Rows>(rows, group, lane).x);
    }

    template <class Rows>
    __device__ __forceinline__ static Right load_right(u32 rows, int first_row, int group, int lane) {
        return split<true>(Fragments<false, false>::load_right<Rows>(rows, first_row, group, lane).x);
    }

    __device__ __forceinline__ static void multiply_add(float (&low)[4], float (&high)[4], const Left& left,
                                                        const Right& right) {
        add_products(low, left, right, 0, left.high, right.low, left.low, right.high);
        add_products(high, left, right, 2, left.high, right.low, left.low, right.high);
    }
};

}  // namespace cuattn
