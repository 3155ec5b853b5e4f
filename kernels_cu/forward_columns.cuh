// Forward attention for sm_80 and newer, any dtype and head dim: the scores of a tile pass through shared memory. The
// including unit defines namespace cuattn::config with the constants of one ColumnsConfig (cuattn/jit/unit.py).
//
// 16 rows belong to column_warps warps. Each computes the scores of its share of the keys (where a slot of the ring has
// too few keys for all, the first warps do); then each has all scores of the rows and computes its share of the output's
// columns. Rows are those of all query heads that share a key head. A block of a split kernel takes the chunks that start
// in its range of the batch's key tiles, else a block takes all chunks of its rows. What a row computes, and in which
// order, depends on absolute key positions alone (docs/numerics.md).
#pragma once

#include <attn/chunks.cuh>
#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/places.cuh>
#include <attn/products.cuh>
#include <attn/results.cuh>
#include <attn/rows.cuh>
#include <attn/scores.cuh>
#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::head_dim, config::tile_dim, config::value_dim, config::value_tile_dim, config::key_tile;
using config::row_warps, config::column_warps, config::slot_keys, config::ring_slots;

constexpr int threads = row_warps * column_warps * 32, tile_rows = row_warps * 16;
constexpr int lookahead = ring_slots - 1;
constexpr int parts = key_tile / slot_keys;  // slots of a tile
constexpr int least_keys = 16;               // whose scores a warp can compute
constexpr int score_warps = slot_keys / least_keys < column_warps ? slot_keys / least_keys : column_warps;
constexpr int warp_keys = slot_keys / score_warps;
constexpr int tile_steps = 2 * parts;                        // the slots of a tile's keys, then those of its values
constexpr int warp_columns = value_tile_dim / column_warps;  // of the output

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(key_tile % slot_keys == 0 && slot_keys % least_keys == 0);
static_assert(head_dim % 8 == 0 && value_dim % 8 == 0 && value_tile_dim % (16 * column_warps) == 0);
static_assert(config::chunk_length(0) % key_tile == 0, "a chunk is a whole number of tiles");

using Operands = Fragments<config::float32, config::bfloat16>;
using Element = Operands::Element;
constexpr int key_columns = (head_dim + Operands::depth - 1) / Operands::depth * Operands::depth;
using KeyProducts = Products<Operands, key_columns, tile_dim, warp_keys, config::query_in_registers>;
using ValueProducts = Products<Operands, warp_columns, value_tile_dim, slot_keys>;
using KeyTile = Tile<tile_dim, sizeof(Element)>;
using ValueTile = Tile<value_tile_dim, sizeof(Element)>;
using Scores = SharedScores<key_tile>;
using Merged = MergedChunks<warp_columns / 8>;

constexpr int slot_bytes = slot_keys * (tile_dim > value_tile_dim ? KeyTile::row_bytes : ValueTile::row_bytes);

using Keys = KeyRows<Element, config::paged, KeySequence, config::place_tiles, key_tile>;
static_assert(config::place_tiles > lookahead / tile_steps);

struct SharedMemory : Keys::Tables {
    alignas(1024) unsigned char ring[ring_slots][slot_bytes];
    unsigned char query[tile_rows * KeyTile::row_bytes];
    unsigned char scores[tile_rows * Scores::row_bytes];
    unsigned char merged[row_warps * column_warps][Merged::bytes_per_warp];
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);

// One block on one part of its work.
class BlockRows {
  public:
    __device__ __forceinline__ BlockRows(const SplitParams& params, SharedMemory& shared)
        : params_(params),
          shared_(shared),
          lane_(threadIdx.x & 31),
          row_warp_(threadIdx.x / 32 / column_warps),
          column_warp_(threadIdx.x / 32 % column_warps),
          scores_(ptx::shared_address(shared.scores) + row_warp_ * 16 * Scores::row_bytes, lane_),
          merged_(ptx::shared_address(shared.merged[threadIdx.x / 32])) {}

