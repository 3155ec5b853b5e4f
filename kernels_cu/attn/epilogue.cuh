// From the accumulated output to what the caller gets: O / l rounded once to the output type, and the LSE.
#pragma once

#include <attn/softmax.cuh>
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

// Of four lanes, lane t gives word u to lane u and gets that one's word t.
__device__ __forceinline__ void transpose_quad(u32 (&word)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const u32 got = __shfl_xor_sync(all_lanes, upper ? word[i] : word[i + step], step);
            word[i] = upper ? got : word[i];
            word[i + step] = upper ? word[i + step] : got;
        }
    }
}

// Where a row goes; `lse` is null where nobody asks for it.
struct RowPlace {
    u16* out;
    float* lse;
};

// Writes a warp's 16 rows. out[b][c]: column 8 b + 2 (lane % 4) + c % 2 of row lane / 4 + 8 (c / 2). Row r goes to place_of(r)
// if there is a row `first` + r among `count`. A lane stores 16 bytes at a time: every fourth block of columns. Without
// branches, so that nothing waits for what it does not need.
template <int head_dim, bool bfloat16, int blocks, class PlaceOf>
__device__ __forceinline__ void store_rows(const float (&out)[blocks][4], const RowStatistics& rows, int first,
                                           int count, const PlaceOf& place_of) {
    constexpr int units = head_dim / 8, groups = (units + 3) / 4;
    const int lane = threadIdx.x & 31;
    const float scale[2] = {normalisation(rows.reference[0], rows.sum[0]),
                            normalisation(rows.reference[1], rows.sum[1])};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        const bool exists = u32(first + row) < u32(count);
        const RowPlace to = place_of(row);
        u32 word[groups][4];
#pragma unroll
        for (int b = 0; b < 4 * groups; ++b) {
            const float* const pair = &out[b < units ? b : 0][2 * half];
            word[b / 4][b % 4] =
                ptx::pack_16bit<bfloat16>(normalised(pair[0], scale[half]), normalised(pair[1], scale[half]));
        }
#pragma unroll
        for (int i = 0; i < groups; ++i) transpose_quad(word[i]);
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            const int unit = 4 * i + (lane & 3);
            ptx::store_global_u32x4_if(exists && unit < units, to.out + unit * 8,
                                       make_uint4(word[i][0], word[i][1], word[i][2], word[i][3]));
        }
        ptx::store_global_f32_if(exists && to.lse && (lane & 3) == 0, to.lse,
                                 log_sum_exp(rows.reference[half], rows.sum[half]));
    }
}

}  // namespace cuattn
