// Tiles in shared memory: [row][columns] in units of 16 bytes, the unit's index XORed with the row's
// low three bits, so that the eight rows of an ldmatrix phase lie in eight different bank groups.
#pragma once

#include <common/types.cuh>
#include <ptx/cp_async.cuh>

namespace cuattn {

// element_bytes: 2 or 4. panel_rows: 0, or the number of rows of a tile that is cut into panels of 128 bytes a row, the
// second behind the first: what wgmma multiplies.
template <int columns, int element_bytes = 2, int panel_rows = 0>
struct Tile {
    static constexpr int unit_elements = 16 / element_bytes;
    static constexpr int units = columns / unit_elements;  // 16-byte units in a row
    static constexpr int row_bytes = columns * element_bytes;
    static_assert(units % 8 == 0, "the XOR of three bits must stay inside a row");

    __device__ static constexpr u32 offset(int row, int unit) {
        if (panel_rows > 0) return (unit / 8 * panel_rows + row) * 128 + ((unit & 7 ^ row & 7) << 4);
        return row * row_bytes + ((unit ^ (row & 7)) << 4);
    }

    // Copies `rows` rows with `threads` threads of which this is number `thread`. Row r starts at row_start(place_of(r));
    // several places are asked for before the first copy, since that may take time. Rows from `valid` on are not read but
    // zeros, so that what lies behind a sequence's end (NaN included) stays out of the products, and so are columns from
    // head_dim on.
    template <int head_dim, int rows, int threads, class PlaceOf, class RowStart>
    __device__ __forceinline__ static void load(u32 to, int valid, int thread, const PlaceOf& place_of,
                                                const RowStart& row_start) {
        static_assert(rows * units % threads == 0);
        constexpr int copies = rows * units / threads;
        constexpr int together = element_bytes == 2 && copies <= 8 ? copies
                                 : copies % 2                      ? 1
                                                                   : 2;  // more costs registers
        static_assert(copies % together == 0);
        const auto row = [&](int i) {
            if constexpr (threads % units == 0) return thread / units + i * (threads / units);
            return (thread + i * threads) / units;
        };
#pragma unroll 1
        for (int first = 0; first < copies; first += together) {
            decltype(place_of(0)) place[together];
#pragma unroll
            for (int i = 0; i < together; ++i) place[i] = place_of(row(first + i));
#pragma unroll
            for (int i = 0; i < together; ++i) {
                const int r = row(first + i),
                          unit = threads % units == 0 ? thread % units : (thread + (first + i) * threads) % units;
                ptx::cp_async_16(to + offset(r, unit), row_start(place[i]) + unit * unit_elements,
                                 r < valid && unit < head_dim / unit_elements);
            }
        }
    }

    // The same where a row's place is its number.
    template <int head_dim, int rows, int threads, class RowStart>
    __device__ __forceinline__ static void load(u32 to, int valid, int thread, const RowStart& row_start) {
        load<head_dim, rows, threads>(to, valid, thread, [](int row) { return row; }, row_start);
    }
};

}  // namespace cuattn