    // Computes the chunks of `work` and stores the rows' results, or partial results.
    __device__ __forceinline__ void attend(const Work& work) {
        const ForwardParams& params = params_.forward;
        const int rows = work.sequence.query_length * params.group;
        const auto tiles_until = [&](int row) {  // tiles that the rows before `row` see
            const int last_token = (min(row, rows) - 1) / params.group;
            return (work.sequence.visible_keys(last_token) + key_tile - 1) / key_tile;
        };
        const WarpRows warp{work.first_row + 16 * row_warp_, column_warp_ * warp_columns,
                            rows - (work.first_row + 16 * row_warp_)};
        const int first_tile = config::chunk_start(work.first_chunk) / key_tile;
        const int end_tile =
            min(tiles_until(work.first_row + tile_rows), config::chunk_start(work.end_chunk) / key_tile);
        const int warp_tiles = warp.existing > 0 ? tiles_until(warp.first_row + 16) : 0;
        const int seen_by_all = work.sequence.visible_keys(warp.first_row / params.group);  // keys, of the warp's rows

        __syncthreads();  // the block's earlier rows have been read by all
        const Keys keys(params, work.sequence, work.key_head, shared_);
        start(work, keys, rows, first_tile, end_tile);
        typename KeyProducts::Query query;
        KeyProducts::load_query(query, ptx::shared_address(shared_.query) + 16 * row_warp_ * KeyTile::row_bytes, lane_);

        const bool folds = work.first_chunk == 0 && !to_caller();
        float out[warp_columns / 8][4];
        RowStatistics statistics;
        int tile = first_tile;
#pragma unroll 1
        for (int chunk = work.first_chunk; chunk < work.end_chunk; ++chunk) {
            statistics.reset();
#pragma unroll
            for (int b = 0; b < warp_columns / 8; ++b) out[b][0] = out[b][1] = out[b][2] = out[b][3] = 0.0f;
            const int chunk_tiles = min(config::chunk_start(chunk + 1) / key_tile, end_tile);
#pragma unroll 1
            for (; tile < chunk_tiles; ++tile) {
                add_tile(work, keys, query, out, statistics, tile, seen_by_all, tile < warp_tiles);
            }
            if (folds) {
                merged_.fold(out, statistics, chunk == 0);
                if (chunk + 1 < work.end_chunk) merged_.store(out, statistics);
            } else {
                statistics.sum[0] = quad_sum(statistics.sum[0]);
                statistics.sum[1] = quad_sum(statistics.sum[1]);
                store_partial<value_dim>(params_, work, warp, chunk, out, statistics, lane_);
            }
        }
        if (!folds) return;
        if (work.end_chunk == work.chunks) {
            store_output<value_dim, config::float32, config::bfloat16>(params, work, warp, out, statistics, lane_);
        } else {
            store_partial<value_dim>(params_, work, warp, 0, out, statistics, lane_);
        }
    }

    // Whether the caller wants every chunk's result.
    __device__ __forceinline__ bool to_caller() const {
        return config::partial_results && params_.partials.out && !params_.partials.groups;
    }

  private:
    // Starts the copies of the rows and of the first tiles, and waits for the rows.
    __device__ __forceinline__ void start(const Work& work, const Keys& keys, int rows, int first_tile, int end_tile) {
        const ForwardParams& params = params_.forward;
        const auto* const queries = static_cast<const Element*>(params.query);
        KeyTile::template load<head_dim, tile_rows, threads>(
            ptx::shared_address(shared_.query), rows - work.first_row, threadIdx.x, [&](int row) {
                const PackedRow packed(params, work.key_head, work.first_row + row);
                return queries +
                       packed.offset(params.query_strides, work.sequence.query_batch, work.sequence.query_start);
            });
        ptx::cp_async_commit();
        end_tile_ = end_tile;
        next_page_ = keys.look_up(first_tile + lookahead / tile_steps + 1);
        read_slot_ = write_slot_ = 0;
        if constexpr (config::paged) {
            for (int tile = 0; tile <= lookahead / tile_steps; ++tile)
                keys.fill(first_tile + tile, keys.look_up(first_tile + tile));
            __syncthreads();
        }
#pragma unroll
        for (int step = 0; step < lookahead; ++step) load(keys, first_tile + step / tile_steps, step % tile_steps);
        ptx::cp_async_wait<lookahead>();
        __syncthreads();
    }

    // Starts the copy of step `step` of tile `tile`: a slot of its keys, or of its values. A group of copies for every
    // step, empty behind the end.
    __device__ __forceinline__ void load(const Keys& keys, int tile, int step) {
        if (tile < end_tile_) {
            const int first = step % parts * slot_keys;
            const u32 slot = ptx::shared_address(shared_.ring[write_slot_]);
            if (step < parts) {
                keys.template load<KeyTile, head_dim, slot_keys, threads>(slot, false, tile, first);
            } else {
                keys.template load<ValueTile, value_dim, slot_keys, threads>(slot, true, tile, first);
            }
        }
        write_slot_ = write_slot_ + 1 == ring_slots ? 0 : write_slot_ + 1;
        ptx::cp_async_commit();
    }

