// Gradients of keys and values, any dtype and head dim. The including unit defines namespace cuattn::config with the
// constants of one KeysConfig (cuattn/jit/unit.py).
//
// A block has key_tile keys of one key head, and passes over the rows that contribute of all query heads of the group:
// heads ascending, rows ascending: row_step are copied at a time, row_part computed. A warp has 16 key_blocks keys; column_warps of them share the keys,
// compute the same scores and divide the columns of the gradients. Scores are computed with keys as rows, so that weights
// are in place as left operands. Records of rows are asked for one step ahead of the rows. What is summed, and in which
// order, depends on the sequence alone (docs/numerics.md).
#pragma once

#include <attn/epilogue.cuh>
#include <attn/exchange.cuh>
#include <attn/fragments.cuh>
#include <attn/matmul.cuh>
#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/records.cuh>
#include <attn/search.cuh>
#include <attn/sequence.cuh>
#include <attn/tile.cuh>
#include <attn/transposed_fragments.cuh>
#include <common/types.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::head_dim, config::tile_dim, config::value_dim, config::value_tile_dim;
using config::key_warps, config::key_blocks, config::column_warps, config::row_step, config::row_part;

constexpr int threads = 32 * key_warps * column_warps;
constexpr int warp_keys = 16 * key_blocks, key_tile = warp_keys * key_warps;

using Operands = Fragments<config::float32, config::bfloat16>;
using Transposed = TransposedFragments<config::float32, config::bfloat16>;
using Element = Operands::Element;
using KeyTile = Tile<tile_dim, sizeof(Element)>;
using ValueTile = Tile<value_tile_dim, sizeof(Element)>;
using KeySequence = Sequence<false, true, true>;  // what a row sees stands in its record

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(row_part % 16 == 0 && row_step % row_part == 0 && row_step <= threads);
static_assert(share_of<column_warps>(head_dim) * column_warps <= tile_dim &&
              share_of<column_warps>(value_dim) * column_warps <= value_tile_dim);

struct Rows {
    unsigned char query[row_step * KeyTile::row_bytes], dout[row_step * ValueTile::row_bytes];
};

// Warps that share keys compute the scores of some rows each, where there are enough, and pass them on.
constexpr bool share_scores = column_warps > 1 && row_part >= 16 * column_warps;
using Scores = SharedResults<share_scores, key_warps, 2, key_blocks, row_part / 8>;

struct SharedMemory : Scores {
    alignas(1024) unsigned char key[key_tile * KeyTile::row_bytes];
    unsigned char value[key_tile * ValueTile::row_bytes];
    Rows rows[2];                    // of this step and the next
    RowRecord records[3][row_step];  // and of the one after
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);

// A step's rows: those from number `row` on of the `count` that contribute of query head `head`.
struct Step {
    int head, row, count;
};

class BlockKeys {
  public:
    __device__ __forceinline__ BlockKeys(const BackwardParams& params, SharedMemory& shared,
                                         const KeySequence& sequence, int key_head, int first_key)
        : params_(params),
          shared_(shared),
          index_(sequence.index),
          query_batch_(sequence.query_batch),
          query_start_(sequence.query_start),
          key_head_(key_head),
          first_key_(first_key),
          lane_(threadIdx.x & 31),
          key_warp_(threadIdx.x / 32 / column_warps),
          column_warp_(threadIdx.x / 32 % column_warps) {}

    __device__ __forceinline__ void run(const KeySequence& sequence) {
        store_padding(sequence);
        if (first_key_ >= sequence.key_length) return;
        load_keys(sequence);
        next_ = first_step(key_head_ * params_.forward.group);
        load_records();
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        load_step();

        float dkey[key_blocks][share_of<column_warps>(head_dim) / 8][4],
            dvalue[key_blocks][share_of<column_warps>(value_dim) / 8][4];
        clear(dkey);
        clear(dvalue);
#pragma unroll 1
        for (int step = 0; step < loaded_; ++step) {
            ptx::cp_async_wait<0>();
            __syncthreads();  // this step's rows are there for all; what is loaded next has been read by all
            load_step();
            const u32 records = ptx::shared_address(shared_.records[step % 3]);
            const u32 rows = ptx::shared_address(&shared_.rows[step % 2]);
#pragma unroll 1
            for (int first = 0; first < row_step; first += row_part) {
                add_rows(dkey, dvalue, records + first * sizeof(RowRecord), rows + first * KeyTile::row_bytes,
                         rows + row_step * KeyTile::row_bytes + first * ValueTile::row_bytes);
            }
        }
        const KeySequence end(params_.forward, index_);  // found again rather than kept in registers
        store(end, params_.dkey, params_.dkey_strides, dkey, head_dim, params_.scale);
        store(end, params_.dvalue, params_.dvalue_strides, dvalue, value_dim, 1.0f);
    }

