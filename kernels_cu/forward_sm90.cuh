// Forward attention for Hopper (sm_90a) in 16 bits: wgmma, the copy engine, mbarriers. The including unit defines namespace
// cuattn::config with the constants of one KernelConfig (cuattn/jit/unit.py).
//
// One block computes packed rows of one key head, 64 for each consumer warpgroup, and then others. Warpgroup 0 fills the ring
// with tiles of keys and values, and fetches the next queries (attn/producers.cuh), of which consumers keep in registers what
// fits. A consumer starts the products of its queries with the keys of tile j and then those of the weights with the values of
// tile j - 1, and turns scores into weights (attn/softmax_sm90.cuh); warpgroups take turns, so that one's exponentials overlap
// the other's products. Several blocks may share the chunks of the same rows (attn/block_work.cuh). What a row computes, and in
// which order, depends on absolute key positions alone (docs/numerics.md), and is what the other kernels compute.
#pragma once

#include <attn/block_sm90.cuh>
#include <attn/block_work.cuh>
#include <attn/chunks.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/producers.cuh>
#include <attn/query_copies.cuh>
#include <attn/results.cuh>
#include <attn/ring.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/softmax_sm90.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/grid.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <ptx/wgmma.cuh>

namespace cuattn {

// One consumer warpgroup.
class Consumer {
  public:
    __device__ __forceinline__ Consumer(const ForwardSm90Params& params, const RingAddress& ring, SharedMemory& shared,
                                        int number)
        : call_(params),
          params_(params.call.forward),
          ring_(ring),
          number_(number),
          query_(ptx::shared_address(shared.query[number])),
          queries_filled_(ptx::shared_address(&shared.queries_filled[number])),
          queries_free_(ptx::shared_address(&shared.queries_free[number])),
          merged_(ptx::shared_address(shared.merged)) {
        if (number == consumers - 1) pass_turn();  // the first warpgroup has the first turn
    }

    // The copy engine has read what this warp stores, before its room is written again or the warp ends.
    __device__ __forceinline__ static void settle() {
        if constexpr (config::out_boxes) Box::settle();
    }

    // Computes the chunks of `work` for this warpgroup's rows, and stores the results, or partial results.
    __device__ __forceinline__ void attend(const Work& work) {
        const int group = params_.group, first_row = work.first_row + number_ * group_rows;
        const bool has_rows = first_row < work.sequence.query_length * group && first_row > -group_rows;
        const Tiles block(work, group, work.first_row + block_rows);
        const Tiles own(work, group, first_row + group_rows);
        await_queries(work, first_row);
        add_chunks(work, block, has_rows ? min(own.end, block.end) : block.first);
    }

  private:
    __device__ __forceinline__ void await_queries(const Work& work, int first_row) {
        if constexpr (fetches_queries) {
            ptx::mbarrier_wait(queries_filled_, queries_parity_);
            queries_parity_ ^= 1;
        } else {
            meet();  // earlier rows are not needed any more
            copy_queries<QueryTile, head_dim, 16>(params_, work, first_row, warp() * 16, query_);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            ptx::fence_async_proxy();
            meet();
        }
#pragma unroll
        for (int k = 0; k < held_queries; ++k) {
            ptx::ldmatrix_x4(held_[k], query_ + QueryTile::offset(warp() * 16 + (lane() & 15), 2 * k + (lane() >> 4)));
        }
        __syncwarp();  // all lanes have them
        release_queries(true);
    }
    // What is in shared memory is not needed any more: early where registers hold all of it, else behind the last product.
    __device__ __forceinline__ void release_queries(bool early) const {
        if (fetches_queries && early == holds_queries && lane() == 0) ptx::mbarrier_arrive(queries_free_);
    }