    // To step `step` of tile `tile`: its slot is there for all, and the slot that is loaded next has been read by all.
    // Returns the slot's shared address.
    __device__ __forceinline__ u32 advance(const Keys& keys, int tile, int step) {
        ptx::cp_async_wait<lookahead - 1>();
        __syncthreads();
        const int ahead = step + lookahead, next = ahead + 1;
        load(keys, tile + ahead / tile_steps, ahead % tile_steps);
        if (config::paged && next % tile_steps == 0) keys.fill(tile + next / tile_steps, next_page_);
        if (config::paged && next % tile_steps == 1) next_page_ = keys.look_up(tile + next / tile_steps + 1);
        const u32 slot = ptx::shared_address(shared_.ring[read_slot_]);
        read_slot_ = read_slot_ + 1 == ring_slots ? 0 : read_slot_ + 1;
        return slot;
    }

    // Online softmax over one tile. `visible`: whether the warp's rows see any of it.
    __device__ __forceinline__ void add_tile(const Work& work, const Keys& keys, typename KeyProducts::Query& query,
                                             float (&out)[warp_columns / 8][4], RowStatistics& statistics, int tile,
                                             int seen_by_all, bool visible) {
        const ForwardParams& params = params_.forward;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const u32 slot = advance(keys, tile, part);
            if (!visible || column_warp_ >= score_warps) continue;
            float score[warp_keys / 8][4];
            KeyProducts::multiply_keys(score, query, slot + column_warp_ * warp_keys * KeyTile::row_bytes, lane_);
            if (params.negate_scores) {
#pragma unroll
                for (int b = 0; b < warp_keys / 8; ++b) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) score[b][c] = -score[b][c];
                }
            }
            scores_.store(score, part * slot_keys + column_warp_ * warp_keys);
        }
        float weight[key_tile / 8][4];
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const u32 slot = advance(keys, tile, parts + part);
            if (!visible) continue;
            if (part == 0) {
                scores_.load(weight);
                weigh(work, weight, out, statistics, tile * key_tile, seen_by_all);
            }
            ValueProducts::multiply_values(out, weight, slot, lane_, part * slot_keys / 8, column_warp_ * warp_columns);
        }
    }

    // From scores to weights, with what was accumulated brought under the new reference.
    __device__ __forceinline__ void weigh(const Work& work, float (&score)[key_tile / 8][4],
                                          float (&out)[warp_columns / 8][4], RowStatistics& statistics, int first_key,
                                          int seen_by_all) const {
        if (first_key + key_tile > seen_by_all) {
            const int row = work.first_row + 16 * row_warp_ + lane_ / 4, group = params_.forward.group;
            mask_scores(score,
                        {work.sequence.visible_keys(row / group) - first_key,
                         work.sequence.visible_keys((row + 8) / group) - first_key},
                        lane_);
        }
        float rescale[2];
        softmax_tile(score, statistics, params_.forward.factor, rescale);
#pragma unroll
        for (int b = 0; b < warp_columns / 8; ++b) {
#pragma unroll
            for (int c = 0; c < 4; ++c) out[b][c] = __fmul_rn(out[b][c], rescale[c / 2]);
        }
    }

    const SplitParams& params_;
    SharedMemory& shared_;
    const int lane_, row_warp_, column_warp_;
    const Scores scores_;
    const Merged merged_;
    int end_tile_, read_slot_, write_slot_;
    int next_page_;  // asked for a tile's steps ahead of its places
};

extern "C" __global__ void __launch_bounds__(threads, config::blocks_per_multiprocessor)
    forward_columns(const __grid_constant__ SplitParams params) {
    BlockRows block(params, *static_cast<SharedMemory*>(ptx::dynamic_shared()));
    const int lane = threadIdx.x & 31;
    Work work;
    if constexpr (config::split) {
        const bool leader = threadIdx.x == 0 && params.partials.groups;
        bool told = false;  // about the one group that starts here and ends in a later block
        Ranges<tile_rows> ranges(params, lane);
        while (ranges.next(params, work)) {
            block.attend(work);
            const bool goes_on = work.first_chunk == 0 && work.end_chunk < work.chunks;
            if (leader && (goes_on || (params.partials.by_group && work.first_chunk == 0))) {
                store_group(params, work, work.slot, tile_rows, work.end_chunk, goes_on ? work.chunks : 0);
                told = true;
            }
        }
        if (leader && !told && !params.partials.by_group) {
            store_group(params, work, blockIdx.x, tile_rows, 0, 0);
        }
    } else {
        const ForwardParams& forward = params.forward;
        const Place<tile_rows, config::causal, true, config::paged> place(forward, forward.query_heads / forward.group,
                                                                          forward.group, lane);
        if (!place.has_rows(forward.group) || i64(place.query_length) * forward.group <= forward.sequences.few_rows)
            return;
        work.sequence = place;
        work.key_head = place.head;
        work.first_row = place.first_row;
        work.first_chunk = 0;
        work.chunks = work.end_chunk = max(1, config::chunk_count(place.key_length));
        block.attend(work);
    }
}

}  // namespace cuattn
