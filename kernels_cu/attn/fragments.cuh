// What mma.sync multiplies: parts of tiles in a warp's registers, `depth` columns of the sum at a time. Left operands have
// 16 rows, right operands 16 columns; results are held as in products.cuh, in two blocks of 8 columns.
#pragma once

#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>

namespace cuattn {

template <bool float32, bool bfloat16>
struct Fragments;

// 16 bits: the tensor core adds groups of 16 products to the accumulator.
template <bool bfloat16>
struct Fragments<false, bfloat16> {
    using Element = u16;
    static constexpr int depth = 16, unrolled = 16, most_groups = 16;
    struct Left {
        u32 x[4];
    };
    struct Right {
        u32 x[4];
    };

    // Columns `group` * depth and following of 16 rows of a tile, from first_row on.
    template <class Rows>
    __device__ __forceinline__ static Left load_left(u32 rows, int group, int lane, int first_row = 0) {
        Left left;
        ptx::ldmatrix_x4(left.x, rows + Rows::offset(first_row + (lane & 15), 2 * group + (lane >> 4)));
        return left;
    }

    // Rows `group` * depth and following of 16 columns of a tile, from `column` on, which are the rows of the left operand.
    template <class Rows>
    __device__ __forceinline__ static Left load_left_columns(u32 rows, int group, int column, int lane) {
        const int row = (lane & 7) + (lane >> 4) * 8, unit = (lane >> 3) & 1;
        Left left;
        ptx::ldmatrix_x4_trans(left.x, rows + Rows::offset(16 * group + row, column / 8 + unit));
        return left;
    }

    // The same of rows first_row and following, which are the columns of the right operand.
    template <class Rows>
    __device__ __forceinline__ static Right load_right(u32 rows, int first_row, int group, int lane) {
        const int row = (lane & 7) + (lane >> 4) * 8, unit = (lane >> 3) & 1;
        Right right;
        ptx::ldmatrix_x4(right.x, rows + Rows::offset(row + first_row, unit + 2 * group));
        return right;
    }

    // Rows `group` * depth and following of 16 columns of a tile, from `column` on.
    template <class Rows>
    __device__ __forceinline__ static Right load_right_columns(u32 rows, int group, int column, int lane) {
        Right right;
        ptx::ldmatrix_x4_trans(right.x, rows + Rows::offset(16 * group + (lane & 15), column / 8 + (lane >> 4)));
        return right;
    }

    // Columns `group` * depth and following of a result, rounded to the element type; for load_right_columns.
    template <int blocks>
    __device__ __forceinline__ static Left from_result(const float (&result)[blocks][4], int group) {
        Left left;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = &result[2 * group + i / 2][2 * (i & 1)];
            left.x[i] = ptx::pack_16bit<bfloat16>(pair[0], pair[1]);
        }
        return left;
    }

    __device__ __forceinline__ static void multiply_add(float (&low)[4], float (&high)[4], const Left& left,
                                                        const Right& right) {
        ptx::mma_m16n8k16<bfloat16>(low, left.x, right.x[0], right.x[1]);
        ptx::mma_m16n8k16<bfloat16>(high, left.x, right.x[2], right.x[3]);
    }
};

// fp32 as two TF32 numbers each, of which three of the four products count. Tensor cores truncate, so every group of 8
// products starts at +0 and is added in fp32.
template <>
struct Fragments<true, false> {
    using Element = float;
    // unrolled: groups at a time, where a loop may choose. most_groups: where it may not; more are taken in two halves.
    static constexpr int depth = 8, unrolled = 1, most_groups = 4;
    struct Left {
        u32 high[4], low[4];
    };
    using Right = Left;

    template <class Rows>
    __device__ __forceinline__ static Left load_left(u32 rows, int group, int lane) {
        return split<true>(Fragments<false, false>::load_left<Rows>(rows, group, lane).x);
    }

    template <class Rows>
    __device__ __forceinline__ static Right load_right(u32 rows, int first_row, int group, int lane) {
        return split<false>(Fragments<false, false>::load_right<Rows>(rows, first_row, group, lane).x);
    }

    // In the order of from_result: of the group's rows first those of even number.
    template <class Rows>
    __device__ __forceinline__ static Right load_right_columns(u32 rows, int group, int column, int lane) {
        Right right;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Tile::offset of unit (first + lane / 16), with what differs between columns apart, for addresses to share
            const int row = 2 * (lane & 3) + i % 2, first = column / 4 + 2 * (i / 2);
            const u32 unit = (first & ~7) + ((first & 7) ^ (lane >> 4) ^ row);
            split_right(
                right, i,
                ptx::load_shared_u32(rows + (8 * group + row) * Rows::row_bytes + unit * 16 + lane / 4 % 4 * 4));
        }
        return right;
    }

    template <int blocks>
    __device__ __forceinline__ static Left from_result(const float (&result)[blocks][4], int group) {
        Left left;
#pragma unroll
        for (int i = 0; i < 4; ++i) split_left(left, i, result[group][2 * (i & 1) + i / 2]);
        return left;
    }

    __device__ __forceinline__ static void multiply_add(float (&low)[4], float (&high)[4], const Left& left,
                                                        const Right& right) {
        add_products(low, left, right, 0, left.low, right.high, left.high, right.low);
        add_products(high, left, right, 2, left.low, right.high, left.high, right.low);
    }

  protected:
    // Four elements of a fragment of the mma instruction, as those of a left or a right operand.
    template <bool is_left>
    __device__ __forceinline__ static Left split(const u32 (&x)[4]) {
        Left both;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (is_left) {
                split_left(both, i, __uint_as_float(x[i]));
            } else {
                split_right(both, i, x[i]);
            }
        }
        return both;
    }

    static constexpr u32 kept = 0xffffe000u;  // the bits of a TF32 number; tensor cores do not look at the others
    static constexpr float largest = __builtin_bit_cast(float, 0x7f7fe000u);

    // The nearest TF32 number that is finite, and the rest.
    __device__ __forceinline__ static void split_left(Left& left, int i, float x) {
        const float rounded = __uint_as_float((__float_as_uint(x) + 0x1000u) & kept);
        const float high = fminf(fmaxf(rounded, -largest), largest);
        left.high[i] = __float_as_uint(high);
        left.low[i] = __float_as_uint(__fsub_rn(x, high));
    }

    // The TF32 number toward zero, and the rest, rounded. With the left operand's rest of either sign, the product of both
    // rests may be left out.
    __device__ __forceinline__ static void split_right(Right& right, int i, u32 x) {
        right.high[i] = x & kept;
        right.low[i] = __float_as_uint(__fsub_rn(__uint_as_float(x), __uint_as_float(right.high[i]))) + 0x1000u;
    }

    // Adds a0 b0 + a1 b1 + left.high right.high, b being elements i and i + 1 of a right operand.
    __device__ __forceinline__ static void add_products(float (&sum)[4], const Left& left, const Right& right, int i,
                                                        const u32 (&a0)[4], const u32 (&b0)[4], const u32 (&a1)[4],
                                                        const u32 (&b1)[4]) {
        float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        ptx::mma_m16n8k8_tf32(products, a0, b0[i], b0[i + 1]);
        ptx::mma_m16n8k8_tf32(products, a1, b1[i], b1[i + 1]);
        ptx::mma_m16n8k8_tf32(products, left.high, right.high[i], right.high[i + 1]);
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] = __fadd_rn(sum[c], products[c]);
    }
};

}  // namespace cuattn
