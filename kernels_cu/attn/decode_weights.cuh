// The warps of decode_sm90 that make weights: from queries and keys, through scores in shared memory.
#pragma once

#include <attn/decode_block.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>
#include <ptx/warpgroup.cuh>

namespace cuattn {

// One warp: it computes the scores of some blocks of 16 keys, transposed, and makes weights of all scores of every
// score_warps-th row.
class Weigher {
  public:
    __device__ __forceinline__ Weigher(const ForwardSm90Params& params, const RingAddress& ring, SharedMemory& shared,
                                       int number, int lane)
        : params_(params.call.forward),
          number_(number),
          lane_(lane),
          first_key_(number * 16 * blocks),
          keys_(ring, false),
          weights_(shared) {}

    __device__ __forceinline__ void attend(const Work& work) {
        load_queries(work);
        int visible[rows];
        float reference[rows];
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            visible[i] = work.sequence.visible_keys(packed_row(params_, work, number_ + i * score_warps).token);
        }
        for_each_chunk(
            work,
            [&] {
#pragma unroll
                for (int i = 0; i < rows; ++i) reference[i] = no_reference;
            },
            [&](int tile) {
                const Scores& scores = weights_.scores();
                multiply_keys(keys_.take(), scores);
                keys_.leave(lane_);
                ptx::barrier_sync<score_warps * 32>(scores_known);  // all scores are there
                TileWeights& weights = weights_.weights();
#pragma unroll
                for (int i = 0; i < rows; ++i) {
                    weigh(scores, number_ + i * score_warps, reference[i], visible[i] - tile * key_tile, weights);
                }
                weights_.meet();
                weights_.next();
            },
            [](int, bool) {});
    }

  private:
    static constexpr int groups = (head_dim + 15) / 16;  // of columns that are multiplied together
    static constexpr int blocks = key_tile / 16 / score_warps;
    static constexpr int rows = block_rows / score_warps;  // whose weights it makes
    static constexpr int lane_keys = key_tile / 32;        // of which a lane does
    static_assert(block_rows % score_warps == 0 && lane_keys % 2 == 0);
    using Scores = float[block_rows][score_stride];

    // As right operands.
    __device__ __forceinline__ void load_queries(const Work& work) {
        const KeySequence& sequence = work.sequence;
#pragma unroll
        for (int r = 0; r < row_blocks; ++r) {
            const PackedRow packed = packed_row(params_, work, 8 * r + lane_ / 4);
            const u16* const row = static_cast<const u16*>(params_.query) +
                                   packed.offset(params_.query_strides, sequence.query_batch, sequence.query_start) +
                                   2 * (lane_ & 3);
#pragma unroll
            for (int k = 0; k < groups; ++k) {
                query_[r][k][0] = ptx::load_global_u32(row + 16 * k);
                query_[r][k][1] = 16 * k + 8 < head_dim ? ptx::load_global_u32(row + 16 * k + 8) : 0;
            }
        }
    }

    // Groups of 16 columns ascending. With g = lane / 4 and t = lane % 4 a lane gets the scores of keys g and g + 8 of each block
    // of 16 with rows 2 t and 2 t + 1 of each block of 8.
    __device__ __forceinline__ void multiply_keys(u32 slot, const Scores& scores) const {
        float score[blocks][row_blocks][4];
#pragma unroll
        for (int i = 0; i < blocks * row_blocks * 4; ++i) score[i / 4 / row_blocks][i / 4 % row_blocks][i % 4] = 0.0f;
#pragma unroll
        for (int k = 0; k < groups; ++k) {
#pragma unroll
            for (int b = 0; b < blocks; ++b) {
                const Operands::Left keys = Operands::load_left<KeyTile>(slot, k, lane_, first_key_ + 16 * b);
#pragma unroll
                for (int r = 0; r < row_blocks; ++r) {
                    ptx::mma_m16n8k16<config::bfloat16>(score[b][r], keys.x, query_[r][k][0], query_[r][k][1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < blocks * row_blocks * 4; ++i) {
            const int b = i / 4 / row_blocks, r = i / 4 % row_blocks, c = i % 4;
            const int row = 8 * r + 2 * (lane_ & 3) + c % 2, key = first_key_ + 16 * b + lane_ / 4 + c / 2 * 8;
            ptx::store_shared_f32(ptx::shared_address(&scores[row][key]), score[b][r][c]);
        }
    }

    // From a row's scores with a tile's keys, of which it sees the first `visible`, to weights.
    __device__ __forceinline__ void weigh(const Scores& scores, int row, float& reference, int visible,
                                          TileWeights& weights) const {
        const int first = lane_keys * lane_;
        float weight[lane_keys];
#pragma unroll
        for (int i = 0; i < lane_keys; i += 2) {
            const float2 pair = ptx::load_shared_f32x2(ptx::shared_address(&scores[row][first + i]));
            weight[i] = pair.x, weight[i + 1] = pair.y;
        }
        float largest = -infinity;
#pragma unroll
        for (int i = 0; i < lane_keys; ++i) {
            if (params_.negate_scores) weight[i] = -weight[i];
            if (first + i >= visible) weight[i] = -infinity;
            largest = fmaxf(largest, weight[i]);
        }
        const float rescale = raise_reference(reference, warp_max(largest), params_.factor);
#pragma unroll
        for (int i = 0; i < lane_keys; ++i) weight[i] = weight_of(weight[i], params_.factor, reference);
#pragma unroll
        for (int i = 0; i < lane_keys; i += 2) {
            ptx::store_shared_f32x2(ptx::shared_address(&weights.exact[row][first + i]),
                                    make_float2(weight[i], weight[i + 1]));
            ptx::store_shared_u32(ptx::shared_address(&weights.rounded[row][first + i]),
                                  ptx::pack_16bit<config::bfloat16>(weight[i], weight[i + 1]));
        }
        if (lane_ == 0) {
            ptx::store_shared_f32(ptx::shared_address(&weights.reference[row]), reference);
            ptx::store_shared_f32(ptx::shared_address(&weights.rescale[row]), rescale);
        }
    }

    const ForwardParams& params_;
    const int number_, lane_, first_key_;
    Slots<score_warps> keys_;
    WeightSlots weights_;
    u32 query_[row_blocks][groups][2];
};

}  // namespace cuattn
