// From the accumulated output to what the caller gets: O / l rounded once to the output type, and the LSE.
#pragma once

#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <common/logarithm.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// Whether a row saw no key. (With the reference at infinity, where scores left the range of fp32, sums are 0 too.)
__device__ __forceinline__ bool saw_nothing(float reference, float sum) {
    return sum == 0.0f && reference == no_reference;
}

// What a row's accumulated output is multiplied with.
__device__ __forceinline__ float normalisation(float reference, float sum) {
    return saw_nothing(reference, sum) ? 0.0f : __frcp_rn(sum);
}

// Adding +0 turns -0 into +0 and changes nothing else.
__device__ __forceinline__ float normalised(float out, float normalisation) {
    return __fadd_rn(__fmul_rn(out, normalisation), 0.0f);
}

// Natural logarithm of the sum of e^(scale * score) over the row's visible keys; -inf where there is none, NaN where
// the reference is infinite.
__device__ __forceinline__ float log_sum_exp(float reference, float sum) {
    return __fmaf_rn(reference, ln2, natural_log(sum));
}

// Two neighbouring columns of a finished row, rounded once to the output type.
template <bool float32, bool bfloat16>
__device__ __forceinline__ void store_pair(void* out, i64 element, float low, float high) {
    if constexpr (float32) {
        ptx::store_global_f32x2(static_cast<float*>(out) + element, make_float2(low, high));
    } else {
        ptx::store_global_u32(static_cast<u16*>(out) + element, ptx::pack_16bit<bfloat16>(low, high));
    }
}

// Writes a warp's 16 rows. out[b][c]: column 8 b + 2 (lane % 4) + c % 2 of row lane / 4 + 8 (c / 2). `scratch`: 16 rows
// of a tile of the kind Rows, the warp's own shared memory, through which rows are regrouped into 16-byte stores. Row r goes
// to row_out(r), its LSE to row_lse(r); of the rows the first `valid` exist, 16 at most.
template <int head_dim, class Rows, bool bfloat16, int blocks, class RowOut, class RowLse>
__device__ __forceinline__ void store_rows(const float (&out)[blocks][4], const RowStatistics& rows, u32 scratch,
                                           int valid, const RowOut& row_out, const RowLse& row_lse) {
    constexpr int units = head_dim / 8;
    const int lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        const float scale = normalisation(rows.reference[half], rows.sum[half]);
#pragma unroll
        for (int b = 0; b < units; ++b) {
            ptx::store_shared_u32(scratch + Rows::offset(row, b) + 4 * (lane & 3),
                                  ptx::pack_16bit<bfloat16>(normalised(out[b][2 * half], scale),
                                                            normalised(out[b][2 * half + 1], scale)));
        }
        if ((lane & 3) == 0 && row < valid) {
            ptx::store_global_f32(row_lse(row), log_sum_exp(rows.reference[half], rows.sum[half]));
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * units; i += 32) {
        const int row = (i + lane) / units, unit = (i + lane) % units;
        if (row < valid) {
            ptx::store_global_u32x4(row_out(row) + unit * 8, ptx::load_shared_u32x4(scratch + Rows::offset(row, unit)));
        }
    }
}

}  // namespace cuattn
