// Gradients of queries, any dtype and head dim. The including unit defines namespace cuattn::config with the constants of
// one QueriesConfig (cuattn/jit/unit.py).
//
// A block has query_tile rows of one head, and passes over the keys that any of them sees, ascending, key_step at a time. A
// warp has 16 row_blocks rows; column_warps of them share the rows, compute the same scores and divide the columns of the
// gradient. What a row sums, and in which order, depends on absolute key positions alone
// (docs/numerics.md).
#pragma once

#include <attn/epilogue.cuh>
#include <attn/fragments.cuh>
#include <attn/matmul.cuh>
#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/places.cuh>
#include <attn/records.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::head_dim, config::tile_dim, config::value_dim, config::value_tile_dim;
using config::row_warps, config::row_blocks, config::column_warps, config::key_step, config::ring_slots;

constexpr int threads = 32 * row_warps * column_warps;
constexpr int warp_rows = 16 * row_blocks, query_tile = warp_rows * row_warps;
constexpr int lookahead = ring_slots - 1;

using Operands = Fragments<config::float32, config::bfloat16>;
using Element = Operands::Element;
using KeyTile = Tile<tile_dim, sizeof(Element)>;
using ValueTile = Tile<value_tile_dim, sizeof(Element)>;
using BlockPlace = Place<query_tile, false, true, config::paged>;  // what a row sees stands in its record
using Keys = KeyRows<Element, config::paged, BlockPlace, 2, key_step>;

constexpr int blocks = share_of<column_warps>(head_dim) / 8;  // of 8 columns

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(blocks * 8 * column_warps <= tile_dim);
static_assert(key_step % 16 == 0 && key_step <= threads && lookahead >= 1);

struct Slot {
    unsigned char key[key_step * KeyTile::row_bytes], value[key_step * ValueTile::row_bytes];
};

struct SharedMemory : Keys::Tables {
    alignas(1024) unsigned char query[query_tile * KeyTile::row_bytes];
    unsigned char dout[query_tile * ValueTile::row_bytes];
    Slot ring[ring_slots];
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);

// The largest of the warp's numbers.
__device__ __forceinline__ int warp_max(int x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(all_lanes, x, step));
    return x;
}

