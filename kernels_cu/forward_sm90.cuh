// Forward attention for Hopper (sm_90a) in 16 bits: wgmma, the copy engine, mbarriers. The including unit defines namespace
// cuattn::config with the constants of one KernelConfig (cuattn/jit/unit.py).
//
// One block computes packed rows of one key head, 64 for each consumer warpgroup. Warpgroup 0 fills the ring with tiles of
// keys and values. A consumer starts the products of its queries with the keys of tile j and then those of the weights with
// the values of tile j - 1, and turns scores into weights while these run; warpgroups take turns, so that one's exponentials
// overlap the other's products. With `split` several blocks share the chunks of the same rows. What a row computes, and in which order, depends on absolute key positions alone
// (docs/numerics.md), and is what the other kernels compute.
#pragma once

#include <attn/chunks.cuh>
#include <attn/epilogue.cuh>
#include <attn/key_copies.cuh>
#include <attn/params.cuh>
#include <attn/part.cuh>
#include <attn/place.cuh>
#include <attn/results.cuh>
#include <attn/ring.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <ptx/wgmma.cuh>

namespace cuattn {

using config::head_dim, config::value_dim, config::tile_dim, config::value_tile_dim, config::key_tile,
    config::consumers, config::ring_slots, config::value_columns;

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(head_dim % 8 == 0 && value_dim % 8 == 0 && value_dim <= value_columns && value_columns <= value_tile_dim);
static_assert(config::chunk_length(0) % key_tile == 0, "a chunk is a whole number of tiles");
static_assert(!config::split || config::ragged, "lengths are read on the device where blocks share rows");

constexpr int warpgroup = 128, group_rows = 64;  // threads and rows
constexpr int block_rows = consumers * group_rows, threads = (1 + consumers) * warpgroup;
constexpr int widest = tile_dim > value_tile_dim ? tile_dim : value_tile_dim;
constexpr int slot_elements = key_tile * widest;
constexpr int query_elements = group_rows * widest;  // first the queries, then rows on their way out

using QueryTile = Tile<tile_dim, 2, group_rows>;
using OutTile = Tile<value_tile_dim, 2, group_rows>;
using KeyTile = Tile<tile_dim, 2, key_tile>;
using ValueTile = Tile<value_tile_dim, 2, key_tile>;
using Merged = MergedChunks<value_columns / 8, config::merged_in_shared>;
using BlockPlace = Place<block_rows, config::causal, config::ragged, config::paged>;
using At = RingPlace<ring_slots>;

struct SharedMemory {
    alignas(1024) u16 query[consumers][query_elements];
    alignas(1024) u16 ring[ring_slots][slot_elements];
    unsigned char merged[consumers * 4][Merged::bytes_per_warp];
    u64 filled[ring_slots], free[ring_slots], landed;
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);
static_assert(QueryTile::row_bytes <= 1024 && sizeof(u64) == ptx::mbarrier_bytes);

template <bool by_rows>
struct Copies {
    using Type = BoxCopies<KeyTile, ValueTile, key_tile, slot_elements * 2, ring_slots, config::ragged, BlockPlace>;
};
template <>
struct Copies<true> {
    using Type =
        RowCopies<KeyTile, ValueTile, head_dim, value_dim, key_tile, slot_elements * 2, ring_slots, BlockPlace>;
};
using KeyCopies = Copies<config::paged>::Type;

// One consumer warpgroup's rows.
class Consumer {
  public:
    __device__ __forceinline__ Consumer(const ForwardSm90Params& params, const BlockPlace& place,
                                        const RingAddress& ring, SharedMemory& shared, int number)
        : split_(params.call),
          params_(params.call.forward),
          pieces_(params.pieces),
          merged_out_(params.merged),
          place_(place),
          ring_(ring),
          lane_(threadIdx.x & 31),
          number_(number),
          warp_(threadIdx.x / 32 & 3),
          warp_row_(place.first_row + number * group_rows + warp_ * 16),
          query_(ptx::shared_address(shared.query[number])),
          merged_rows_(ptx::shared_address(shared.merged[number * 4 + warp_])) {}

