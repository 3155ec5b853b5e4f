// The arguments of the kernels; cuattn/params.py mirrors them field by field. Any pointer to lengths may be null.
#pragma once

#include <common/tensor_map.cuh>
#include <common/types.cuh>

namespace cuattn {

// Distances in elements; the last dimension is contiguous. page: between the pages of paged keys.
struct Strides {
    i64 batch, head, token, page;
};

// Lengths and places of sequences that the device alone knows.
struct Sequences {
    // (count + 1): packed queries, sequence s has the rows [query_starts[s], query_starts[s + 1]); keys likewise
    const int *query_starts, *key_starts;
    const int* key_lengths;  // (count): keys of sequence s that exist, from its first on
    // (count, pages_per_sequence): keys [p page_size, (p + 1) page_size) of sequence s lie in page pages[s][p]
    const int* pages;
    // (count, key_length + 2): of the first j places of sequence s, how many hold a key; then the place of its first key if
    // its keys lie in one piece, else -1
    const int* seen;
    int count;
    int cached;    // the causal diagonal ends at a sequence's last key; else at the last place for one
    int new_keys;  // key_lengths count the keys before those of this call, as many as queries
    int pages_per_sequence, page_count, page_size;
    u32 page_magic, page_shift;  // j / page_size = mulhi(2 j, page_magic) >> page_shift
    int few_rows;  // rows of a sequence and key head up to which it belongs to the kernel for few rows, if both run
};

struct ForwardParams {
    const void* query;  // (batch, query_heads, query_length, head_dim); packed: batch 1, query_length all rows
    const void* key;    // (batch, query_heads / group, key_length, head_dim); packed likewise
    const void* value;  // (..., value_dim), else as key
    void* out;          // (..., value_dim), else as query
    float* lse;         // (batch, query_heads, query_length), contiguous
    Strides query_strides, key_strides, value_strides, out_strides;
    Sequences sequences;
    int query_heads, group;  // group: query heads that share one key head
    int query_length, key_length;
    int query_tiles;    // blocks of a head and batch; blocks run (batch, head, tile), tile fastest
    float factor;       // |scale| log2(e): weights are 2^(factor * score - reference)
    int negate_scores;  // a negative scale: scores change their sign first
};

// What the kernel that merges chunks must know of a group: the rows of one tile, packed rows of a key head.
struct SplitGroup {
    int query_batch, query_start, key_head, first_row;
    int rows;           // that exist, of the tile's
    int folded_chunks;  // the first ones, whose fold stands where chunk 0 would
    int chunks;         // 0: nothing is left to be merged
};

// Results of single chunks, before they are merged: of chunk c and row i at the index c * rows + i, i within `rows` rows.
struct Partials {
    float* out;                  // (chunks, rows, value_dim)
    float *reference, *sum;      // (chunks, rows)
    SplitGroup* groups;          // workspace: one for each block; null: partials are the caller's, row by row of `lse`
    int chunks, rows;            // of the arrays; workspace: of each group
    int first_chunk, end_chunk;  // the caller's: the chunks to compute
    int by_group;                // workspace: a group has the place of its number, else of the block it starts in
};

// Of kernels whose blocks may have some of a row's chunks.
struct SplitParams {
    ForwardParams forward;
    Partials partials;
};

struct ForwardSm90Params {
    TensorMap key_map, value_map;  // boxes of box_rows rows and 64 columns, where `mapped`
    TensorMap out_map;             // boxes of 16 / group tokens, a key head's query heads and 64 columns; or nothing
    SplitParams call;
    float* merged;  // (blocks, warps, ...): workspace for finished chunks that do not fit into shared memory, or null
    int mapped;     // 0: keys and values can only be copied row by row
    int box_rows;   // of a box
    // that the chunks of a tile of rows are cut into; of few rows, where they are pieces: as many as a cluster has blocks, else 0
    int pieces;
    int items;        // of many rows: pieces of all tiles, which the blocks share
    int group_shift;  // with out_map: group is 1 << group_shift
};

struct CombineParams {
    ForwardParams forward;
    Partials partials;
    Partials carried;  // one chunk: the fold of everything before `partials`, and of everything up to their end
    int load_carried, store_carried;
};

// What the backward pass knows of a query row of a head: 16 bytes.
struct RowRecord {
    float log;    // its LSE in the log2 domain
    float delta;  // dout times out less dlse
    int visible;  // keys that it sees; 0 if it contributes nothing
    int row;      // its number among the rows of its sequence
};

struct BackwardParams {
    ForwardParams forward;  // out and lse are read; query_tiles are those of backward_queries
    const void* dout;       // as out
    const float* dlse;      // as lse, or null
    void *dquery, *dkey, *dvalue;
    Strides dout_strides, dquery_strides, dkey_strides, dvalue_strides;
    // (batch, query_heads, query_length), as lse: of every row, and the contributing rows of each sequence at its start
    RowRecord *rows, *contributing;
    int* counts;    // (sequences, query_heads): rows that contribute
    i64 row_count;  // of all heads
    int key_heads;
    int key_tiles;  // blocks of backward_keys for a key head and batch entry
    float scale;
};

// New keys and values into a cache, behind the key_lengths of its sequences.
struct AppendParams {
    const void *new_key, *new_value;  // (batch, heads, new_length, head_dim); packed: batch 1, new_length all rows
    void *key, *value;  // (batch, heads, key_length, head_dim), or pages (page_count, heads, page_size, ...)
    Strides new_key_strides, new_value_strides, key_strides, value_strides;  // in bytes
    Sequences sequences;                                                     // query_starts are those of the new tokens
    int heads, new_length;
    int key_length;              // capacity of a sequence
    int key_bytes, value_bytes;  // of a token's head, multiples of 16
};

// A key padding mask as tables of places.
struct ScanParams {
    const unsigned char* mask;  // (batch, key_length), true where a key is
    int* positions;             // (batch, key_length): place of the j-th key; behind the last one 0
    int* seen;                  // (batch, key_length + 2): as in Sequences
    i64 batch_stride, token_stride;
    int key_length;
};

}  // namespace cuattn
