// Forward attention for sm_80 and newer: mma.sync, ldmatrix, cp.async. The including unit defines namespace
// cuattn::config with the constants of one KernelConfig (cuattn/jit/unit.py).
//
// One block computes query_tile rows of one head, 16 rows a warp. Key and value tiles of key_tile tokens pass through a
// ring in shared memory in the order K0 V0 K1 V1 ...: a step of the block is one tile. The second half of the warps runs
// one step behind the first, so that one half's exponentials overlap the other half's matrix products. What a row
// computes, and in which order, depends on absolute key positions alone (docs/numerics.md).
#pragma once

#include <attn/chunks.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/places.cuh>
#include <attn/products.cuh>
#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::head_dim, config::tile_dim, config::key_tile, config::query_tile, config::ring_slots, config::warps;

constexpr int threads = warps * 32;
constexpr int lag = ring_slots > 2 ? 1 : 0;  // steps between the two halves of the warps
constexpr int lookahead = ring_slots - 1 - lag;

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(query_tile == warps * 16);
constexpr int columns = (head_dim + 15) / 16 * 16;  // products run over groups of 16, the last one filled up with zeros

static_assert(head_dim % 8 == 0 && columns <= tile_dim && key_tile % 16 == 0);
static_assert(config::chunk_length(0) % key_tile == 0, "a chunk is a whole number of tiles");

using BlockPlace = Place<query_tile, config::causal, config::ragged, config::paged>;
using KeyTile = Tile<tile_dim>;
using TileProducts = Products<Fragments<false, config::bfloat16>, columns, tile_dim, key_tile>;
using Merged = MergedChunks<columns / 8>;

using Keys = KeyRows<u16, config::paged, BlockPlace, 2, key_tile>;

struct SharedMemory : Keys::Tables {
    alignas(1024) u16 ring[ring_slots][key_tile * tile_dim];
    // of each warp: first its query rows, then its merged chunks, then its rows on their way out
    unsigned char rows[warps][MergedChunks<tile_dim / 8>::bytes_per_warp];
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);
static_assert(sizeof(SharedMemory::rows[0]) >= 16 * tile_dim * 2, "query rows fit where merged chunks go");

