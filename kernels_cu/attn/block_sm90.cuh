// What the warps of a block of forward_sm90 share: its shape, its shared memory and the barriers in it.
#pragma once

#include <attn/chunks.cuh>
#include <attn/key_copies.cuh>
#include <attn/key_row_copies.cuh>
#include <attn/out_boxes.cuh>
#include <attn/ring.cuh>
#include <attn/tile.cuh>
#include <attn/warpgroup_products.cuh>
#include <attn/work.cuh>
#include <common/types.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

using config::head_dim, config::value_dim, config::tile_dim, config::value_tile_dim, config::key_tile,
    config::consumers, config::ring_slots, config::value_columns, config::split, config::held_queries;

static_assert(config::contract_version == 1, "this file implements version 1 of docs/numerics.md");
static_assert(head_dim % 8 == 0 && value_dim % 8 == 0 && value_dim <= value_columns && value_columns <= value_tile_dim);
static_assert(config::chunk_length(0) % key_tile == 0, "a chunk is a whole number of tiles");
static_assert((!split || config::ragged) && (!config::few || split),
              "lengths are read on the device where blocks share rows");

constexpr int warpgroup = 128, group_rows = 64;  // threads and rows
constexpr int block_rows = consumers * group_rows, threads = (1 + consumers) * warpgroup;
constexpr bool moves_registers = consumers > 1;  // else there are as many as a thread can have
constexpr int widest = tile_dim > value_tile_dim ? tile_dim : value_tile_dim;
constexpr int slot_elements = key_tile * widest;
constexpr int query_elements = group_rows * tile_dim;
// Warpgroups take turns at products. Causal ones of three need different tiles, and would wait for turns of the others.
constexpr bool takes_turns = consumers == 2 || (consumers == 3 && !config::causal);
constexpr bool holds_queries = held_queries * 16 >= head_dim;  // all of them in registers

using QueryTile = Tile<tile_dim, 2, group_rows>;
using KeyTile = Tile<tile_dim, 2, key_tile>;
using ValueTile = Tile<value_tile_dim, 2, key_tile>;
using Merged = MergedChunks<value_columns / 8, config::merged_in_shared>;
using Box = OutBox<value_tile_dim, value_dim, config::bfloat16>;  // in the room of a warp's finished chunks
using Products = WarpgroupProducts<config::bfloat16, head_dim, held_queries, value_columns, key_tile>;
using At = RingPlace<ring_slots>;

struct SharedMemory {
    alignas(1024) u16 query[consumers][query_elements];
    alignas(1024) u16 ring[ring_slots][slot_elements];
    alignas(
        1024) unsigned char merged[consumers * 4 * Merged::bytes_per_warp];  // all warps' outputs, then all warps' rows
    u64 filled[ring_slots], free[ring_slots], landed;
    u64 queries_filled[consumers], queries_free[consumers];
};
static_assert(sizeof(SharedMemory) == config::shared_bytes);
static_assert(!config::out_boxes || (config::merged_in_shared && !config::ragged && Box::bytes <= Merged::out_bytes &&
                                     Merged::out_bytes % 1024 == 0));
static_assert(QueryTile::row_bytes <= 1024 && sizeof(u64) == ptx::mbarrier_bytes);

using KeyRows =
    RowCopies<KeyTile, ValueTile, head_dim, value_dim, key_tile, slot_elements * 2, ring_slots, KeySequence>;
// Where keys are looked up in tables, those that lie in one piece need not be; the warps that copy rows run it then.
using KeyBoxes = BoxCopies<KeyTile, ValueTile, key_tile, slot_elements * 2, ring_slots, config::ragged, config::few,
                           config::paged ? KeyRows::arrivals : 1, KeySequence>;
// Three consumers leave no registers for both ways.
constexpr bool finds_pieces = config::paged && consumers < 3;
constexpr int copiers = config::paged ? KeyRows::threads : KeyBoxes::threads;
// Warps of warpgroup 0 that fetch queries, one for each consumer; consumers do it themselves where keys take all of them.
constexpr bool fetches_queries = !config::paged;
static_assert(!fetches_queries || copiers / 32 + consumers <= 4);

__device__ __forceinline__ void init_barriers(SharedMemory& shared, const RingAddress& ring) {
    for (int i = 0; i < consumers; ++i) {
        ptx::mbarrier_init(ptx::shared_address(&shared.queries_filled[i]), 32);
        ptx::mbarrier_init(ptx::shared_address(&shared.queries_free[i]), 4);
    }
    ring.init(ring_slots, KeyBoxes::arrivals, consumers * 4);
}

}  // namespace cuattn
