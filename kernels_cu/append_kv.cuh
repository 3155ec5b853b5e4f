// New keys and values into a cache, behind the keys that each sequence has. The including unit defines namespace
// cuattn::config with the constants of one AppendConfig (cuattn/jit/unit.py).
//
// Each warp takes one head of one new token at a time and copies its key and its value in units of 16 bytes. A token
// without a place in the cache is not written: beyond the capacity, of no sequence, or where a page number is wrong.
#pragma once

#include <attn/pages.cuh>
#include <attn/params.cuh>
#include <attn/search.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::threads;

// Where a new token comes from and goes to.
struct Token {
    int batch, source;       // of the new keys: packed, batch 0
    int sequence, position;  // position: of the page, or of the sequence
    int page;                // of the cache; 0 where it has none
    bool has_place;

    // `index`: of all new tokens, (batch, new_length)
    __device__ __forceinline__ Token(const AppendParams& params, i64 index, int lane)
        : batch(static_cast<int>(index / params.new_length)), source(static_cast<int>(index % params.new_length)) {
        const Sequences& sequences = params.sequences;
        int first = 0, end = params.new_length;
        sequence = batch;
        if (sequences.query_starts) {
            sequence = last_sequence(sequences.count, lane,
                                     [&](int s) { return ptx::load_global_s32(sequences.query_starts + s) <= source; });
            first = ptx::load_global_s32(sequences.query_starts + sequence);
            end = ptx::load_global_s32(sequences.query_starts + sequence + 1);
        }
        const int length = ptx::load_global_s32(sequences.key_lengths + sequence);
        has_place = first >= 0 && first <= source && source < end && length >= 0 &&
                    length < params.key_length - (source - first);
        if (!has_place) return;
        position = length + (source - first);
        page = 0;
        if (sequences.pages) {
            const int number = page_of(sequences, position);
            page = ptx::load_global_s32(sequences.pages + i64(sequence) * sequences.pages_per_sequence + number);
            position -= number * sequences.page_size;
            has_place = page >= 0 && page < sequences.page_count;
        }
    }

    __device__ __forceinline__ i64 from(const Strides& strides, int head) const {
        return batch * strides.batch + head * strides.head + source * strides.token;
    }
    // A cache of sequences has a stride of 0 for pages, one of pages none for sequences.
    __device__ __forceinline__ i64 to(const Strides& strides, int head) const {
        return sequence * strides.batch + page * strides.page + head * strides.head + position * strides.token;
    }
};

extern "C" __global__ void __launch_bounds__(threads) append_kv(const __grid_constant__ AppendParams params) {
    const int lane = threadIdx.x & 31;
    const int batch = params.sequences.query_starts ? 1 : params.sequences.count;
    const i64 rows = i64(batch) * params.new_length * params.heads;
    const i64 step = i64(gridDim.x) * (threads / 32);
    for (i64 row = i64(blockIdx.x) * (threads / 32) + threadIdx.x / 32; row < rows; row += step) {
        const int head = static_cast<int>(row % params.heads);
        const Token token(params, row / params.heads, lane);
        if (!token.has_place) continue;
        const auto copy = [&](const void* from, const Strides& from_strides, void* to, const Strides& to_strides,
                              int unit) {
            const char* const source = static_cast<const char*>(from) + token.from(from_strides, head);
            char* const target = static_cast<char*>(to) + token.to(to_strides, head);
            ptx::store_global_u32x4(target + 16 * unit, ptx::load_global_u32x4(source + 16 * unit));
        };
        const int key_units = params.key_bytes / 16, units = key_units + params.value_bytes / 16;
        for (int unit = lane; unit < units; unit += 32) {
            if (unit < key_units) {
                copy(params.new_key, params.new_key_strides, params.key, params.key_strides, unit);
            } else {
                copy(params.new_value, params.new_value_strides, params.value, params.value_strides, unit - key_units);
            }
        }
    }
}

}  // namespace cuattn
