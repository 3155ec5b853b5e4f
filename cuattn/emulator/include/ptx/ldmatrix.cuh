// Host twin of kernels_cu/ptx/ldmatrix.cuh.
#pragma once

#include <cuda_builtins.h>
#include <common/types.cuh>

namespace cuattn::ptx {

namespace host {

template <bool transposed>
void ldmatrix_x4(u32 (&r)[4], u32 row) {
    struct Request {
        u32* registers;
        u16 row[8];
    };
    Request mine{r, {}};
    emulator::load_shared(mine.row, row, 16);
    emulator::warp_collective(
        transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &mine, [](const void* const* all) {
            const auto request = [&](int lane) -> const Request& { return *static_cast<const Request*>(all[lane]); };
            for (int lane = 0; lane < 32; ++lane) {
                for (int matrix = 0; matrix < 4; ++matrix) {
                    const int row = lane / 4, column = 2 * (lane % 4);
                    const auto at = [&](int r, int c) { return static_cast<u32>(request(8 * matrix + r).row[c]); };
                    request(lane).registers[matrix] = transposed ? at(column, row) | at(column + 1, row) << 16
                                                                 : at(row, column) | at(row, column + 1) << 16;
                }
            }
        });
}

}  // namespace host

inline void ldmatrix_x4(u32 (&r)[4], u32 row) { host::ldmatrix_x4<false>(r, row); }
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 row) { host::ldmatrix_x4<true>(r, row); }

inline void stmatrix_x4(u32 row, const u32 (&r)[4]) {
    u32 mine[4] = {};
    struct Request {
        const u32* registers;
        u32* row;
    };
    const Request request{r, mine};
    emulator::warp_collective("stmatrix", 0xffffffffu, &request, [](const void* const* all) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int pair = 0; pair < 4; ++pair) {  // of row lane % 8 of matrix lane / 8
                const int owner = lane % 8 * 4 + pair;
                static_cast<const Request*>(all[lane])->row[pair] =
                    static_cast<const Request*>(all[owner])->registers[lane / 8];
            }
        }
    });
    emulator::store_shared(row, mine, 16);
}

}  // namespace cuattn::ptx