    // Of the block's tiles those before `end` concern this warpgroup.
    __device__ __forceinline__ void add_chunks(const Work& work, const Tiles& block, int end) {
        reset();
        const int warp_row = first_row_of(work);
        // of the warp's rows; the same for all lanes, and the compiler must know
        const int seen_by_all = __shfl_sync(all_lanes, work.sequence.visible_keys(warp_row / params_.group), 0);
        int chunk = work.first_chunk, chunk_end = config::chunk_start(chunk + 1);
        bool adds = false;  // the next product with values is not a chunk's first
        if (block.first < end) {
            wait_filled();
            ptx::wgmma_fence();
            multiply_keys();
            settle();
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(score_);
            release(at_);
            if (block.first + 1 == end) release_queries(false);
            at_ = at_.next();
            float rescale[2];
            hide(work, block.first, seen_by_all);
            softmax_tile(score_, rows_, params_.factor, rescale);
            Products::pack(weight_, score_);
            wait_filled();
        } else {
            settle();
            release_queries(false);
        }
#pragma unroll 1
        for (int tile = block.first + 1; tile < end; ++tile) {
            const At keys = at_;
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
            if (tile + 1 == end) release_queries(false);
            const bool starts_chunk = tile * key_tile == chunk_end;
            RowStatistics finished = rows_;
            if (starts_chunk) rows_.reset();
            hide(work, tile, seen_by_all);
            float rescale[2];
            softmax_beside_product<Products>(score_, weight_, out_, rows_, params_.factor, rescale, query_);
            release(at_);
            at_ = at_.next();
            wait_filled();
            adds = !starts_chunk;
            if (starts_chunk) {
                finish_chunk(work, chunk++, finished);
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
        if (block.first < end) {
            if (end < block.end) skip();  // keys of a tile that no row here sees
            wait_filled();
            ptx::wgmma_fence();
            multiply_values(adds);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(out_);
            release(at_);
            at_ = at_.next();
        }
        leave_rest(block, end);
        finish(found_again(work), chunk);
    }

    // The last of this warpgroup's chunks is in out_ and rows_.
    __device__ __forceinline__ void finish(const Work& work, int chunk) {
        if (!split || work.first_chunk == 0) {
            merged().fold(out_, rows_, chunk == 0);
            if (!split || work.end_chunk == work.chunks) {
                store(work);
            } else {
                store_part(work, 0, rows_);
            }
        } else {
            for (;; reset()) {  // chunks that no row here sees, too
                finish_chunk(work, chunk, rows_);
                if (++chunk >= work.end_chunk) break;
            }
        }
    }

    // The same work, not kept in registers over the chunks.
    __device__ __forceinline__ Work found_again(const Work& known) const {
        if constexpr (config::few || !config::ragged) return known;
        Work work;
        tile_work<block_rows>(params_, call_.pieces, known.turn, lane(), work);
        return work;
    }

    __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
    __device__ __forceinline__ static int warp() { return threadIdx.x / 32 & 3; }  // of the warpgroup

    // This warp's first row.
    __device__ __forceinline__ int first_row_of(const Work& work) const {
        return work.first_row + number_ * group_rows + warp() * 16;
    }

    // Named barriers: each warpgroup's turn, and each warpgroup's own.
    __device__ __forceinline__ void take_turn() const {
        if (takes_turns) ptx::barrier_sync<2 * warpgroup>(1 + number_);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (takes_turns) ptx::barrier_arrive<2 * warpgroup>(1 + (number_ + 1) % consumers);
    }
    __device__ __forceinline__ void meet() const { ptx::barrier_sync<warpgroup>(1 + consumers + number_); }

    __device__ __forceinline__ void wait_filled() const {
        ptx::mbarrier_wait(ring_.filled + at_.slot * ptx::mbarrier_bytes, at_.parity);
    }
    __device__ __forceinline__ void release(const At& at) const {
        if (lane() == 0) ptx::mbarrier_arrive(ring_.free + at.slot * ptx::mbarrier_bytes);
    }
    __device__ __forceinline__ void skip() {
        wait_filled();
        __syncwarp();  // all lanes have seen it, before the slot's next turn may begin
        release(at_);
        at_ = at_.next();
    }

    // Tiles from `end` on, with which other warpgroups of the block go on: turns and slots are passed on without work.
    __device__ __forceinline__ void leave_rest(const Tiles& block, int end) {
        const int first = max(end, block.first);
        if (first == block.end) return;
#pragma unroll 1
        for (int tile = first; tile < block.end; ++tile) {
            if (tile > block.first) {
                take_turn();
                pass_turn();
            }
            // Behind own tiles the next one's keys have been taken before the values of the last one.
            if (tile == first && tile > block.first) continue;
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
    __device__ __forceinline__ void finish_chunk(const Work& work, int chunk, RowStatistics& rows) {
        if (!split || work.first_chunk == 0) {
            merged().fold(out_, rows, chunk == 0);
            merged().store(out_, rows);
        } else {
            rows.sum[0] = quad_sum(rows.sum[0]);
            rows.sum[1] = quad_sum(rows.sum[1]);
            store_part(work, chunk, rows);
        }
    }

    // The result of chunk `chunk`, or, where chunk 0 stands, of all chunks up to the end of the work.
    __device__ __forceinline__ void store_part(const Work& work, int chunk, const RowStatistics& rows) const {
        if constexpr (split) {
            const int warp_row = first_row_of(work);
            const WarpRows warp{warp_row, 0, work.sequence.query_length * params_.group - warp_row};
            store_partial<value_dim>(call_.call, work, warp, chunk, out_, rows, lane());
        }
    }

    __device__ __forceinline__ void store(const Work& work) const {
        const KeySequence& sequence = work.sequence;
        const int first = first_row_of(work);
        if constexpr (config::out_boxes) {
            Box::store(call_, work, first, out_, rows_, room());
        } else {
            const int batch = sequence.query_batch, start = sequence.query_start;
            store_rows<value_dim, config::bfloat16>(
                out_, rows_, first, sequence.query_length * params_.group, [&](int row) {
                    const PackedRow packed(params_, work.key_head, first + row);
                    return RowPlace{static_cast<u16*>(params_.out) + packed.offset(params_.out_strides, batch, start),
                                    params_.lse ? params_.lse + packed.index(params_, batch, start) : nullptr};
                });
        }
    }

    // Made anew for each use, rather than a pointer kept in registers.
    __device__ __forceinline__ Merged merged() const {
        const i64 place = (i64(blockIdx.x) * consumers + number_) * 4 + warp();
        constexpr int outputs_bytes = consumers * 4 * Merged::out_bytes;
        return Merged(room(), merged_ + outputs_bytes + (number_ * 4 + warp()) * Merged::row_bytes,
                      call_.merged + place * Merged::out_floats);
    }
    __device__ __forceinline__ u32 room() const { return merged_ + (number_ * 4 + warp()) * Merged::out_bytes; }

    __device__ __forceinline__ void multiply_keys() { Products::multiply_keys(score_, held_, query_, slot()); }
    __device__ __forceinline__ void multiply_values(bool adds) {
        ptx::wgmma_fence();
        Products::multiply_values(out_, weight_, slot(), adds);
    }
    __device__ __forceinline__ u32 slot() const { return ring_.slots + at_.slot * (slot_elements * 2); }

    // Scores of keys that a row does not see become -inf.
    __device__ __forceinline__ void hide(const Work& work, int tile, int seen_by_all) {
        if (params_.negate_scores) {
#pragma unroll
            for (int b = 0; b < key_tile / 8; ++b) {
#pragma unroll
                for (int c = 0; c < 4; ++c) score_[b][c] = -score_[b][c];
            }
        }
        const int first_key = tile * key_tile;
        if (first_key + key_tile > seen_by_all) {
            const int row = first_row_of(work) + lane() / 4;
            mask_scores(score_,
                        {work.sequence.visible_keys(row / params_.group) - first_key,
                         work.sequence.visible_keys((row + 8) / params_.group) - first_key},
                        lane());
        }
    }

    const ForwardSm90Params& call_;
    const ForwardParams& params_;
    const RingAddress ring_;
    const int number_;
    const u32 query_, queries_filled_, queries_free_, merged_;
    u32 queries_parity_ = 0;
    At at_;
    RowStatistics rows_;
    Products::Scores score_;
    Products::Out out_;
    Products::Weights weight_;
    Products::Queries held_;
};

// Fills the ring for all works of the block.
__device__ __forceinline__ void produce_keys(const ForwardSm90Params& params, const Start<block_rows>& start,
                                             const RingAddress& ring, int lane) {
    At place;
    u32 landed_parity = 0;
    produce<block_rows>(params, start, lane, [&](const Work& work, const Tiles& tiles) {
        if (!config::paged || (finds_pieces && params.mapped && work.sequence.first_place >= 0)) {
            fill<KeyBoxes>(params, work, tiles, ring, place, landed_parity);
        } else {
            fill<KeyRows>(params, work, tiles, ring, place, landed_parity);
        }
    });
}

// Fetches the queries of consumer `number` for all works of the block. By one warp.
__device__ __forceinline__ void produce_queries(const ForwardSm90Params& params, const Start<block_rows>& start,
                                                SharedMemory& shared, int number, int lane) {
    const u32 query = ptx::shared_address(shared.query[number]);
    const u32 filled = ptx::shared_address(&shared.queries_filled[number]),
              free = ptx::shared_address(&shared.queries_free[number]);
    u32 parity = 0;
    for_each_work<block_rows>(params, lane, start, [&](const Work& work) {
        ptx::mbarrier_wait(free, parity ^ 1);
        parity ^= 1;
        __syncwarp();  // all lanes have seen it, before one of them may begin the next turn
        copy_queries<QueryTile, head_dim, group_rows>(params.call.forward, work, work.first_row + number * group_rows,
                                                      0, query);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(filled);
    });
}

extern "C" __global__ void __launch_bounds__(threads, 1)
    forward_sm90(const __grid_constant__ ForwardSm90Params params) {
    SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());
    const int lane = threadIdx.x & 31;
    const RingAddress ring{ptx::shared_address(shared.ring), ptx::shared_address(shared.filled),
                           ptx::shared_address(shared.free), ptx::shared_address(&shared.landed)};
    if (threadIdx.x == 0 && params.mapped) KeyBoxes::prepare(params);
    if (threadIdx.x == 0 && config::out_boxes) ptx::tma_prefetch(params.out_map);
    if (threadIdx.x == 0) init_barriers(shared, ring);
    Start<block_rows> start;
    start.find(params, lane);
    __syncthreads();
    ptx::let_later_launches_start();
    // the same for all lanes of a warp, and the compiler must know
    const int warp = __shfl_sync(all_lanes, threadIdx.x / 32, 0);
    const int number = warp / 4;
    if (number == 0) {
        if constexpr (moves_registers) ptx::release_registers<config::producer_registers>();
        if (warp < copiers / 32) {
            produce_keys(params, start, ring, lane);
        } else if (fetches_queries && warp <= consumers) {
            produce_queries(params, start, shared, warp - 1, lane);
        }
    } else {
        if constexpr (moves_registers) ptx::claim_registers<config::consumer_registers>();
        Consumer consumer(params, ring, shared, number - 1);
        for_each_work<block_rows>(params, lane, start, [&](const Work& work) { consumer.attend(work); });
        Consumer::settle();
    }
}

}  // namespace cuattn
