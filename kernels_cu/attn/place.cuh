// Where a block works: which query rows of which head of which sequence.
#pragma once

#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// The sequence that query tile `tile` of a packed batch belongs to. Sequence s gets the tiles from
// query_starts[s] / query_tile + s on: at least as many as it needs, known without a pass over the lengths before it.
// The warp searches together, 32 ways at a time.
template <int query_tile>
__device__ __forceinline__ int find_sequence(const Sequences& sequences, int tile, int lane) {
    int first = 0, count = sequences.count;
    while (count > 1) {
        const int step = (count + 31) / 32, probe = first + lane * step;
        const bool at_or_before =
            lane * step < count && ptx::load_global_s32(sequences.query_starts + probe) / query_tile + probe <= tile;
        const int found = max(0, __popc(__ballot_sync(0xffffffffu, at_or_before)) - 1);
        first += found * step;
        count = min(step, count - found * step);
    }
    return first;
}

template <int query_tile, bool causal, bool ragged>
struct Place {
    int first_row, head;           // of the sequence
    i64 batch;                     // packed: 0
    int query_start, key_start;    // packed: the sequence's first rows
    int query_length, key_length;  // the sequence's
    int diagonal;                  // causal: row i sees diagonal + i + 1 keys, if it has them

    // Longest causal rows first: the block scheduler fills the tail with short ones.
    __device__ __forceinline__ Place(const ForwardParams& params, int lane)
        : head(static_cast<int>(blockIdx.x / params.query_tiles % params.query_heads)),
          batch(blockIdx.x / params.query_tiles / params.query_heads),
          query_start(0),
          key_start(0),
          query_length(params.query_length),
          key_length(params.key_length) {
        int tile = params.query_tiles - 1 - static_cast<int>(blockIdx.x % params.query_tiles);
        if constexpr (ragged) {
            const Sequences& sequences = params.sequences;
            int sequence = static_cast<int>(batch);
            if (sequences.query_starts) {
                sequence = find_sequence<query_tile>(sequences, tile, lane);
                slice(sequences.query_starts + sequence, query_start, query_length);
                tile -= query_start / query_tile + sequence;
            }
            if (sequences.key_starts) slice(sequences.key_starts + sequence, key_start, key_length);
            diagonal = key_length - query_length;
            if (sequences.key_lengths) {
                key_length = max(0, min(key_length, ptx::load_global_s32(sequences.key_lengths + sequence)));
            }
        } else {
            diagonal = key_length - query_length;
        }
        first_row = tile * query_tile;
    }

    // False for the tiles that a packed sequence does not need, and for those of wrong cumulative lengths.
    __device__ __forceinline__ bool has_rows() const { return first_row >= 0 && first_row < query_length; }

    // Keys that the query at `row` sees: always a prefix.
    __device__ __forceinline__ int visible_keys(int row) const {
        return causal ? max(0, min(key_length, diagonal + row + 1)) : key_length;
    }

    // Row `row` of the sequence and head in `data`.
    template <class T>
    __device__ __forceinline__ T* row_of(T* data, const Strides& strides, int row, int group = 1) const {
        return data + batch * strides.batch + head / group * strides.head + row * strides.token;
    }

  private:
    // Entries [0] and [1] of cumulative lengths as start and length, inside of what there is whatever they say.
    __device__ __forceinline__ static void slice(const int* starts, int& start, int& length) {
        const int total = length;
        start = max(0, min(ptx::load_global_s32(starts), total));
        length = max(start, min(ptx::load_global_s32(starts + 1), total)) - start;
    }
};

}  // namespace cuattn
