// What the backward pass must know of each query row: a record for every row of every head. The including unit defines
// namespace cuattn::config with the constants of one RowsConfig (cuattn/jit/unit.py).
//
// A row has as many lanes of a warp as it has groups of 8 columns, or as the next power of two. Each sums its products,
// ascending; then lanes 1, 2, 4, 8 and 16 apart are added.
#pragma once

#include <attn/params.cuh>
#include <attn/search.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::threads, config::value_dim;

constexpr u32 all_lanes = 0xffffffffu;
constexpr float log2_e = 1.44269504088896341f;
constexpr int lane_columns = 8;
__device__ constexpr int lanes_for(int columns) {
    int lanes = 1;
    while (lanes * lane_columns < columns) lanes *= 2;
    return lanes;
}
constexpr int row_lanes = lanes_for(value_dim);
static_assert(row_lanes <= 32 && value_dim % lane_columns == 0 && threads / row_lanes == config::block_rows);
static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");

using RowSequence = Sequence<config::causal, true, true>;

// A lane's columns of a row that starts at element `start`, as fp32. `nonzero`: whether any is not a zero.
__device__ __forceinline__ void load_columns(const void* data, i64 start, int lane, float (&x)[lane_columns],
                                             bool& nonzero) {
    constexpr int bytes = config::float32 ? 4 : 2, words = lane_columns * bytes / 4;
    const auto* const from = static_cast<const unsigned char*>(data) + (start + lane * lane_columns) * bytes;
    u32 word[words];
    u32 any = 0;
#pragma unroll
    for (int i = 0; i < words; i += 4) {
        const uint4 four = ptx::load_global_u32x4(from + 4 * i);
        word[i] = four.x, word[i + 1] = four.y, word[i + 2] = four.z, word[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < words; ++i) {
        any |= word[i] & (config::float32 ? 0x7fffffffu : 0x7fff7fffu);
        if constexpr (config::float32) {
            x[i] = __uint_as_float(word[i]);
        } else {
            const float2 pair = ptx::unpack_16bit<config::bfloat16>(word[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
    nonzero = any != 0;
}

extern "C" __global__ void __launch_bounds__(threads) backward_rows(const __grid_constant__ BackwardParams params) {
    const ForwardParams& forward = params.forward;
    const int lane = threadIdx.x % row_lanes;
    const i64 number = i64(blockIdx.x) * config::block_rows + threadIdx.x / row_lanes;
    const i64 index = min(number, params.row_count - 1);  // into (batch, query_heads, query_length)
    const int token = static_cast<int>(index % forward.query_length);
    const i64 heads = index / forward.query_length;
    const int head = static_cast<int>(heads % forward.query_heads),
              batch = static_cast<int>(heads / forward.query_heads);

    const int* const starts = forward.sequences.query_starts;
    const RowSequence sequence(
        forward, starts ? last_sequence_alone(forward.sequences.count,
                                              [&](int s) { return ptx::load_global_s32(starts + s) <= token; })
                        : batch);
    const int row = token - sequence.query_start;
    const bool exists = row >= 0 && row < sequence.query_length;

    float sum = 0.0f;
    bool nonzero = false;
    if (lane * lane_columns < value_dim) {
        const auto start = [&](const Strides& strides) {
            return batch * strides.batch + head * strides.head + token * strides.token;
        };
        float out[lane_columns], dout[lane_columns];
        bool unused;
        load_columns(forward.out, start(forward.out_strides), lane, out, unused);
        load_columns(params.dout, start(params.dout_strides), lane, dout, nonzero);
#pragma unroll
        for (int i = 0; i < lane_columns; ++i) sum = __fmaf_rn(dout[i], out[i], sum);
    }
#pragma unroll
    for (int step = 1; step < row_lanes; step *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(all_lanes, sum, step));
    const u32 votes = __ballot_sync(all_lanes, nonzero), mine = 0xffffffffu >> (32 - row_lanes);
    bool contributes = (votes >> (threadIdx.x & 31 & ~(row_lanes - 1)) & mine) != 0;
    if (params.dlse) {
        const float dlse = ptx::load_global_f32(params.dlse + index);
        sum = __fsub_rn(sum, dlse);
        contributes = contributes || dlse != 0.0f;
    }
    const int visible = exists && contributes ? sequence.visible_keys(row) : 0;
    if (lane == 0 && number < params.row_count) {
        const float log = __fmul_rn(ptx::load_global_f32(forward.lse + index), log2_e);
        ptx::store_global_u32x4(params.rows + index,
                                make_uint4(__float_as_uint(log), __float_as_uint(sum), visible, row));
    }
}

}  // namespace cuattn