    __device__ __forceinline__ void load_queries() const {
        const u16* const queries = static_cast<const u16*>(params_.query);
        const int first = place_.first_row + number_ * group_rows;
        QueryTile::load<head_dim, group_rows, warpgroup>(
            query_, place_.query_length * params_.group - first, threadIdx.x % warpgroup, [&](int row) {
                const PackedRow packed(params_, place_.head, first + row);
                return queries + packed.offset(params_.query_strides, place_.query_batch, place_.query_start);
            });
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        meet();
    }

    // Of the block's tiles those before `end` concern this warpgroup.
    __device__ __forceinline__ void attend(const Part& part, int end) {
        reset();
        // of the warp's rows; the same for all lanes, and the compiler must know
        const int seen_by_all = __shfl_sync(all_lanes, place_.visible_keys(warp_row_ / params_.group), 0);
        int chunk = part.first_chunk, chunk_end = config::chunk_start(chunk + 1);
        bool adds = false;  // the next product with values is not a chunk's first
        if (part.first_tile < end) {
            wait_filled();
            ptx::wgmma_fence();
            multiply_keys();
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(score_);
            release(at_);
            at_ = at_.next();
            float rescale[2];
            weigh(part.first_tile, seen_by_all, rescale);
            pack();
        }
#pragma unroll 1
        for (int tile = part.first_tile + 1; tile < end; ++tile) {
            const At keys = at_;
            wait_filled();
            take_turn();
            ptx::wgmma_fence();
            multiply_keys();
            at_ = at_.next();
            wait_filled();
            multiply_values(adds);
            pass_turn();
            ptx::wgmma_wait<1>();
            ptx::wgmma_hold(score_);
            release(keys);
            const bool starts_chunk = tile * key_tile == chunk_end;
            RowStatistics finished = rows_;
            if (starts_chunk) rows_.reset();
            float rescale[2];
            weigh(tile, seen_by_all, rescale);
            ptx::wgmma_wait_after<0>(fminf(rows_.sum[0], rows_.sum[1]), query_);
            ptx::wgmma_hold(out_);
            release(at_);
            at_ = at_.next();
            pack();
            adds = !starts_chunk;
            if (starts_chunk) {
                finish_chunk(part, chunk++, finished);
                chunk_end += config::chunk_length(chunk_end);
            } else if (__any_sync(all_lanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
                // Skipped only where it would multiply by exactly 1.
#pragma unroll
                for (int b = 0; b < value_columns / 8; ++b) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) out_[b][c] = __fmul_rn(out_[b][c], rescale[c / 2]);
                }
            }
        }
        if (part.first_tile < end) {
            if (end < part.end_tile) skip();  // keys of a tile that no row here sees
            wait_filled();
            ptx::wgmma_fence();
            multiply_values(adds);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(out_);
            release(at_);
            at_ = at_.next();
        }
        leave_rest(part, end);
        if (!config::split || part.first_chunk == 0) {
            merged().fold(out_, rows_, chunk == 0);
            if (part.is_whole()) {
                store();
            } else {
                store_part(part, 0, rows_);
            }
        } else {
            for (;; reset()) {  // chunks that no row here sees, too
                finish_chunk(part, chunk, rows_);
                if (++chunk >= part.end_chunk) break;
            }
        }
    }

    // The first warpgroup has the first turn.
    __device__ __forceinline__ void start_turns() const {
        if (consumers > 1 && number_ == consumers - 1) pass_turn();
    }

  private:
    // Named barriers: each warpgroup's turn, and each warpgroup's own.
    __device__ __forceinline__ void take_turn() const {
        if (consumers > 1) ptx::barrier_sync<2 * warpgroup>(1 + number_);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (consumers > 1) ptx::barrier_arrive<2 * warpgroup>(1 + (number_ + 1) % consumers);
    }
    __device__ __forceinline__ void meet() const { ptx::barrier_sync<warpgroup>(1 + consumers + number_); }

    __device__ __forceinline__ void wait_filled() const {
        ptx::mbarrier_wait(ring_.filled + at_.slot * ptx::mbarrier_bytes, at_.parity);
    }
    __device__ __forceinline__ void release(const At& at) const {
        if (lane_ == 0) ptx::mbarrier_arrive(ring_.free + at.slot * ptx::mbarrier_bytes);
    }
    __device__ __forceinline__ void skip() {
        wait_filled();
        __syncwarp();  // all lanes have seen it, before the slot's next turn may begin
        release(at_);
        at_ = at_.next();
    }

