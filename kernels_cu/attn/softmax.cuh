// Online softmax of one lane's two rows (g and g + 8 of its warp's 16) in the contract's order: docs/numerics.md.
#pragma once

#include <common/logarithm.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>

namespace cuattn {

constexpr u32 all_lanes = 0xffffffffu;
constexpr float no_reference = -3.40282347e38f;  // "no key seen yet": finite, so that no inf - inf can appear

// Reference (the running maximum times the factor) and sum of weights of the lane's two rows.
// Inside a chunk `sum` holds this lane's columns alone; quad_sum completes it.
struct RowStatistics {
    float reference[2], sum[2];

    __device__ __forceinline__ void reset() {
        reference[0] = reference[1] = no_reference;
        sum[0] = sum[1] = 0.0f;
    }
};

// Sum over the four lanes of a row, `step` lanes apart: the first two and the last two, then both.
template <int step = 1>
__device__ __forceinline__ float quad_sum(float x) {
    x = __fadd_rn(x, __shfl_xor_sync(all_lanes, x, step));
    return __fadd_rn(x, __shfl_xor_sync(all_lanes, x, 2 * step));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(all_lanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(all_lanes, x, 2));
}

// The largest of all lanes' numbers, of which none is NaN: as integers of the same order.
__device__ __forceinline__ float warp_max(float x) {
    const auto ordered = [](u32 bits) { return bits ^ (static_cast<int>(bits) >> 31 & 0x7fffffff); };
    return __uint_as_float(ordered(__reduce_max_sync(all_lanes, static_cast<int>(ordered(__float_as_uint(x))))));
}

// Scores of columns from `visible[row]` on (counted from the tile's first key) become -inf. The column of score[b][c] is
// 8 b + 2 (lane % 4) + c % 2.
template <int blocks>
__device__ __forceinline__ void mask_scores(float (&score)[blocks][4], const int (&visible)[2], int lane) {
    const int column = 2 * (lane & 3);
    const int end[2] = {visible[0] - column, visible[1] - column};
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
#pragma unroll
        for (int c = 0; c < 4; ++c) score[b][c] = 8 * b + (c & 1) < end[c >> 1] ? score[b][c] : -infinity;
    }
}

// Brings a row's reference to what a tile's largest score asks for; returns what everything accumulated under the old one must
// be multiplied with.
__device__ __forceinline__ float raise_reference(float& reference, float largest, float factor) {
    const float before = reference;
    reference = fmaxf(before, __fmul_rn(largest, factor));
    return ptx::exp2_approx(__fsub_rn(before, reference));
}

// 2^(factor * score - reference)
__device__ __forceinline__ float weight_of(float score, float factor, float reference) {
    return ptx::exp2_approx(__fmaf_rn(score, factor, -reference));
}

// What softmax_tile does, in parts, each for one of the lane's two rows: (1) the reference under which the weights are, (2)
// weights of blocks [first, end) instead of scores, (3) their sum, in ascending column order. (1) returns what everything
// accumulated under the old reference must be multiplied with.
template <int blocks>
__device__ __forceinline__ float raise_reference(const float (&score)[blocks][4], int row, RowStatistics& rows,
                                                 float factor) {
    float largest = -infinity;
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
        largest = fmaxf(largest, fmaxf(score[b][2 * row], score[b][2 * row + 1]));
    }
    return raise_reference(rows.reference[row], quad_max(largest), factor);
}
template <int first, int end, int blocks>
__device__ __forceinline__ void make_weights(float (&score)[blocks][4], int row, const RowStatistics& rows,
                                             float factor) {
#pragma unroll
    for (int b = first; b < end; ++b) {
#pragma unroll
        for (int c = 2 * row; c < 2 * row + 2; ++c) score[b][c] = weight_of(score[b][c], factor, rows.reference[row]);
    }
}
template <int first, int end, int blocks>
__device__ __forceinline__ void add_weights(const float (&weight)[blocks][4], int row, RowStatistics& rows) {
#pragma unroll
    for (int b = first; b < end; ++b) {
#pragma unroll
        for (int c = 2 * row; c < 2 * row + 2; ++c) rows.sum[row] = __fadd_rn(rows.sum[row], weight[b][c]);
    }
}

// Turns scores into weights 2^(factor * score - reference) under the new reference, adds them to the lane's sums in
// ascending column order, and returns in `rescale` what everything accumulated under the old reference must be
// multiplied with.
template <int blocks>
__device__ __forceinline__ void softmax_tile(float (&score)[blocks][4], RowStatistics& rows, float factor,
                                             float (&rescale)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rescale[row] = raise_reference(score, row, rows, factor);
        rows.sum[row] = __fmul_rn(rows.sum[row], rescale[row]);
        make_weights<0, blocks>(score, row, rows, factor);
        add_weights<0, blocks>(score, row, rows);
    }
}

}  // namespace cuattn