  private:
    template <int blocks>
    __device__ __forceinline__ static void clear(float (&x)[key_blocks][blocks][4]) {
#pragma unroll
        for (int m = 0; m < key_blocks; ++m) {
#pragma unroll
            for (int b = 0; b < blocks; ++b) x[m][b][0] = x[m][b][1] = x[m][b][2] = x[m][b][3] = 0.0f;
        }
    }

    // The place of a key that exists.
    __device__ __forceinline__ int place_of(const KeySequence& sequence, int key) const {
        return sequence.pages ? sequence.page_at(params_.forward.sequences, key) : key;
    }

    template <class T>
    __device__ __forceinline__ T* place_in(const KeySequence& sequence, T* data, const Strides& strides,
                                           int place) const {
        return KeySequence::start_of(data, strides, sequence.key_batch, key_head_, sequence.key_start + place);
    }

    __device__ __forceinline__ void load_keys(const KeySequence& sequence) const {
        const ForwardParams& forward = params_.forward;
        const int existing = sequence.key_length - first_key_;
        const auto place = [&](int row) { return row < existing ? place_of(sequence, first_key_ + row) : 0; };
        KeyTile::template load<head_dim, key_tile, threads>(
            ptx::shared_address(shared_.key), existing, threadIdx.x, place, [&](int at) {
                return place_in(sequence, static_cast<const Element*>(forward.key), forward.key_strides, at);
            });
        ValueTile::template load<value_dim, key_tile, threads>(
            ptx::shared_address(shared_.value), existing, threadIdx.x, place, [&](int at) {
                return place_in(sequence, static_cast<const Element*>(forward.value), forward.value_strides, at);
            });
    }

    __device__ __forceinline__ const RowRecord* records_of(int head) const {
        return params_.contributing + first_record(params_.forward, query_batch_, query_start_, head);
    }

    // The first step of query head `head` or of the first one behind it that has rows: it is the first that sees the
    // block's keys, but starts with a whole group. Of a head behind the group there is none.
    __device__ __forceinline__ Step first_step(int head) const {
        const int end = (key_head_ + 1) * params_.forward.group;
        for (; head < end; ++head) {
            const int count = ptx::load_global_s32(params_.counts + i64(index_) * params_.forward.query_heads + head);
            if (count == 0) continue;
            const RowRecord* const records = records_of(head);
            const int last_without = last_sequence(
                count, lane_, [&](int i) { return ptx::load_global_s32(&records[i].visible) <= first_key_; });
            return {head, last_without / 16 * 16, count};
        }
        return {end, 0, 0};
    }

    // Starts the copy of the records of step next_.
    __device__ __forceinline__ void load_records() {
        const int row = next_.row + static_cast<int>(threadIdx.x);
        if (next_.count == 0 || threadIdx.x >= row_step) return;
        const u32 to = ptx::shared_address(&shared_.records[loaded_ % 3][threadIdx.x]);
        ptx::cp_async_16(to, records_of(next_.head) + row, row < next_.count);
    }

    // Starts the copies of the rows whose records are there, and of the records behind them.
    __device__ __forceinline__ void load_step() {
        const Step step = next_;
        if (step.count > 0) {
            const ForwardParams& forward = params_.forward;
            const u32 records = ptx::shared_address(shared_.records[loaded_ % 3]);
            Rows& rows = shared_.rows[loaded_ % 2];
            const int existing = step.count - step.row;
            const auto number = [&](int row) {
                return static_cast<int>(ptx::load_shared_u32(records + row * sizeof(RowRecord) + 12));
            };
            const auto start = [&](const void* data, const Strides& strides, int row) {
                return KeySequence::start_of(static_cast<const Element*>(data), strides, query_batch_, step.head,
                                             query_start_ + row);
            };
            KeyTile::template load<head_dim, row_step, threads>(
                ptx::shared_address(rows.query), existing, threadIdx.x, number,
                [&](int row) { return start(forward.query, forward.query_strides, row); });
            ValueTile::template load<value_dim, row_step, threads>(
                ptx::shared_address(rows.dout), existing, threadIdx.x, number,
                [&](int row) { return start(params_.dout, params_.dout_strides, row); });
            ++loaded_;
            next_.row += row_step;
            if (next_.row >= next_.count) next_ = first_step(step.head + 1);
            load_records();
        }
        ptx::cp_async_commit();
    }

