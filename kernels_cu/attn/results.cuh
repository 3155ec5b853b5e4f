// Outputs and partial results, straight from the registers of warps that share rows (products.cuh says how they are held).
#pragma once

#include <attn/epilogue.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// One warp's rows of a group.
struct WarpRows {
    int first_row, first_column;  // first_row: packed, of the sequence
    int existing;                 // rows from first_row on; may be negative
};

template <int value_dim, bool float32, bool bfloat16, int blocks>
__device__ __forceinline__ void store_output(const ForwardParams& params, const Work& work, const WarpRows& warp,
                                             const float (&out)[blocks][4], const RowStatistics& rows, int lane) {
    const KeySequence& sequence = work.sequence;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= warp.existing) continue;
        const PackedRow packed(params, work.key_head, warp.first_row + row);
        const i64 start = packed.offset(params.out_strides, sequence.query_batch, sequence.query_start);
        const float scale = normalisation(rows.reference[half], rows.sum[half]);
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            const int column = warp.first_column + 8 * b + 2 * (lane & 3);
            if (column < value_dim) {
                store_pair<float32, bfloat16>(params.out, start + column, normalised(out[b][2 * half], scale),
                                              normalised(out[b][2 * half + 1], scale));
            }
        }
        if (params.lse && warp.first_column == 0 && (lane & 3) == 0) {
            ptx::store_global_f32(params.lse + packed.index(params, sequence.query_batch, sequence.query_start),
                                  log_sum_exp(rows.reference[half], rows.sum[half]));
        }
    }
}

// The result of chunk `chunk`, or of all the chunks before the group's end of range, where chunk 0 stands.
template <int value_dim, int blocks>
__device__ __forceinline__ void store_partial(const SplitParams& params, const Work& work, const WarpRows& warp,
                                              int chunk, const float (&out)[blocks][4], const RowStatistics& rows,
                                              int lane) {
    const Partials& partials = params.partials;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= warp.existing) continue;
        i64 index;
        if (partials.groups) {
            index =
                (i64(work.slot) * partials.chunks + chunk) * partials.rows + (warp.first_row - work.first_row) + row;
        } else {
            const PackedRow packed(params.forward, work.key_head, warp.first_row + row);
            index = i64(chunk - partials.first_chunk) * partials.rows +
                    packed.index(params.forward, work.sequence.query_batch, 0);
        }
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            const int column = warp.first_column + 8 * b + 2 * (lane & 3);
            if (column < value_dim) {
                ptx::store_global_f32x2(partials.out + index * value_dim + column,
                                        make_float2(out[b][2 * half], out[b][2 * half + 1]));
            }
        }
        if (warp.first_column == 0 && (lane & 3) == 0) {
            ptx::store_global_f32(partials.reference + index, rows.reference[half]);
            ptx::store_global_f32(partials.sum + index, rows.sum[half]);
        }
    }
}

// Tells the merging kernel about the group that starts in this block and ends in another: `chunks` of which the first
// `folded` are one partial result. By one thread.
__device__ __forceinline__ void store_group(const SplitParams& params, const Work& work, int slot, int tile_rows,
                                            int folded, int chunks) {
    SplitGroup* const group = params.partials.groups + slot;
    const KeySequence& sequence = work.sequence;
    const int rows = min(tile_rows, sequence.query_length * params.forward.group - work.first_row);
    ptx::store_global_s32(&group->query_batch, sequence.query_batch);
    ptx::store_global_s32(&group->query_start, sequence.query_start);
    ptx::store_global_s32(&group->key_head, work.key_head);
    ptx::store_global_s32(&group->first_row, work.first_row);
    ptx::store_global_s32(&group->rows, rows);
    ptx::store_global_s32(&group->folded_chunks, folded);
    ptx::store_global_s32(&group->chunks, chunks);
}

}  // namespace cuattn
