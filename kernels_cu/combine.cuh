// Merges partial results of chunks: the left fold of docs/numerics.md, then the epilogue. The including unit defines
// namespace cuattn::config with the constants of one CombineConfig (cuattn/jit/unit.py).
//
// One block for a row, four columns a thread. Rows are those of groups whose chunks several blocks had, or the caller's.
#pragma once

#include <attn/merge.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <common/types.cuh>
#include <ptx/grid.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::value_dim;

extern "C" __global__ void __launch_bounds__(config::threads) combine(const __grid_constant__ CombineParams params) {
    if constexpr (config::overlaps) {
        ptx::wait_for_earlier_launches();
        ptx::let_later_launches_start();
    }
    const ForwardParams& forward = params.forward;
    const Partials& partials = params.partials;
    const int column = 4 * threadIdx.x;
    Merged<value_dim> merged = {no_reference, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
    if (params.load_carried) {
        merged = Merged<value_dim>::load(params.carried, blockIdx.x, min(column, value_dim - 4));
        __syncthreads();  // all have read the row's reference and sum before one writes them
    }
    if (column >= value_dim) return;
    i64 out_start, lse_index;
    if (partials.groups) {
        const int slot = static_cast<int>(blockIdx.x / partials.rows),
                  row = static_cast<int>(blockIdx.x % partials.rows);
        const SplitGroup* const group = partials.groups + slot;
        const auto number = [](const int& x) { return ptx::load_global_s32(&x); };
        const int chunks = number(group->chunks), folded = number(group->folded_chunks), rows = number(group->rows),
                  key_head = number(group->key_head), first_row = number(group->first_row),
                  batch = number(group->query_batch), start = number(group->query_start);
        if (chunks == 0 || row >= rows) return;
        const i64 index = i64(slot) * partials.chunks * partials.rows + row;
        merged = Merged<value_dim>::load(partials, index, column);
        merged.add_chunks(partials, index, folded, chunks, partials.rows, column);
        const PackedRow packed(forward, key_head, first_row + row);
        out_start = packed.offset(forward.out_strides, batch, start);
        lse_index = packed.index(forward, batch, start);
    } else {
        const i64 row = blockIdx.x;
        merged.add_chunks(partials, row, 0, partials.chunks, partials.rows, column);
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
    merged.template store<config::float32, config::bfloat16>(forward, out_start, lse_index, column);
}

}  // namespace cuattn
