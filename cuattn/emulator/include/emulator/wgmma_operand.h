// Operands of wgmma in shared memory. PTX ISA: "Matrix Descriptor Format" and "Shared Memory Matrix Layout", for 16-bit
// elements and the swizzle of 128 bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <emulator/access.h>
#include <emulator/tma.h>

namespace emulator {

// Bytes from here to there: start of the tile; the next 64 columns of a tile of columns; the next eight rows.
struct Descriptor {
    uint32_t start, leading, stride;

    explicit Descriptor(uint64_t bits) : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)) {
        if (bits >> 62 != 1) fail("wgmma: the descriptor's layout is not the swizzle of 128 bytes");
        if (bits >> 49 & 7) fail("wgmma: the descriptor has a base offset");
        if (start / 128 % 8 != 0) fail_access("wgmma", start, 128, "misaligned: the tile is not at a multiple of 1024");
    }

  private:
    static uint32_t field(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; }
};

// Addresses of the units (eight elements) of an operand of 16 columns, whose rows are the tile's: two for each row.
inline void row_units(std::vector<uint32_t>& units, const Descriptor& tile, int rows) {
    for (int row = 0; row < rows; ++row) {
        for (int half = 0; half < 2; ++half) {
            units.push_back(swizzle(tile.start + row / 8 * tile.stride + row % 8 * 128 + half * 16));
        }
    }
}

// The same for an operand of `columns` columns in 16 rows of the tile.
inline void column_units(std::vector<uint32_t>& units, const Descriptor& tile, int columns) {
    for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < columns; column += 8) {
            units.push_back(
                swizzle(tile.start + column / 64 * tile.leading + k / 8 * tile.stride + k % 8 * 128 + column % 64 * 2));
        }
    }
}

// What threads know that take part in an instruction; those that know the same count once, unless they are alone.
class Readership {
  public:
    Readership(int first, int count) {
        for (int i = first; i < first + count; ++i) {
            const Moment& now = block->thread[i].now;
            if (members_.empty() || members_.back().known != now.known) {
                members_.push_back(now);
            } else {
                members_.back().actor = nobody;
            }
        }
    }

    // The word's last write is known to all of them, and visible to the tensor cores.
    void check(uint32_t address) {
        const Word& word = block->shared.word(address);
        const bool quiet = word.copies_under_way == 0 && !word.is_barrier && word.writer >= 0;
        if (quiet && word.writer == writer_ && word.epoch == epoch_) return;
        for (const Moment& now : members_) check_asynchronous_read("wgmma", address, now);
        writer_ = word.writer, epoch_ = word.epoch;
    }

  private:
    static constexpr int nobody = -1;

    std::vector<Moment> members_;
    int writer_ = nobody;  // of the word checked last
    uint32_t epoch_ = 0;
};

}  // namespace emulator
