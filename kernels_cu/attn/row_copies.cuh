// Copies of rows that lie anywhere to tiles for wgmma, by a warp whose lanes know a row's place each.
#pragma once

#include <common/types.cuh>
#include <ptx/cp_async.cuh>

namespace cuattn {

constexpr int row_unit = 8;  // elements of 16 bits: what one copy takes, and the unit of places

// Copies `rows` rows, 32 at most, to the tile's rows from `first` on. Row r of them starts `place` units behind `data`, in
// lane r's words. If there is no row `number` + r among `count` it is zeros, so that what lies behind a sequence's end (NaN
// included) stays out of the products, and so are columns from `columns` on.
template <class Tile, int columns, int rows>
__device__ __forceinline__ void copy_rows(u32 to, int first, int number, int count, const u16* data, int place) {
    static_assert(rows <= 32 && rows * Tile::units % 32 == 0);
    const int lane = threadIdx.x & 31;
#pragma unroll 2
    for (int i = 0; i < rows * Tile::units; i += 32) {
        const int row = (i + lane) / Tile::units, column = (i + lane) % Tile::units;
        const i64 row_place = __shfl_sync(0xffffffffu, place, row);
        ptx::cp_async_16(to + Tile::offset(first + row, column), data + (row_place + column) * row_unit,
                         u32(number + row) < u32(count) && column < columns / row_unit);
    }
}

}  // namespace cuattn
