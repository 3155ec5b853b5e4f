// Merges partial results of chunks: the left fold of docs/numerics.md, then the epilogue. The including unit defines
// namespace cuattn::config with the constants of one CombineConfig (cuattn/jit/unit.py).
//
// One block for a row, four columns a thread. Rows are those of groups whose chunks several blocks had, or the caller's.
#pragma once

#include <attn/chunks.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <common/types.cuh>
#include <ptx/grid.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::value_dim;

constexpr int chunks_ahead = 8;  // loads under way

// A row's fold up to some chunk, in four columns.
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
};

// Adds the chunks [first, end), `stride` rows apart from `index` on.
__device__ __forceinline__ void add_chunks(Merged& row, const Partials& partials, i64 index, int first, int end,
                                           i64 stride, int column) {
#pragma unroll 1
    for (; first < end; first += chunks_ahead) {
        Merged chunk[chunks_ahead];
#pragma unroll
        for (int i = 0; i < chunks_ahead; ++i) {
            chunk[i] = Merged::load(partials, index + min(first + i, end - 1) * stride, column);
        }
#pragma unroll
        for (int i = 0; i < chunks_ahead; ++i) {
            if (first + i < end) row.add(chunk[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(config::threads) combine(const __grid_constant__ CombineParams params) {
    if constexpr (config::overlaps) {
        ptx::wait_for_earlier_launches();
        ptx::let_later_launches_start();
    }
    const ForwardParams& forward = params.forward;
    const Partials& partials = params.partials;
    const int column = 4 * threadIdx.x;
    Merged merged = {no_reference, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
    if (params.load_carried) {
        merged = Merged::load(params.carried, blockIdx.x, min(column, value_dim - 4));
        __syncthreads();  // all have read the row's reference and sum before one writes them
    }
    if (column >= value_dim) return;
    i64 out_start, lse_index;
    if (partials.groups) {
        const int slot = static_cast<int>(blockIdx.x / partials.rows),
                  row = static_cast<int>(blockIdx.x % partials.rows);
        const SplitGroup* const group = partials.groups + slot;
        const auto number = [](const int& x) { return ptx::load_global_s32(&x); };
        const int chunks = number(group->chunks);
        if (chunks == 0 || row >= number(group->rows)) return;
        const i64 index = i64(slot) * partials.chunks * partials.rows + row;
        merged = Merged::load(partials, index, column);
        add_chunks(merged, partials, index, number(group->folded_chunks), chunks, partials.rows, column);
        const PackedRow packed(forward, number(group->key_head), number(group->first_row) + row);
        const int batch = number(group->query_batch), start = number(group->query_start);
        out_start = packed.offset(forward.out_strides, batch, start);
        lse_index = packed.index(forward, batch, start);
    } else {
        const i64 row = blockIdx.x;
        add_chunks(merged, partials, row, 0, partials.chunks, partials.rows, column);
        if (params.store_carried) {
            float* const to = params.carried.out + row * value_dim + column;
            ptx::store_global_f32x2(to, make_float2(merged.out.x, merged.out.y));
            ptx::store_global_f32x2(to + 2, make_float2(merged.out.z, merged.out.w));
            if (column == 0) {
                ptx::store_global_f32(params.carried.reference + row, merged.reference);
                ptx::store_global_f32(params.carried.sum + row, merged.sum);
            }
            return;
        }
        const int token = static_cast<int>(row % forward.query_length);
        const i64 heads = row / forward.query_length;
        out_start = heads / forward.query_heads * forward.out_strides.batch +
                    heads % forward.query_heads * forward.out_strides.head + token * forward.out_strides.token;
        lse_index = row;
    }
    const float scale = normalisation(merged.reference, merged.sum);
    const auto store = [&](int first, float low, float high) {
        store_pair<config::float32, config::bfloat16>(forward.out, out_start + column + first, normalised(low, scale),
                                                      normalised(high, scale));
    };
    store(0, merged.out.x, merged.out.y);
    store(2, merged.out.z, merged.out.w);
    if (forward.lse && column == 0)
        ptx::store_global_f32(forward.lse + lse_index, log_sum_exp(merged.reference, merged.sum));
}

}  // namespace cuattn
