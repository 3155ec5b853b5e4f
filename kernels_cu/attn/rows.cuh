// Packed rows: the rows of all query heads that share a key head, a token's heads behind each other.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>

namespace cuattn {

// Where a packed row stands in queries, outputs and LSE.
struct PackedRow {
    int token, head;

    // `row` of key head `key_head`, counted from the sequence's first token.
    __device__ __forceinline__ PackedRow(const ForwardParams& params, int key_head, int row)
        : token(static_cast<int>(u32(row) / u32(params.group))),
          head(key_head * params.group + row - token * params.group) {}

    // In elements; `start`: the sequence's first token in a packed batch.
    __device__ __forceinline__ i64 offset(const Strides& strides, int batch, int start) const {
        return batch * strides.batch + head * strides.head + (start + token) * strides.token;
    }

    // In an array (batch, query_heads, query_length).
    __device__ __forceinline__ i64 index(const ForwardParams& params, int batch, int start) const {
        return (i64(batch) * params.query_heads + head) * params.query_length + start + token;
    }
};

}  // namespace cuattn
