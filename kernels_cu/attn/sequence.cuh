// One sequence of a batch: its rows and keys, what a row sees, and where its keys lie.
#pragma once

#include <attn/pages.cuh>
#include <attn/params.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// ragged: lengths are read on the device; paged: keys lie where tables say; packed: sequences may lie behind each other.
template <bool causal, bool ragged, bool paged, bool packed = ragged>
struct Sequence {
    static constexpr bool by_tables = paged;

    int index;                     // in the batch
    int query_batch, key_batch;    // index, or 0 where packed
    int query_start, key_start;    // packed: the sequence's first rows
    int query_length, key_length;  // the sequence's
    int places;                    // for keys, of which key_length exist
    int diagonal;                  // causal: row i sees the keys at the first diagonal + i + 1 places
    const int *pages, *seen;       // of this sequence, or null
    int first_place;               // of its keys, if they lie in one piece; else -1

    __device__ __forceinline__ Sequence() {}

    // Sequence `index` of the batch; its entry of key_lengths is read, or known: not negative.
    __device__ __forceinline__ Sequence(const ForwardParams& params, int index, int entry = -1)
        : index(index),
          query_batch(index),
          key_batch(index),
          query_start(0),
          key_start(0),
          query_length(params.query_length),
          key_length(params.key_length) {
        const Sequences& sequences = params.sequences;
        if (packed && sequences.query_starts) {
            query_batch = 0;
            slice(sequences.query_starts + index, query_start, query_length);
        }
        if (packed && sequences.key_starts) {
            key_batch = 0;
            slice(sequences.key_starts + index, key_start, key_length);
        }
        places = key_length;
        if constexpr (paged) {
            pages = sequences.pages ? sequences.pages + i64(index) * sequences.pages_per_sequence : nullptr;
            seen = sequences.seen ? sequences.seen + i64(index) * (places + 2) : nullptr;
            first_place = seen ? ptx::load_global_s32(seen + places + 1) : pages ? -1 : 0;
            if (seen) key_length = ptx::load_global_s32(seen + places);
        }
        if (ragged && sequences.key_lengths) {
            if (entry < 0) entry = ptx::load_global_s32(sequences.key_lengths + index);
            key_length = max(0, min(entry, key_length));
            if (sequences.new_keys) key_length += min(query_length, places - key_length);
            if (sequences.cached) places = key_length;
        }
        diagonal = places - query_length;
    }

    // Keys that the query at `row` sees: always a prefix.
    __device__ __forceinline__ int visible_keys(int row) const {
        if (!causal) return key_length;
        const int seen_places = max(0, min(places, diagonal + row + 1));
        if (paged && seen && first_place < 0) return ptx::load_global_s32(seen + seen_places);
        return min(key_length, paged && seen ? max(0, seen_places - first_place) : seen_places);
    }

    // The page that holds key `key`, which exists.
    __device__ __forceinline__ int page_at(const Sequences& sequences, int key) const {
        if (first_place >= 0) return first_place + key;
        const u32 page = ptx::load_global_s32(pages + page_of(sequences, key));
        return static_cast<int>(min(page, sequences.page_count - 1u));
    }

    // Distance in elements of key `key`, which is in `page`, from the first row of its head.
    __device__ __forceinline__ i64 offset_in(const Sequences& sequences, const Strides& strides, int key,
                                             int page) const {
        return page * strides.page + row_in_page(sequences, key) * strides.token;
    }
    __device__ __forceinline__ static int row_in_page(const Sequences& sequences, int key) {
        return key - page_of(sequences, key) * sequences.page_size;
    }

    // Row `row` of a head in `data`, whose elements are of type T.
    template <class T>
    __device__ __forceinline__ static T* start_of(T* data, const Strides& strides, int batch, int head, int row = 0) {
        return data + batch * strides.batch + head * strides.head + row * strides.token;
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