extern "C" __global__ void __launch_bounds__(threads, config::blocks_per_multiprocessor)
    backward_queries(const __grid_constant__ BackwardParams params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const ForwardParams& forward = params.forward;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 / column_warps;
    const int first_column = threadIdx.x / 32 % column_warps * blocks * 8;
    const BlockPlace place(forward, forward.query_heads, 1, lane);
    if (!place.has_rows(1)) return;
    const RowRecord* const records =
        params.rows + first_record(forward, place.query_batch, place.query_start, place.head);
    const auto visible = [&](int row) {
        return row < place.query_length ? ptx::load_global_s32(&records[row].visible) : 0;
    };
    const int warp_row = place.first_row + warp * warp_rows;
    int block_visible = 0;
#pragma unroll
    for (int i = 0; i < query_tile; i += 32) block_visible = max(block_visible, visible(place.first_row + i + lane));
    const int warp_visible = warp_max(visible(warp_row + lane % warp_rows));
    const int steps = (warp_max(block_visible) + key_step - 1) / key_step;

    const Keys keys(forward, place, place.head / forward.group, shared);
    const auto load = [&](int step) {
        if (step < steps) {
            Slot& slot = shared.ring[step % ring_slots];
            keys.template load<KeyTile, head_dim, key_step, threads>(ptx::shared_address(slot.key), false, step, 0);
            keys.template load<ValueTile, value_dim, key_step, threads>(ptx::shared_address(slot.value), true, step, 0);
        }
        ptx::cp_async_commit();
    };
    const auto row_start = [&](const void* data, const Strides& strides, int row) {
        return BlockPlace::start_of(static_cast<const Element*>(data), strides, place.query_batch, place.head,
                                    place.query_start + place.first_row + row);
    };
    const int existing = place.query_length - place.first_row;
    KeyTile::load<head_dim, query_tile, threads>(
        ptx::shared_address(shared.query), existing, threadIdx.x,
        [&](int row) { return row_start(forward.query, forward.query_strides, row); });
    ValueTile::load<value_dim, query_tile, threads>(
        ptx::shared_address(shared.dout), existing, threadIdx.x,
        [&](int row) { return row_start(params.dout, params.dout_strides, row); });
    if constexpr (config::paged) {
        for (int step = 0; step <= lookahead; ++step) {
            if (step == lookahead)
                __syncthreads();  // its places take the room of the first ones', which have been read
            keys.fill(step, keys.look_up(step));
            if (step < lookahead) {
                __syncthreads();
                load(step);
            }
        }
    } else {
        for (int step = 0; step < lookahead; ++step) load(step);
    }

    RowRecord row[2 * row_blocks];  // of rows 8 i + lane / 4 of the warp
#pragma unroll
    for (int i = 0; i < 2 * row_blocks; ++i) {
        const int number = warp_row + 8 * i + lane / 4;
        row[i] = {};
        if (number < place.query_length) {
            row[i] = record_of(ptx::load_global_f32x4(reinterpret_cast<const float*>(records + number)));
        }
    }
    const float factor = forward.negate_scores ? -forward.factor : forward.factor;
    const u32 query = ptx::shared_address(shared.query) + warp * warp_rows * KeyTile::row_bytes;
    const u32 dout = ptx::shared_address(shared.dout) + warp * warp_rows * ValueTile::row_bytes;
    float dquery[row_blocks][blocks][4];
#pragma unroll
    for (int i = 0; i < row_blocks * blocks * 4; ++i) dquery[i / (blocks * 4)][i / 4 % blocks][i % 4] = 0.0f;

    int next_page = keys.look_up(lookahead + 1);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<lookahead - 1>();
        __syncthreads();  // this step's keys are there for all; the slot that is loaded next has been read by all
        load(step + lookahead);
        if constexpr (config::paged) {
            keys.fill(step + lookahead + 1, next_page);
            next_page = keys.look_up(step + lookahead + 2);
        }
        const int first_key = step * key_step;
        if (first_key >= warp_visible) continue;

        const Slot& slot = shared.ring[step % ring_slots];
        const u32 key = ptx::shared_address(slot.key), value = ptx::shared_address(slot.value);
        const int column = first_key + 2 * (lane & 3);
        float weight[row_blocks][key_step / 8][4], dscore[row_blocks][key_step / 8][4];
        multiply_rows<Operands, KeyTile, groups_of<Operands>(head_dim)>(weight, query, key, lane);
        multiply_rows<Operands, ValueTile, groups_of<Operands>(value_dim)>(dscore, dout, value, lane);
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
            for (int b = 0; b < key_step / 8; ++b) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const RowRecord& mine = row[2 * m + c / 2];
                    const int number = column + 8 * b + (c & 1);
                    dscore[m][b][c] =
                        dscore_of(weight_of(weight[m][b][c], factor, mine, number), dscore[m][b][c], mine, number);
                }
            }
        }
        add_product<Operands, KeyTile>(dquery, dscore, key, first_column, lane);
    }

    const BlockPlace end(forward, forward.query_heads, 1, lane);  // found again rather than kept in registers
#pragma unroll
    for (int i = 0; i < 2 * row_blocks; ++i) {
        const int number = end.first_row + warp * warp_rows + 8 * i + lane / 4;
        if (number >= end.query_length) continue;
        Element* const to = BlockPlace::start_of(static_cast<Element*>(params.dquery), params.dquery_strides,
                                                 end.query_batch, end.head, end.query_start + number);
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            const int first = first_column + 8 * b + 2 * (lane & 3), c = 2 * (i & 1);
            if (first < head_dim) {
                store_pair<config::float32, config::bfloat16>(to, first, normalised(dquery[i / 2][b][c], params.scale),
                                                              normalised(dquery[i / 2][b][c + 1], params.scale));
            }
        }
    }
}

}  // namespace cuattn
