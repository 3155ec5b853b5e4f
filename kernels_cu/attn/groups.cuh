// Which chunks of which rows a block may compute. A group is the rows of one tile: tile_rows packed rows of a key head.
#pragma once

#include <attn/params.cuh>
#include <attn/place.cuh>
#include <attn/sequence.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using KeySequence = Sequence<config::causal, config::ragged, config::paged, config::packed>;

struct Work;

// Which tiles of keys a block passes over for its rows before packed row `end_row`.
struct Tiles {
    int first, end;

    __device__ __forceinline__ Tiles() {}
    __device__ __forceinline__ Tiles(const Work& work, int group, int end_row);
    // Those of which the rows see something.
    __device__ __forceinline__ static int seen(const Work& work, int group, int end_row);
};

// Chunks [first_chunk, end_chunk) of a group's `chunks`.
struct Work {
    KeySequence sequence;
    int key_head, first_row;
    int first_chunk, end_chunk, chunks;
    int slot;     // of the workspace
    u32 turn;     // of many rows: in which the block has it (block_work.cuh)
    Tiles tiles;  // of few rows: of the group's rows
    int folded;   // of a piece: the group's chunks that its first piece has
};

__device__ __forceinline__ Tiles::Tiles(const Work& work, int group, int end_row)
    : first(config::chunk_start(work.first_chunk) / config::key_tile), end(max(first, seen(work, group, end_row))) {
    if (config::split) end = max(first, min(end, config::chunk_start(work.end_chunk) / config::key_tile));
}

__device__ __forceinline__ int Tiles::seen(const Work& work, int group, int end_row) {
    const int last = min(end_row, work.sequence.query_length * group) - 1;
    return (work.sequence.visible_keys(last / group) + config::key_tile - 1) / config::key_tile;
}

// A sequence's entry of key_lengths, if there is any. `rehearses`: it is not read, and the sequence as long as it can be.
__device__ __forceinline__ int length_entry(const ForwardParams& params, int sequence, bool rehearses) {
    const int* const entries = params.sequences.key_lengths;
    return rehearses || !entries ? params.key_length : ptx::load_global_s32(entries + sequence);
}

// The groups of a sequence, and each one's key tiles and chunks: those of all keys, or of the caller's chunks.
template <int tile_rows>
struct Shape {
    KeySequence sequence;
    int row_tiles, first_tile, key_tiles, end_chunk;

    __device__ __forceinline__ Shape(const SplitParams& params, int index, int entry)
        : sequence(params.forward, index, entry),
          first_tile(0),
          key_tiles(max(1, (sequence.key_length + config::key_tile - 1) / config::key_tile)),
          end_chunk(max(1, config::chunk_count(sequence.key_length))) {
        const i64 rows = i64(sequence.query_length) * params.forward.group;
        row_tiles =
            rows <= params.forward.sequences.few_rows ? static_cast<int>((rows + tile_rows - 1) / tile_rows) : 0;
        const Partials& partials = params.partials;
        if (config::partial_results && partials.out && !partials.groups) {
            first_tile = config::chunk_start(partials.first_chunk) / config::key_tile;
            end_chunk = partials.end_chunk;
            key_tiles = min(key_tiles, config::chunk_start(end_chunk) / config::key_tile) - first_tile;
        }
    }
    // The first chunk that starts at or behind a group's key tile `tile`.
    __device__ __forceinline__ int first_chunk_from(int tile) const {
        return tile >= key_tiles ? end_chunk : config::chunk_count((first_tile + tile) * config::key_tile);
    }

    // Its chunks that start in the key tiles [first, end) of group `group`, which is tile `row_tile` of head `key_head`; false if
    // there are none.
    __device__ __forceinline__ bool set(Work& work, int first, int end, int key_head, int row_tile,
                                        int token_rows) const {
        work.first_chunk = first_chunk_from(first);
        work.end_chunk = first_chunk_from(end);
        work.sequence = sequence;
        work.key_head = key_head;
        work.first_row = row_tile * tile_rows;
        work.chunks = end_chunk;
        if (work.first_chunk >= work.end_chunk) return false;
        work.tiles = Tiles(work, token_rows, work.first_row + tile_rows);
        return true;
    }
};

}  // namespace cuattn
