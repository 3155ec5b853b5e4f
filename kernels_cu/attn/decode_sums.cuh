// The warp of decode_sm90 that adds up weights.
#pragma once

#include <attn/chunks.cuh>
#include <attn/decode_block.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// Adds up the weights of each row: lane l those of rows l % 8, 8 + l % 8, ... at keys 8 b + 2 (l / 8) and the next. By one warp.
class Summation {
  public:
    __device__ __forceinline__ Summation(const ForwardSm90Params& params, SharedMemory& shared, int lane)
        : params_(params.call), shared_(shared), lane_(lane), weights_(shared) {}

    __device__ __forceinline__ void attend(const Work& work) {
        const bool folds = work.first_chunk == 0;
        float reference[row_blocks], sum[row_blocks], merged_reference[row_blocks], merged_sum[row_blocks];
        meet();  // earlier rows have been stored
        for_each_chunk(
            work,
            [&] {
#pragma unroll
                for (int r = 0; r < row_blocks; ++r) reference[r] = no_reference, sum[r] = 0.0f;
            },
            [&](int) {
                weights_.meet();
                const TileWeights& weights = weights_.weights();
#pragma unroll
                for (int r = 0; r < row_blocks; ++r) {
                    add_weights(sum[r], weights, row(r));
                    reference[r] = load_number(weights.reference[row(r)]);
                }
                weights_.next();
            },
            [&](int chunk, bool last) {
#pragma unroll
                for (int r = 0; r < row_blocks; ++r) {
                    sum[r] = quad_sum<8>(sum[r]);
                    if (folds) {
                        if (chunk > 0) {
                            const Fold fold(merged_reference[r], reference[r]);
                            sum[r] = fold(merged_sum[r], sum[r]);
                            reference[r] = fold.reference;
                        }
                        merged_reference[r] = reference[r];
                        merged_sum[r] = sum[r];
                    }
                    if (!folds || last) store(work, folds ? 0 : chunk, row(r), reference[r], sum[r]);
                }
            });
        meet();  // how to normalise the outputs
    }

  private:
    __device__ __forceinline__ int row(int block) const { return 8 * block + (lane_ & 7); }

    __device__ __forceinline__ static float load_number(const float& number) {
        return __uint_as_float(ptx::load_shared_u32(ptx::shared_address(&number)));
    }

    __device__ __forceinline__ void add_weights(float& sum, const TileWeights& weights, int row) const {
        const u32 from = ptx::shared_address(weights.exact[row]) + 8 * (lane_ >> 3);
        float2 pair[key_tile / 8];
#pragma unroll
        for (int b = 0; b < key_tile / 8; ++b) pair[b] = ptx::load_shared_f32x2(from + 32 * b);
        sum = __fmul_rn(sum, load_number(weights.rescale[row]));
#pragma unroll
        for (int b = 0; b < key_tile / 8; ++b) sum = __fadd_rn(__fadd_rn(sum, pair[b].x), pair[b].y);
    }

    // The row's statistics: of all that it sees, of the chunks so far, or of one chunk.
    __device__ __forceinline__ void store(const Work& work, int chunk, int row, float reference, float sum) const {
        const ForwardParams& params = params_.forward;
        const KeySequence& sequence = work.sequence;
        const bool whole = is_whole(work);
        if (lane_ >= 8) return;
        if (whole) {
            ptx::store_shared_f32(ptx::shared_address(&shared_.normalisation[row]), normalisation(reference, sum));
        }
        if (work.first_row + row >= sequence.query_length * params.group) return;
        if (!whole) {
            const i64 index = partial_index(params_, work, chunk, row);
            ptx::store_global_f32(params_.partials.reference + index, reference);
            ptx::store_global_f32(params_.partials.sum + index, sum);
        } else if (params.lse) {
            const PackedRow packed(params, work.key_head, work.first_row + row);
            ptx::store_global_f32(params.lse + packed.index(params, sequence.query_batch, sequence.query_start),
                                  log_sum_exp(reference, sum));
        }
    }

    const SplitParams& params_;
    SharedMemory& shared_;
    const int lane_;
    WeightSlots weights_;
};

}  // namespace cuattn