    // Tiles from `end` on, with which other warpgroups of the block go on: turns and slots are passed on without work.
    __device__ __forceinline__ void leave_rest(const Part& part, int end) {
        const int first = max(end, part.first_tile);
        if (first == part.end_tile) return;
#pragma unroll 1
        for (int tile = first; tile < part.end_tile; ++tile) {
            if (tile > part.first_tile) {
                take_turn();
                pass_turn();
            }
            // Behind own tiles the next one's keys have been taken before the values of the last one.
            if (tile == first && tile > part.first_tile) continue;
            skip();
            if (tile > first) skip();
        }
        skip();
    }

    __device__ __forceinline__ void reset() {
        rows_.reset();
#pragma unroll
        for (int b = 0; b < value_columns / 8; ++b) out_[b][0] = out_[b][1] = out_[b][2] = out_[b][3] = 0.0f;
    }

    // Adds the chunk in out_ and `rows` to those before it; or writes it down, where these are another block's.
    __device__ __forceinline__ void finish_chunk(const Part& part, int chunk, RowStatistics& rows) {
        if (!config::split || part.first_chunk == 0) {
            merged().fold(out_, rows, chunk == 0);
            merged().store(out_, rows);
        } else {
            rows.sum[0] = quad_sum(rows.sum[0]);
            rows.sum[1] = quad_sum(rows.sum[1]);
            store_part(part, chunk, rows);
        }
    }

    // The result of chunk `chunk`, or, where chunk 0 stands, of all chunks of the first part.
    __device__ __forceinline__ void store_part(const Part& part, int chunk, const RowStatistics& rows) const {
        if constexpr (config::split) {
            const Work work = work_of(place_, part, pieces_);
            const WarpRows warp{warp_row_, 0, place_.query_length * params_.group - warp_row_};
            store_partial<value_dim>(split_, work, warp, chunk, out_, rows, lane_);
        }
    }

    __device__ __forceinline__ void store() const {
        meet();  // all warps' products with queries are done
        // found again rather than kept in registers
        const BlockPlace place = block_place<BlockPlace>(split_, pieces_, lane_);
        const int first = warp_row_;
        store_rows<value_dim, OutTile, config::bfloat16>(
            out_, rows_, query_ + warp_ * 16 * 128, min(16, place.query_length * params_.group - first),
            [&](int row) {
                const PackedRow packed(params_, place.head, first + row);
                return static_cast<u16*>(params_.out) +
                       packed.offset(params_.out_strides, place.query_batch, place.query_start);
            },
            [&](int row) {
                const PackedRow packed(params_, place.head, first + row);
                return params_.lse + packed.index(params_, place.query_batch, place.query_start);
            });
    }

    // Made anew for each use, rather than a pointer kept in registers.
    __device__ __forceinline__ Merged merged() const {
        const i64 warp = (i64(blockIdx.x) * consumers + number_) * 4 + warp_;
        return Merged(merged_rows_, merged_out_ + warp * Merged::out_floats);
    }

    // A group of products: scores, 16 columns of the head dim at a time.
    __device__ __forceinline__ void multiply_keys() {
        const u64 query = ptx::wgmma_rows(query_), keys = ptx::wgmma_rows(ring_.slots + at_.slot * (slot_elements * 2));
#pragma unroll
        for (int k = 0; k < (head_dim + 15) / 16; ++k) {
            ptx::wgmma_shared<config::bfloat16>(score_,
                                                ptx::wgmma_advance(query, k / 4 * group_rows * 128 + k % 4 * 32),
                                                ptx::wgmma_advance(keys, k / 4 * key_tile * 128 + k % 4 * 32), k > 0);
        }
        ptx::wgmma_commit();
    }

