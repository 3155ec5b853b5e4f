// What a wgmma computes: a product of 64 rows and 8 * blocks columns over 16 terms.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <emulator/block.h>
#include <emulator/tensor_core.h>

namespace emulator {

constexpr int panel = 16;  // columns that are computed together

// Thread t of a warpgroup holds numbers as mma.cuh has them: the place of number i among values (panel, row, column).
inline int value_index(int thread, int i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    return (column / panel * 64 + row) * panel + column % panel;
}

template <bool bfloat16, int blocks>
struct Operands {
    static constexpr int panels = 8 * blocks / panel;
    static_assert(panels * panel == 8 * blocks);

    Operand left[64][16];
    OperandRow<panel> right[panels][16];

    static Operand operand(uint16_t bits) { return bfloat16 ? bf16_operand(bits) : fp16_operand(bits); }

    // The eight numbers of a unit of shared memory, one after the other.
    template <class Set>
    static void each(uint32_t unit, const Set& set) {
        uint16_t bits[8];
        std::memcpy(bits, block->shared.bytes() + unit, sizeof bits);
        for (int i = 0; i < 8; ++i) set(i, operand(bits[i]));
    }
    // The units are in the order of row_units() and column_units() in wgmma_operand.h.
    void read_left(const std::vector<uint32_t>& units) {
        for (int u = 0; u < 128; ++u) {
            each(units[u], [&](int i, Operand x) { left[u / 2][u % 2 * 8 + i] = x; });
        }
    }
    void read_right_rows(const uint32_t* units) {
        for (int u = 0; u < 16 * blocks; ++u) {
            each(units[u], [&](int i, Operand x) { set_right(u % 2 * 8 + i, u / 2, x); });
        }
    }
    void read_right_columns(const uint32_t* units) {
        for (int u = 0; u < 16 * blocks; ++u) {
            each(units[u], [&](int i, Operand x) { set_right(u / blocks, u % blocks * 8 + i, x); });
        }
    }
    // Of one thread, as mma.cuh has them.
    void set_left(int thread, const uint32_t (&registers)[4]) {
        for (int i = 0; i < 8; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k = thread % 4 * 2 + i % 2 + i / 4 * 8;
            left[row][k] = operand(static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
        }
    }

    // values += left * right. A row of zeros changes no finite number, but makes -0 to +0.
    void multiply_add(std::vector<float>& values) const {
        const bool finite = right_is_finite();
        const int terms = tensor_core.terms;
        for (int row = 0; row < 64; ++row) {
            const auto is_zero = [](const Operand& x) { return x.significand == 0; };
            const bool zeros = finite && std::all_of(left[row], left[row] + 16, is_zero);
            for (int p = 0; p < panels; ++p) {
                auto& c = reinterpret_cast<float (&)[panel]>(values[(p * 64 + row) * panel]);
                if (zeros) {
                    for (float& x : c) x += 0.0f;
                    continue;
                }
                for (int k = 0; k < 16; k += terms) {
                    dot_add(c, &left[row][k], &right[p][k], terms, bfloat16 ? 7 : 10);
                }
            }
        }
    }

  private:
    void set_right(int k, int column, Operand x) { right[column / panel][k].set(column % panel, x); }

    bool right_is_finite() const {
        int largest = 0;
        for (const auto& rows : right) {
            for (const auto& row : rows) {
                for (const int exponent : row.exponent) largest = std::max(largest, exponent);
            }
        }
        return largest < not_finite_exponent;
    }
};

}  // namespace emulator