    // Adds rows to the gradients; the shared addresses are those of their records, queries and upstream gradients.
    template <int key_columns, int value_columns>
    __device__ __forceinline__ void add_rows(float (&dkey)[key_blocks][key_columns][4],
                                             float (&dvalue)[key_blocks][value_columns][4], u32 records, u32 query,
                                             u32 dout) {
        const int last_visible =
            static_cast<int>(ptx::load_shared_u32(records + (row_part - 1) * sizeof(RowRecord) + 8));
        // whether any of the rows sees any of the warp's keys: of the last rows there may be none
        const bool seen = last_visible == 0 || last_visible > first_key_ + key_warp_ * warp_keys;
        float weight[key_blocks][row_part / 8][4], dscore[key_blocks][row_part / 8][4];
        if constexpr (!share_scores) {
            if (!seen) return;
            compute_weights(weight, records, query);
            add_product<Operands, ValueTile>(dvalue, weight, dout, column_warp_ * value_columns * 8, lane_);
            compute_dscores(dscore, weight, records, dout);
            add_product<Operands, KeyTile>(dkey, dscore, query, column_warp_ * key_columns * 8, lane_);
        } else {
            const Exchange<key_blocks, row_part / 8> exchange(shared_.room(turn_, key_warp_), lane_);
            if (seen) {
                constexpr int share = share_scores ? row_part / column_warps : row_part;
                const int first = column_warp_ * share;
                float my_weight[key_blocks][share / 8][4], my_dscore[key_blocks][share / 8][4];
                compute_weights(my_weight, records + first * sizeof(RowRecord), query + first * KeyTile::row_bytes);
                compute_dscores(my_dscore, my_weight, records + first * sizeof(RowRecord),
                                dout + first * ValueTile::row_bytes);
                exchange.store(0, my_weight, first / 8);
                exchange.store(1, my_dscore, first / 8);
            }
            turn_ ^= 1;
            __syncthreads();
            if (!seen) return;
            exchange.load(0, weight);
            add_product<Operands, ValueTile>(dvalue, weight, dout, column_warp_ * value_columns * 8, lane_);
            exchange.load(1, dscore);
            add_product<Operands, KeyTile>(dkey, dscore, query, column_warp_ * key_columns * 8, lane_);
        }
    }

    // Weights of the warp's keys for some rows.
    template <int blocks>
    __device__ __forceinline__ void compute_weights(float (&weight)[key_blocks][blocks][4], u32 records,
                                                    u32 query) const {
        const u32 keys = ptx::shared_address(shared_.key) + key_warp_ * warp_keys * KeyTile::row_bytes;
        multiply_rows<Transposed, KeyTile, groups_of<Operands>(head_dim)>(weight, keys, query, lane_);
        const float factor = params_.forward.negate_scores ? -params_.forward.factor : params_.forward.factor;
        for_each<blocks>(records, [&](int m, int b, int c, const RowRecord& row, int key) {
            weight[m][b][c] = weight_of(weight[m][b][c], factor, row, key);
        });
    }

    // The gradients of their scores.
    template <int blocks>
    __device__ __forceinline__ void compute_dscores(float (&dscore)[key_blocks][blocks][4],
                                                    const float (&weight)[key_blocks][blocks][4], u32 records,
                                                    u32 dout) const {
        const u32 values = ptx::shared_address(shared_.value) + key_warp_ * warp_keys * ValueTile::row_bytes;
        multiply_rows<Transposed, ValueTile, groups_of<Operands>(value_dim)>(dscore, values, dout, lane_);
        for_each<blocks>(records, [&](int m, int b, int c, const RowRecord& row, int key) {
            dscore[m][b][c] = dscore_of(weight[m][b][c], dscore[m][b][c], row, key);
        });
    }

