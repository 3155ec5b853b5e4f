// Tiles of 16-bit elements in shared memory: [row][columns] in units of 16 bytes, the unit's index XORed with the row's
// low three bits, so that the eight rows of an ldmatrix phase lie in eight different bank groups.
#pragma once

#include <common/types.cuh>
#include <ptx/cp_async.cuh>

namespace cuattn {

template <int columns>
struct Tile {
    static_assert(columns % 64 == 0, "the XOR of three bits must stay inside a row");
    static constexpr int units = columns / 8;  // 16-byte units in a row
    static constexpr int row_bytes = columns * 2;

    __device__ static constexpr u32 offset(int row, int unit) { return row * row_bytes + ((unit ^ (row & 7)) << 4); }

    // Copies `rows` rows from `from`, `stride` elements apart, with `threads` threads of which this is number `thread`;
    // rows from `valid` on are zeros, so that what lies behind a sequence's end (NaN included) stays out of the
    // products, and so are columns from head_dim on.
    template <int head_dim, int rows, int threads>
    __device__ __forceinline__ static void load(u32 to, const u16* from, i64 stride, int valid, int thread) {
        static_assert(threads % units == 0 && rows * units % threads == 0);
        const int unit = thread % units;
#pragma unroll
        for (int i = 0; i < rows * units / threads; ++i) {
            const int row = thread / units + i * (threads / units);
            ptx::cp_async_16(to + offset(row, unit), from + row * stride + unit * 8,
                             row < valid && unit < head_dim / 8);
        }
    }
};

}  // namespace cuattn
