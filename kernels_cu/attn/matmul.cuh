// Products of tiles for warps that hold several blocks of 16 rows: each right operand is read from shared memory once.
// Results are held as in products.cuh, a block of rows behind the other.
#pragma once

#include <attn/fragments.cuh>
#include <common/types.cuh>

namespace cuattn {

// Groups of a sum over `columns` columns.
template <class Fragments>
__device__ constexpr int groups_of(int columns) {
    return (columns + Fragments::depth - 1) / Fragments::depth;
}

// Of `columns` columns those of each of `warps` warps, in whole right operands.
template <int warps>
__device__ constexpr int share_of(int columns) {
    return (columns + 16 * warps - 1) / (16 * warps) * 16;
}

// result = left right^T over `groups` groups of columns ascending: rows 16 m and following of the tile at `left`, rows 8 b
// and following of the one at `right`, both of type Rows.
template <class Fragments, class Rows, int groups, int row_blocks, int blocks>
__device__ __forceinline__ void multiply_rows(float (&result)[row_blocks][blocks][4], u32 left, u32 right, int lane) {
    static_assert(blocks % 2 == 0);
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
        for (int b = 0; b < blocks; ++b) result[m][b][0] = result[m][b][1] = result[m][b][2] = result[m][b][3] = 0.0f;
    }
#pragma unroll(Fragments::depth / 8)  // more costs registers
    for (int k = 0; k < groups; ++k) {
        typename Fragments::Left rows[row_blocks];
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
            rows[m] = Fragments::template load_left<Rows>(left + 16 * m * Rows::row_bytes, k, lane);
        }
#pragma unroll
        for (int b = 0; b < blocks; b += 2) {
            const typename Fragments::Right columns = Fragments::template load_right<Rows>(right, 8 * b, k, lane);
#pragma unroll
            for (int m = 0; m < row_blocks; ++m) {
                Fragments::multiply_add(result[m][b], result[m][b + 1], rows[m], columns);
            }
        }
    }
}

// sum += left right over groups of the tile's rows ascending: `left` is rounded to the element type; of the tile at
// `right` the columns from `column` on.
template <class Fragments, class Rows, int row_blocks, int blocks, int columns>
__device__ __forceinline__ void add_product(float (&sum)[row_blocks][columns][4],
                                            const float (&left)[row_blocks][blocks][4], u32 right, int column,
                                            int lane) {
    static_assert(columns % 2 == 0);
#pragma unroll
    for (int k = 0; k < blocks * 8 / Fragments::depth; ++k) {
        if (k % Fragments::unrolled == 0 && Fragments::unrolled < 16)
            __syncwarp();  // else ptxas loads ahead, and spills
        typename Fragments::Left rows[row_blocks];
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) rows[m] = Fragments::from_result(left[m], k);
#pragma unroll
        for (int b = 0; b < columns; b += 2) {
            const typename Fragments::Right values =
                Fragments::template load_right_columns<Rows>(right, k, column + 8 * b, lane);
#pragma unroll
            for (int m = 0; m < row_blocks; ++m) Fragments::multiply_add(sum[m][b], sum[m][b + 1], rows[m], values);
        }
    }
}

}  // namespace cuattn
