// Copies by the copy engine, and the emulator's form of the description of a tensor.
#pragma once

#include <cstring>
#include <string>
#include <utility>

#include <emulator/mbarrier.h>
#include <common/tensor_map.cuh>

namespace emulator {

// A unit of 16 bytes of a row of 128 has its place XORed with the row's low three bits (bits 7 to 9 of the address).
constexpr int unit_bytes = 16, swizzled_bytes = 128, tile_alignment = 1024;
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// The words of a TensorMap; dimensions from the innermost, whose stride is the size of an element.
struct Tensor4d {
    static constexpr uint64_t magic = 0x63756174746e6d70;  // words[0]

    char* base;
    int64_t element, dims[4], strides[4], box[4];

    explicit Tensor4d(const cuattn::TensorMap& map) {
        uint64_t words[16];
        std::memcpy(words, &map, sizeof words);
        if (words[0] != magic) fail("not a TensorMap of the emulator");
        if (words[3] != 4) fail("a TensorMap of " + std::to_string(words[3]) + " dimensions in place of 4");
        base = reinterpret_cast<char*>(words[1]);
        element = strides[0] = static_cast<int64_t>(words[2]);
        bool aligned = words[1] % unit_bytes == 0;
        for (int i = 0; i < 4; ++i) {
            dims[i] = static_cast<int64_t>(words[4 + i]);
            box[i] = static_cast<int64_t>(words[11 + i]);
            if (box[i] < 1 || box[i] > 256) fail("a TensorMap whose box has an extent of " + std::to_string(box[i]));
            if (i > 0) strides[i] = static_cast<int64_t>(words[7 + i]);
            aligned = aligned && (i == 0 || strides[i] % unit_bytes == 0);
        }
        if (!aligned) fail("a TensorMap whose tensor or strides are no multiples of 16 bytes");
        if (words[15] != swizzled_bytes || box[0] * element != swizzled_bytes) {
            fail("a TensorMap whose boxes are not of rows of 128 swizzled bytes");
        }
    }
    int64_t box_bytes() const { return swizzled_bytes * box[1] * box[2] * box[3]; }
};

// The unit that starts `column` elements behind a row's first one, of which the tensor has those in [0, dims[0]).
inline Unit box_unit(const Tensor4d& tensor, const char* row, int64_t column, bool row_inside, uint32_t to) {
    const int64_t elements = unit_bytes / tensor.element;
    const int64_t first = std::clamp<int64_t>(-column, 0, elements);
    const int64_t end = row_inside ? std::clamp<int64_t>(tensor.dims[0] - column, first, elements) : first;
    const Unit unit{to, static_cast<int>(first * tensor.element), static_cast<int>(end * tensor.element),
                    row + column * tensor.element};
    const auto address = reinterpret_cast<uint64_t>(unit.from);
    const int step = unit.end - unit.first == unit_bytes && address % unit_bytes == 0
                         ? unit_bytes
                         : static_cast<int>(tensor.element);
    for (int i = unit.first; i < unit.end; i += step) note_global<Access::read>("tma_load_4d", unit.from + i, step);
    return unit;
}

// Its bytes are there, and count.
inline void land(const BoxCopy& copy) {
    Mbarrier& barrier = *copy.barrier;
    SharedMemory& shared = block->shared;
    for (const Unit& unit : copy.units) {
        char* const to = shared.bytes() + unit.to;
        std::memset(to, 0, unit_bytes);
        if (unit.end > unit.first) std::memcpy(to + unit.first, unit.from + unit.first, unit.end - unit.first);
        for (int i = 0; i < unit_bytes; i += 4) {
            Word& word = shared.word(unit.to + i);
            --word.copies_under_way;
            word.writer = barrier.actor, word.epoch = static_cast<uint32_t>(barrier.phase + 1);
        }
    }
    barrier.loaded_in = static_cast<int64_t>(barrier.phase);
    count_bytes(barrier, -static_cast<int64_t>(copy.units.size()) * unit_bytes);
    ++block->progress;
    advance(barrier);
}

// One of the copies under way: the newest, or any in random schedules.
inline void land_one() {
    auto& boxes = block->boxes;
    if (block->schedule == Schedule::random) std::swap(boxes[random_number() % boxes.size()], boxes.back());
    const BoxCopy copy = std::move(boxes.back());
    boxes.pop_back();
    land(copy);
}

// Whether a copy under way ends although the threads go on.
inline bool draws_early_end() { return block->schedule == Schedule::random && random_number() % 2 == 0; }

// A copy is a write from its start, as cp.async is; when it ends is up to the schedule.
inline void start_box(uint32_t to, const cuattn::TensorMap& map, const int (&at)[4], uint32_t barrier_address) {
    const char* const what = "tma_load_4d";
    const Tensor4d tensor(map);
    Mbarrier& barrier = mbarrier(what, barrier_address);
    if (!barrier.fenced) fail(std::string(what) + ": no mbarrier_init_fence for " + describe(barrier));
    const int bytes = static_cast<int>(tensor.box_bytes());
    if (to % tile_alignment != 0) fail_access(what, to, bytes, "misaligned: not a multiple of 1024");
    if (!block->shared.holds(to, bytes)) fail_access(what, to, bytes, "outside of shared memory");
    BoxCopy copy{{}, &barrier};
    for (int64_t row = 0; row < bytes / swizzled_bytes; ++row) {
        const int64_t y = at[1] + row % tensor.box[1], z = at[2] + row / tensor.box[1] % tensor.box[2],
                      w = at[3] + row / (tensor.box[1] * tensor.box[2]);
        const auto inside = [&](int64_t i, int dim) { return i >= 0 && i < tensor.dims[dim]; };
        const bool row_inside = inside(y, 1) && inside(z, 2) && inside(w, 3);
        const char* const from = tensor.base + y * tensor.strides[1] + z * tensor.strides[2] + w * tensor.strides[3];
        for (int unit = 0; unit < swizzled_bytes / unit_bytes; ++unit) {
            const auto place = swizzle(to + static_cast<uint32_t>(row * swizzled_bytes + unit * unit_bytes));
            copy.units.push_back(box_unit(tensor, from, at[0] + unit * unit_bytes / tensor.element, row_inside, place));
        }
    }
    for (const Unit& unit : copy.units) {
        note<Access::write>(what, unit.to, unit_bytes);
        for (int i = 0; i < unit_bytes; i += 4) ++block->shared.word(unit.to + i).copies_under_way;
    }
    block->boxes.push_back(std::move(copy));
    ++block->progress;
    if (block->schedule == Schedule::ascending || draws_early_end()) land_one();
}

}  // namespace emulator
