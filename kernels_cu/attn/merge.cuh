// The fold over a row's partial results in global memory, a lane or thread for every four columns.
#pragma once

#include <attn/chunks.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

constexpr int chunks_ahead = 8;  // loads under way

// A row's fold up to some chunk, in four columns.
template <int value_dim>
struct Merged {
    float reference, sum;
    float4 out;

    // The partial result at `index` of the arrays' rows.
    __device__ __forceinline__ static Merged load(const Partials& partials, i64 index, int column) {
        return {ptx::load_global_f32(partials.reference + index), ptx::load_global_f32(partials.sum + index),
                ptx::load_global_f32x4(partials.out + index * value_dim + column)};
    }

    __device__ __forceinline__ void add(const Merged& chunk) {
        const Fold fold(reference, chunk.reference);
        reference = fold.reference;
        sum = fold(sum, chunk.sum);
        out.x = fold(out.x, chunk.out.x);
        out.y = fold(out.y, chunk.out.y);
        out.z = fold(out.z, chunk.out.z);
        out.w = fold(out.w, chunk.out.w);
    }

    // Adds the chunks [first, end), `stride` rows apart from `index` on.
    __device__ __forceinline__ void add_chunks(const Partials& partials, i64 index, int first, int end, i64 stride,
                                               int column) {
#pragma unroll 1
        for (; first < end; first += chunks_ahead) {
            Merged chunk[chunks_ahead];
#pragma unroll
            for (int i = 0; i < chunks_ahead; ++i) {
                chunk[i] = load(partials, index + min(first + i, end - 1) * stride, column);
            }
#pragma unroll
            for (int i = 0; i < chunks_ahead; ++i) {
                if (first + i < end) add(chunk[i]);
            }
        }
    }

    // Rounds the row's columns to the output; its first lane, or thread, also stores the LSE, if anybody asks for it.
    template <bool float32, bool bfloat16>
    __device__ __forceinline__ void store(const ForwardParams& params, i64 out_start, i64 lse_index, int column) const {
        const float scale = normalisation(reference, sum);
        const auto store = [&](int first, float low, float high) {
            store_pair<float32, bfloat16>(params.out, out_start + column + first, normalised(low, scale),
                                          normalised(high, scale));
        };
        store(0, out.x, out.y);
        store(2, out.z, out.w);
        if (params.lse && column == 0) ptx::store_global_f32(params.lse + lse_index, log_sum_exp(reference, sum));
    }
};

}  // namespace cuattn