    // Calls body(m, b, c, row, key) for each element [m][b][c] of a result, whose columns are rows.
    template <int blocks, class Body>
    __device__ __forceinline__ void for_each(u32 records, const Body& body) const {
        const int key = first_key_ + key_warp_ * warp_keys + lane_ / 4;
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowRecord row =
                    record_of(ptx::load_shared_f32x4(records + (8 * b + 2 * (lane_ & 3) + c) * sizeof(RowRecord)));
#pragma unroll
                for (int i = 0; i < 2 * key_blocks; ++i) body(i / 2, b, 2 * (i & 1) + c, row, key + 8 * i);
            }
        }
    }

    // Writes the warp's part of a gradient, times `scale`.
    template <int blocks>
    __device__ __forceinline__ void store(const KeySequence& sequence, void* data, const Strides& strides,
                                          const float (&gradient)[key_blocks][blocks][4], int columns,
                                          float scale) const {
#pragma unroll
        for (int i = 0; i < 2 * key_blocks; ++i) {
            const int key = first_key_ + key_warp_ * warp_keys + 8 * i + lane_ / 4;
            if (key >= sequence.key_length) continue;
            Element* const row = place_in(sequence, static_cast<Element*>(data), strides, place_of(sequence, key));
#pragma unroll
            for (int b = 0; b < blocks; ++b) {
                const int column = (column_warp_ * blocks + b) * 8 + 2 * (lane_ & 3), c = 2 * (i & 1);
                if (column < columns) {
                    store_pair<config::float32, config::bfloat16>(row, column, normalised(gradient[i / 2][b][c], scale),
                                                                  normalised(gradient[i / 2][b][c + 1], scale));
                }
            }
        }
    }

    // Zeros at those of the places [first_key_, first_key_ + key_tile) that hold no key.
    __device__ __forceinline__ void store_padding(const KeySequence& sequence) const {
        const int end = min(key_tile, sequence.places - first_key_);
        for (int i = key_warp_ * column_warps + column_warp_; i < end; i += threads / 32) {
            const int place = first_key_ + i;
            const bool is_key = sequence.seen ? ptx::load_global_s32(sequence.seen + place) <
                                                    ptx::load_global_s32(sequence.seen + place + 1)
                                              : place < sequence.key_length;
            if (is_key) continue;
            const auto clear_row = [&](void* data, const Strides& strides, int columns) {
                Element* const row = place_in(sequence, static_cast<Element*>(data), strides, place);
                for (int column = 2 * lane_; column < columns; column += 64) {
                    store_pair<config::float32, config::bfloat16>(row, column, 0.0f, 0.0f);
                }
            };
            clear_row(params_.dkey, params_.dkey_strides, head_dim);
            clear_row(params_.dvalue, params_.dvalue_strides, value_dim);
        }
    }

    const BackwardParams& params_;
    SharedMemory& shared_;
    const int index_, query_batch_, query_start_;  // of the sequence
    const int key_head_, first_key_;
    const int lane_, key_warp_, column_warp_;
    Step next_;       // whose records are on their way
    int turn_ = 0;    // of the two exchanges
    int loaded_ = 0;  // steps whose rows are on their way or were
};

extern "C" __global__ void __launch_bounds__(threads, config::blocks_per_multiprocessor)
    backward_keys(const __grid_constant__ BackwardParams params) {
    const ForwardParams& forward = params.forward;
    const int item = blockIdx.x / params.key_tiles;
    const int* const starts = forward.sequences.key_starts;
    int tile = blockIdx.x % params.key_tiles;
    const KeySequence sequence(forward, starts ? find_sequence<key_tile>(starts, forward.sequences.count, tile, 1,
                                                                         static_cast<int>(threadIdx.x & 31))
                                               : item / params.key_heads);
    if (starts) tile -= sequence.key_start / key_tile + sequence.index;
    if (tile < 0 || tile * key_tile >= sequence.places) return;
    BlockKeys(params, *static_cast<SharedMemory*>(ptx::dynamic_shared()), sequence, item % params.key_heads,
              tile * key_tile)
        .run(sequence);
}

}  // namespace cuattn
