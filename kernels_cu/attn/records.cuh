// The records of query rows: where they lie, and what follows from one for a score.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// The place of the first record of query head `head` of the sequence that starts at row `start` of batch entry `batch`.
__device__ __forceinline__ i64 first_record(const ForwardParams& params, int batch, int start, int head) {
    return (i64(batch) * params.query_heads + head) * params.query_length + start;
}

__device__ __forceinline__ RowRecord record_of(float4 words) {
    return {words.x, words.y, static_cast<int>(__float_as_uint(words.z)), static_cast<int>(__float_as_uint(words.w))};
}

// The weight of key `key` for a row: 2^(factor * score - log) where the row sees it; a negative factor stands for scores
// whose sign is changed.
__device__ __forceinline__ float weight_of(float score, float factor, const RowRecord& row, int key) {
    const float weight = ptx::exp2_approx(__fmaf_rn(score, factor, -row.log));
    return key < row.visible ? weight : 0.0f;
}

// The gradient of its score, over the scale.
__device__ __forceinline__ float dscore_of(float weight, float dweight, const RowRecord& row, int key) {
    const float dscore = __fmul_rn(weight, __fsub_rn(dweight, row.delta));
    return key < row.visible ? dscore : 0.0f;
}

}  // namespace cuattn