extern "C" __global__ void __launch_bounds__(threads, config::blocks_per_multiprocessor)
    forward_sm80(const __grid_constant__ ForwardParams params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const BlockPlace place(params, params.query_heads, 1, lane);
    if (config::ragged && (!place.has_rows(1) || i64(place.query_length) * params.group <= params.sequences.few_rows))
        return;
    const Keys keys(params, place, place.head / params.group, shared);
    constexpr int first_tiles = lookahead / 2 + 1;  // whose copies start before the first step
    int first_pages[first_tiles];
#pragma unroll
    for (int tile = 0; tile < first_tiles; ++tile) first_pages[tile] = keys.look_up(tile);
    const int warp_row = place.first_row + warp * 16;
    const auto tiles_until = [&](int row) {  // tiles that the rows before `row` see
        return (place.visible_keys(min(row, place.query_length) - 1) + key_tile - 1) / key_tile;
    };
    const int block_tiles = tiles_until(place.first_row + query_tile);
    const int warp_tiles = warp_row < place.query_length ? tiles_until(warp_row + 16) : 0;

    const auto ring_slot = [&](int step) { return ptx::shared_address(shared.ring[step % ring_slots]); };
    // Step 2 j loads key tile j, step 2 j + 1 value tile j; one group of copies a step, empty behind the end.
    const auto load = [&](int step) {
        if (step < 2 * block_tiles) {
            keys.template load<KeyTile, head_dim, key_tile, threads>(ring_slot(step), step % 2 == 1, step / 2, 0);
        }
        ptx::cp_async_commit();
    };

    const u32 warp_memory = ptx::shared_address(shared.rows[warp]);
    const u16* const queries = place.start_of(static_cast<const u16*>(params.query), params.query_strides,
                                              place.query_batch, place.head, place.query_start + warp_row);
    KeyTile::load<head_dim, 16, 32>(warp_memory, place.query_length - warp_row, lane,
                                    [&](int row) { return queries + row * params.query_strides.token; });
    ptx::cp_async_commit();
    if constexpr (config::paged) {
#pragma unroll
        for (int tile = 0; tile < first_tiles; ++tile) keys.fill(tile, first_pages[tile]);
        __syncthreads();
    }
    for (int step = 0; step < lookahead; ++step) load(step);

    TileProducts::Query query;
    ptx::cp_async_wait<lookahead>();
    __syncwarp();
    TileProducts::load_query(query, warp_memory, lane);

    const Merged merged(warp_memory);
    RowStatistics rows;
    rows.reset();
    float score[key_tile / 8][4], out[columns / 8][4];
#pragma unroll
    for (int b = 0; b < columns / 8; ++b) out[b][0] = out[b][1] = out[b][2] = out[b][3] = 0.0f;
    int chunk_end = config::chunk_length(0);
    const auto first_chunk = [&] { return chunk_end == config::chunk_length(0); };

    // Of a tile's keys, the pages are asked for two steps, and the places written down one step, before the first copy.
    int next_page = keys.look_up((lookahead + 1) / 2);
    const int seen_by_all = place.visible_keys(warp_row);  // of the warp's rows; paged: read from memory
    const int warp_lag = warp < warps / 2 ? 0 : lag;
#pragma unroll 1
    for (int block_step = 0; block_step < 2 * block_tiles + lag; ++block_step) {
        ptx::cp_async_wait<lookahead - 1>();
        __syncthreads();  // this step's tile is there for all; the slot that is loaded next has been read by all
        load(block_step + lookahead);
        if (config::paged) {
            const int next = block_step + lookahead + 1;
            if (next % 2 == 0) {
                keys.fill(next / 2, next_page);
            } else {
                next_page = keys.look_up((next + 1) / 2);
            }
        }

        const int step = block_step - warp_lag, tile = step / 2, first_key = tile * key_tile;
        if (step < 0 || tile >= warp_tiles) continue;
        if (step % 2 == 0) {
            TileProducts::multiply_keys(score, query, ring_slot(step), lane);
            continue;
        }

        if (params.negate_scores) {
#pragma unroll
            for (int b = 0; b < key_tile / 8; ++b) {
#pragma unroll
                for (int c = 0; c < 4; ++c) score[b][c] = -score[b][c];
            }
        }
        if (first_key + key_tile > (config::paged ? seen_by_all : place.visible_keys(warp_row))) {
            const int row = warp_row + lane / 4;
            mask_scores(score, {place.visible_keys(row) - first_key, place.visible_keys(row + 8) - first_key}, lane);
        }
        float rescale[2];
        softmax_tile(score, rows, params.factor, rescale);
        // Skipped only where it would multiply by exactly 1.
        if (__any_sync(all_lanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
            for (int b = 0; b < columns / 8; ++b) {
#pragma unroll
                for (int c = 0; c < 4; ++c) out[b][c] = __fmul_rn(out[b][c], rescale[c / 2]);
            }
        }
        TileProducts::multiply_values(out, score, ring_slot(step), lane);

        if (first_key + key_tile == chunk_end && tile + 1 < warp_tiles) {
            merged.fold(out, rows, first_chunk());
            merged.store(out, rows);
            rows.reset();
#pragma unroll
            for (int b = 0; b < columns / 8; ++b) out[b][0] = out[b][1] = out[b][2] = out[b][3] = 0.0f;
            chunk_end += config::chunk_length(chunk_end);
        }
    }

    merged.fold(out, rows, first_chunk());
    const BlockPlace end(params, params.query_heads, 1, lane);  // found again rather than kept in registers
    const int first_row = end.query_start + warp_row;
    float* const row_lse =
        params.lse
            ? params.lse + (i64(end.query_batch) * params.query_heads + end.head) * params.query_length + first_row
            : nullptr;
    u16* const row_out =
        end.start_of(static_cast<u16*>(params.out), params.out_strides, end.query_batch, end.head, first_row);
    store_rows<head_dim, config::bfloat16>(out, rows, warp_row, end.query_length, [&](int row) {
        return RowPlace{row_out + row * params.out_strides.token, row_lse ? row_lse + row : nullptr};
    });
}

}  // namespace cuattn
