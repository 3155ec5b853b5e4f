// The warps of decode_sm90 that multiply weights with values.
#pragma once

#include <attn/chunks.cuh>
#include <attn/decode_block.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>

namespace cuattn {

// One warp: of all rows it computes some blocks of 16 columns of the outputs, transposed. With g = lane / 4 and t = lane % 4 a
// lane has columns g and g + 8 of rows 2 t and 2 t + 1 of each block of 8.
class Outputs {
  public:
    __device__ __forceinline__ Outputs(const ForwardSm90Params& params, const RingAddress& ring, SharedMemory& shared,
                                       int number, int lane)
        : params_(params.call),
          shared_(shared),
          lane_(lane),
          first_column_(number * 16 * blocks),
          values_(ring, true),
          weights_(shared) {}

    __device__ __forceinline__ void attend(const Work& work) {
        meet();  // earlier rows have been stored
        for_each_chunk(
            work, [&] { reset(); }, [&](int) { add_tile(); },
            [&](int chunk, bool last) {
                if (work.first_chunk > 0) {
                    store_partial(work, out_, chunk);
                    return;
                }
                fold(chunk == 0);
                if (last && work.end_chunk < work.chunks) store_partial(work, merged_, 0);
            });
        meet();  // how to normalise the outputs
        if (is_whole(work)) store(work);
    }

  private:
    static constexpr int blocks = value_tile_dim / 16 / value_warps;
    using Out = float[blocks][row_blocks][4];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int r = 0; r < row_blocks; ++r) {
            reference_[r] = make_float2(no_reference, no_reference);
#pragma unroll
            for (int i = 0; i < blocks; ++i) out_[i][r][0] = out_[i][r][1] = out_[i][r][2] = out_[i][r][3] = 0.0f;
        }
    }

    // The products of a tile's weights with its values, groups of 16 keys ascending.
    __device__ __forceinline__ void add_tile() {
        weights_.meet();
        const TileWeights& weights = weights_.weights();
#pragma unroll
        for (int r = 0; r < row_blocks; ++r) {
            const int pair = 8 * r + 2 * (lane_ & 3);
            reference_[r] = ptx::load_shared_f32x2(ptx::shared_address(&weights.reference[pair]));
            const float2 rescale = ptx::load_shared_f32x2(ptx::shared_address(&weights.rescale[pair]));
#pragma unroll
            for (int i = 0; i < blocks; ++i) {
#pragma unroll
                for (int c = 0; c < 4; ++c) out_[i][r][c] = __fmul_rn(out_[i][r][c], c % 2 ? rescale.y : rescale.x);
            }
        }
        const u32 slot = values_.take();
        const u32 from = ptx::shared_address(weights.rounded) + (lane_ & 7) * (weight_stride * 2) + lane_ / 8 * 16;
#pragma unroll
        for (int k = 0; k < key_tile / 16; k += 2) {
            u32 weight[row_blocks][4];  // of two groups
#pragma unroll
            for (int r = 0; r < row_blocks; ++r) {
                ptx::ldmatrix_x4(weight[r], from + 8 * r * (weight_stride * 2) + 32 * k);
            }
#pragma unroll
            for (int group = 0; group < 2; ++group) {
#pragma unroll
                for (int i = 0; i < blocks; ++i) {
                    const Operands::Left values =
                        Operands::load_left_columns<ValueTile>(slot, k + group, first_column_ + 16 * i, lane_);
#pragma unroll
                    for (int r = 0; r < row_blocks; ++r) {
                        ptx::mma_m16n8k16<config::bfloat16>(out_[i][r], values.x, weight[r][2 * group],
                                                            weight[r][2 * group + 1]);
                    }
                }
            }
        }
        weights_.next();
        values_.leave(lane_);
    }

    // Adds the chunk in out_ to those before it, as does Summation to its sums.
    __device__ __forceinline__ void fold(bool first) {
#pragma unroll
        for (int r = 0; r < row_blocks; ++r) {
            const Fold even(first ? reference_[r].x : merged_reference_[r].x, reference_[r].x),
                odd(first ? reference_[r].y : merged_reference_[r].y, reference_[r].y);
            merged_reference_[r] = make_float2(even.reference, odd.reference);
#pragma unroll
            for (int i = 0; i < blocks; ++i) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float& merged = merged_[i][r][c];
                    merged = first ? out_[i][r][c] : (c % 2 ? odd : even)(merged, out_[i][r][c]);
                }
            }
        }
    }

    // Calls store(row, column, pair) for all pairs of neighbouring columns of rows that there are. A lane has a column of two
    // rows, and exchanges one of them for the neighbouring column of the other one.
    template <class Store>
    __device__ __forceinline__ void for_each_pair(const Work& work, const Out& out, const Store& store) const {
        const int existing = work.sequence.query_length * params_.forward.group - work.first_row;
        const bool odd = lane_ & 4;
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
#pragma unroll
            for (int r = 0; r < row_blocks; ++r) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float first = out[i][r][2 * half], second = out[i][r][2 * half + 1];
                    const float got = __shfl_xor_sync(all_lanes, odd ? first : second, 4);
                    const int row = 8 * r + 2 * (lane_ & 3) + odd,
                              column = first_column_ + 16 * i + 8 * half + (lane_ / 4 & ~1);
                    if (row < existing && column < value_dim) {
                        store(row, column, odd ? make_float2(got, second) : make_float2(first, got));
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void store_partial(const Work& work, const Out& out, int chunk) const {
        for_each_pair(work, out, [&](int row, int column, float2 pair) {
            const i64 index = partial_index(params_, work, chunk, row);
            ptx::store_global_f32x2(params_.partials.out + index * value_dim + column, pair);
        });
    }

    __device__ __forceinline__ void store(const Work& work) const {
        const ForwardParams& params = params_.forward;
        const KeySequence& sequence = work.sequence;
        for_each_pair(work, merged_, [&](int row, int column, float2 pair) {
            const u32 scale = ptx::load_shared_u32(ptx::shared_address(&shared_.normalisation[row]));
            const i64 start = PackedRow(params, work.key_head, work.first_row + row)
                                  .offset(params.out_strides, sequence.query_batch, sequence.query_start);
            store_pair<false, config::bfloat16>(params.out, start + column, normalised(pair.x, __uint_as_float(scale)),
                                                normalised(pair.y, __uint_as_float(scale)));
        });
    }

    const SplitParams& params_;
    SharedMemory& shared_;
    const int lane_, first_column_;
    Slots<value_warps> values_;
    WeightSlots weights_;
    float2 reference_[row_blocks], merged_reference_[row_blocks];
    Out out_, merged_;
};

}  // namespace cuattn