    // A group of products: outputs, 16 keys at a time.
    __device__ __forceinline__ void multiply_values(bool adds) {
        const u64 values = ptx::wgmma_columns(ring_.slots + at_.slot * (slot_elements * 2), key_tile * 128);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < key_tile / 16; ++k) {
            ptx::wgmma_registers<config::bfloat16>(out_, weight_[k], ptx::wgmma_advance(values, k * 2048),
                                                   k > 0 || adds);
        }
        ptx::wgmma_commit();
    }

    // From scores to weights; what was accumulated must be multiplied with `rescale`.
    __device__ __forceinline__ void weigh(int tile, int seen_by_all, float (&rescale)[2]) {
        if (params_.negate_scores) {
#pragma unroll
            for (int b = 0; b < key_tile / 8; ++b) {
#pragma unroll
                for (int c = 0; c < 4; ++c) score_[b][c] = -score_[b][c];
            }
        }
        const int first_key = tile * key_tile;
        if (first_key + key_tile > seen_by_all) {
            const int row = warp_row_ + lane_ / 4;
            mask_scores(score_,
                        {place_.visible_keys(row / params_.group) - first_key,
                         place_.visible_keys((row + 8) / params_.group) - first_key},
                        lane_);
        }
        softmax_tile(score_, rows_, params_.factor, rescale);
    }

    // Weights rounded to the element type, in the form of a left operand.
    __device__ __forceinline__ void pack() {
#pragma unroll
        for (int k = 0; k < key_tile / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &score_[2 * k + i / 2][2 * (i & 1)];
                weight_[k][i] = ptx::pack_16bit<config::bfloat16>(pair[0], pair[1]);
            }
        }
    }

    const SplitParams& split_;
    const ForwardParams& params_;
    const int& pieces_;
    float* const merged_out_;
    const BlockPlace& place_;
    const RingAddress ring_;
    const int lane_, number_, warp_, warp_row_;
    const u32 query_;
    const u32 merged_rows_;
    At at_;
    RowStatistics rows_;
    float score_[key_tile / 8][4], out_[value_columns / 8][4];
    u32 weight_[key_tile / 16][4];
};

extern "C" __global__ void __launch_bounds__(threads, 1)
    forward_sm90(const __grid_constant__ ForwardSm90Params params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const ForwardParams& forward = params.call.forward;
    const int lane = threadIdx.x & 31, group = forward.group;
    const BlockPlace place = block_place<BlockPlace>(params.call, params.pieces, lane);
    const bool has_work =
        !config::ragged || (place.has_rows(group) && i64(place.query_length) * group > forward.sequences.few_rows);
    const int piece = config::split ? static_cast<int>(blockIdx.x % params.pieces) : 0;
    const Part part(has_work ? tiles_until(place, group, place.first_row + block_rows) : 0, piece, params.pieces);
    if constexpr (config::split) {
        if (threadIdx.x == 0 && piece == 0) {
            const Work work = work_of(place, part, params.pieces);
            store_group(params.call, work, work.slot, block_rows, part.end_chunk,
                        has_work && !part.is_whole() ? part.chunks : 0);
        }
    }
    if (!has_work || part.first_chunk >= part.end_chunk) return;
    const RingAddress ring{ptx::shared_address(shared.ring), ptx::shared_address(shared.filled),
                           ptx::shared_address(shared.free), ptx::shared_address(&shared.landed)};
    if (threadIdx.x == 0) ring.init(ring_slots, KeyCopies::arrivals, consumers * 4);
    __syncthreads();
    // the same for all lanes of a warp, and the compiler must know
    const int number = __shfl_sync(all_lanes, threadIdx.x / warpgroup, 0);
    if (number == 0) {
        ptx::release_registers<config::producer_registers>();
        if (threadIdx.x >= KeyCopies::threads) return;
        KeyCopies copies(params, place, place.head, ring, part.first_tile);
        fill_ring<ring_slots>(ring.free, part.first_tile, part.end_tile, copies);
        copies.finish();
        return;
    }
    ptx::claim_registers<config::consumer_registers>();
    Consumer consumer(params, place, ring, shared, number - 1);
    consumer.load_queries();
    consumer.start_turns();
    const int first_row = place.first_row + (number - 1) * group_rows;
    const bool has_rows = first_row < place.query_length * group;
    consumer.attend(part, has_rows ? min(part.end_tile, tiles_until(place, group, first_row + group_rows)) : 0);
}

}  // namespace cuattn
