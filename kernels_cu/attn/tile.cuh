// Tiles in shared memory: [row][columns] in units of 16 bytes, the unit's index XORed with the row's
// low three bits, so that the eight rows of an ldmatrix phase lie in eight different bank groups.
#pragma once

#include <common/types.cuh>
#include <ptx/cp_async.cuh>

namespace cuattn {

// element_bytes: 2 or 4.
template <int columns, int element_bytes = 2>
struct Tile {
    static constexpr int unit_elements = 16 / element_bytes;
    static constexpr int units = columns / unit_elements;  // 16-byte units in a row
    static constexpr int row_bytes = columns * element_bytes;
    static_assert(units % 8 == 0, "the XOR of three bits must stay inside a row");

    __device__ static constexpr u32 offset(int row, int unit) { return row * row_bytes + ((unit ^ (row & 7)) << 4); }

    // Copies `rows` rows with `threads` threads of which this is number `thread`. Row r starts at row_start(r); rows from
    // `valid` on are not read but zeros, so that what lies behind a sequence's end (NaN included) stays out of the
    // products, and so are columns from head_dim on.
    template <int head_dim, int rows, int threads, class RowStart>
    __device__ __forceinline__ static void load(u32 to, int valid, int thread, const RowStart& row_start) {
        static_assert(rows * units % threads == 0);
        constexpr int copies = rows * units / threads;
        constexpr int unrolled = element_bytes == 2 && copies <= 8 ? copies : 2;  // more costs registers
#pragma unroll unrolled
        for (int i = 0; i < copies; ++i) {
            int row, unit;
            if constexpr (threads % units == 0) {
                row = thread / units + i * (threads / units), unit = thread % units;
            } else {
                row = (thread + i * threads) / units, unit = (thread + i * threads) % units;
            }
            ptx::cp_async_16(to + offset(row, unit), row_start(row) + unit * unit_elements,
                             row < valid && unit < head_dim / unit_elements);
        }
    }
};

}  // namespace cuattn
