// The argument of a forward kernel; cuattn/params.py mirrors it field by field.
#pragma once

#include <common/types.cuh>

namespace cuattn {

// Distances in elements; the last dimension is contiguous.
struct Strides {
    i64 batch, head, token;
};

// Lengths that the device alone knows (kernels of a ragged configuration). Any pointer may be null.
struct Sequences {
    const int*
        query_starts;  // (count + 1): packed queries, sequence s has the rows [query_starts[s], query_starts[s + 1])
    const int* key_starts;   // (count + 1): packed keys, likewise
    const int* key_lengths;  // (count): keys of sequence s that exist, from its first on
    int count;
};

struct ForwardParams {
    const u16* query;  // (batch, query_heads, query_length, head_dim); packed: batch 1, query_length all rows
    const u16* key;    // (batch, query_heads / group, key_length, head_dim); packed likewise
    const u16* value;  // as key
    u16* out;          // as query
    float* lse;        // (batch, query_heads, query_length), contiguous
    Strides query_strides, key_strides, value_strides, out_strides;
    Sequences sequences;
    int query_heads, group;  // group: query heads that share one key head
    int query_length, key_length;
    int query_tiles;    // blocks of a head and batch; blocks run (batch, head, tile), tile fastest
    float factor;       // |scale| log2(e): weights are 2^(factor * score - reference)
    int negate_scores;  // a negative scale: scores change their sign first
};

}  // namespace cuattn
