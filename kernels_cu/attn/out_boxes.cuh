// Finished rows on their way through shared memory, from where the copy engine stores them.
#pragma once

#include <attn/block_work.cuh>
#include <attn/epilogue.cuh>
#include <attn/params.cuh>
#include <attn/rows.cuh>
#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/tma.cuh>

namespace cuattn {

// A warp's 16 packed rows, from first_row on, as a box of the outputs: 16 / group tokens of all query heads of a key head. A
// box has a head's tokens behind each other, packed rows a token's heads. What lies behind the outputs' end the copy engine
// leaves out; what would start before them must not be asked for.
//
// columns: of the tile that room holds in panels, value_dim of which matter.
template <int columns, int value_dim, bool bfloat16>
class OutBox {
    static constexpr int rows = config::warp_rows, panel_bytes = rows * 128;
    static_assert(rows == 16 && first_row_unit == rows,
                  "what the fragments of a warp hold: no box starts before the outputs");
    using Room = Tile<columns, 2, rows>;

  public:
    static constexpr int bytes = rows * Room::row_bytes;

    // `room`: at a multiple of 1024, what was stored from there is settled.
    template <int blocks>
    __device__ __forceinline__ static void store(const ForwardSm90Params& params, const Work& work, int first_row,
                                                 const float (&out)[blocks][4], const RowStatistics& statistics,
                                                 u32 room) {
        const ForwardParams& call = params.call.forward;
        const int lane = threadIdx.x & 31;
        if (call.lse) store_lse(call, work, first_row, statistics, lane);
        __syncwarp();  // all lanes have read what was in the room
        stage(params, out, statistics, room);
        ptx::fence_async_proxy();
        __syncwarp();
        // the same for all lanes, and the compiler must know, or it puts a loop around each store
        room = __shfl_sync(all_lanes, room, 0), first_row = __shfl_sync(all_lanes, first_row, 0);
        if (lane == 0 && first_row >= 0) {
#pragma unroll
            for (int panel = 0; panel < (value_dim + 63) / 64; ++panel) {
                ptx::tma_store_4d(params.out_map, panel * 64, first_row >> params.group_shift,
                                  work.key_head * call.group, work.sequence.query_batch, room + panel * panel_bytes);
            }
            ptx::tma_store_commit();
        }
    }

    // Until room may be written again. By all lanes.
    __device__ __forceinline__ static void settle() {
        ptx::tma_store_wait();  // of one lane's stores
        __syncwarp();
    }

  private:
    // out[b][c]: as in store_rows. Two blocks of columns at a time.
    template <int blocks>
    __device__ __forceinline__ static void stage(const ForwardSm90Params& params, const float (&out)[blocks][4],
                                                 const RowStatistics& statistics, u32 room) {
        static_assert(blocks % 2 == 0 && blocks * 8 >= value_dim);
        const int lane = threadIdx.x & 31, row = lane & 15, shift = params.group_shift;
        const int token = row >> shift, head = row - (token << shift), place = head * (rows >> shift) + token;
        const float scale[2] = {normalisation(statistics.reference[0], statistics.sum[0]),
                                normalisation(statistics.reference[1], statistics.sum[1])};
#pragma unroll
        for (int b = 0; b < (value_dim + 8) / 16 * 2; b += 2) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // rows 0 to 7 and 8 to 15 of a block, then of the next one
                const float* const pair = &out[b + i / 2][2 * (i & 1)];
                word[i] =
                    ptx::pack_16bit<bfloat16>(normalised(pair[0], scale[i & 1]), normalised(pair[1], scale[i & 1]));
            }
            ptx::stmatrix_x4(room + Room::offset(place, b + (lane >> 4)), word);
        }
    }

    // Lane r has row r.
    __device__ __forceinline__ static void store_lse(const ForwardParams& call, const Work& work, int first_row,
                                                     const RowStatistics& statistics, int lane) {
        const int owner = (lane & 7) * 4;
        float reference[2], sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            reference[half] = __shfl_sync(all_lanes, statistics.reference[half], owner);
            sum[half] = __shfl_sync(all_lanes, statistics.sum[half], owner);
        }
        const KeySequence& sequence = work.sequence;
        const PackedRow packed(call, work.key_head, first_row + lane);
        const bool exists = lane < rows && u32(first_row + lane) < u32(sequence.query_length * call.group);
        const int half = lane >> 3 & 1;
        ptx::store_global_f32_if(exists, call.lse + packed.index(call, sequence.query_batch, sequence.query_start),
                                 log_sum_exp(half ? reference[1] : reference[0], half ? sum[1] : sum[0]));
    }
};

}  // namespace cuattn
