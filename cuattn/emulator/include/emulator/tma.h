// Copies by the copy engine to shared memory and from there, and the emulator's form of the description of a tensor.
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
template <Access access>
Unit box_unit(const char* what, const Tensor4d& tensor, char* row, int64_t column, bool row_inside, uint32_t shared) {
    const int64_t elements = unit_bytes / tensor.element;
    const int64_t first = std::clamp<int64_t>(-column, 0, elements);
    const int64_t end = row_inside ? std::clamp<int64_t>(tensor.dims[0] - column, first, elements) : first;
    const Unit unit{shared, static_cast<int>(first * tensor.element), static_cast<int>(end * tensor.element),
                    row + column * tensor.element};
    const auto address = reinterpret_cast<uint64_t>(unit.global);
    const int step = unit.end - unit.first == unit_bytes && address % unit_bytes == 0
                         ? unit_bytes
                         : static_cast<int>(tensor.element);
    for (int i = unit.first; i < unit.end; i += step) note_global<access>(what, unit.global + i, step);
    return unit;
}

// Those of the box at the coordinates `at`, whose first row is at the shared address `start`.
template <Access access>
std::vector<Unit> box_units(const char* what, const Tensor4d& tensor, const int (&at)[4], uint32_t start) {
    const int bytes = static_cast<int>(tensor.box_bytes());
    if (start % tile_alignment != 0) fail_access(what, start, bytes, "misaligned: not a multiple of 1024");
    if (!block->shared.holds(start, bytes)) fail_access(what, start, bytes, "outside of shared memory");
    std::vector<Unit> units;
    for (int64_t row = 0; row < bytes / swizzled_bytes; ++row) {
        const int64_t y = at[1] + row % tensor.box[1], z = at[2] + row / tensor.box[1] % tensor.box[2],
                      w = at[3] + row / (tensor.box[1] * tensor.box[2]);
        const auto inside = [&](int64_t i, int dim) { return i >= 0 && i < tensor.dims[dim]; };
        const bool row_inside = inside(y, 1) && inside(z, 2) && inside(w, 3);
        char* const first = tensor.base + y * tensor.strides[1] + z * tensor.strides[2] + w * tensor.strides[3];
        for (int unit = 0; unit < swizzled_bytes / unit_bytes; ++unit) {
            const auto place = swizzle(start + static_cast<uint32_t>(row * swizzled_bytes + unit * unit_bytes));
            const int64_t column = at[0] + unit * unit_bytes / tensor.element;
            units.push_back(box_unit<access>(what, tensor, first, column, row_inside, place));
        }
    }
    return units;
}

// Its bytes are there, and count.
inline void land(const BoxCopy& copy) {
    Mbarrier& barrier = *copy.barrier;
    SharedMemory& shared = block->shared;
    for (const Unit& unit : copy.units) {
        char* const to = shared.bytes() + unit.shared;
        std::memset(to, 0, unit_bytes);
        if (unit.end > unit.first) std::memcpy(to + unit.first, unit.global + unit.first, unit.end - unit.first);
        for (int i = 0; i < unit_bytes; i += 4) {
            Word& word = shared.word(unit.shared + i);
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
    BoxCopy copy{box_units<Access::read>(what, tensor, at, to), &barrier};
    for (const Unit& unit : copy.units) {
        note<Access::write>(what, unit.shared, unit_bytes);
        for (int i = 0; i < unit_bytes; i += 4) ++block->shared.word(unit.shared + i).copies_under_way;
    }
    block->boxes.push_back(std::move(copy));
    ++block->progress;
    if (block->schedule == Schedule::ascending || draws_early_end()) land_one();
}

// The words of a unit from which bytes go to the tensor.
template <class Visit>
void for_each_stored_word(const Unit& unit, const Visit& visit) {
    if (unit.first == unit.end) return;
    for (int i = unit.first / 4 * 4; i < unit.end; i += 4) visit(unit.shared + i);
}

inline void store_unit(const Unit& unit) {
    const char* const from = block->shared.bytes() + unit.shared;
    if (unit.end > unit.first) std::memcpy(unit.global + unit.first, from + unit.first, unit.end - unit.first);
}

// Shared memory is read until this thread has waited; when it is read is up to the schedule. When global memory is written
// the block does not learn.
inline void start_store(const cuattn::TensorMap& map, const int (&at)[4], uint32_t from) {
    const char* const what = "tma_store_4d";
    Thread& me = current();
    const bool early = block->schedule == Schedule::ascending || draws_early_end();
    if (*std::min_element(at, at + 4) < 0) fail(std::string(what) + ": a negative coordinate, an illegal instruction");
    for (const Unit& unit : box_units<Access::write>(what, Tensor4d(map), at, from)) {
        for_each_stored_word(unit, [&](uint32_t address) {
            check_asynchronous_read(what, address, me.now);
            ++block->shared.word(address).stores_under_way;
        });
        if (unit.first < unit.end) block->stored.insert(reinterpret_cast<uint64_t>(unit.global) / unit_bytes);
        if (early) store_unit(unit);
        me.open_stores.push_back(unit);
    }
}

inline void commit_stores() {
    Thread& me = current();
    me.stores.insert(me.stores.end(), me.open_stores.begin(), me.open_stores.end());
    me.open_stores.clear();
}

// Until all committed stores of this thread have read shared memory, which is a read by this thread then.
inline void finish_stores() {
    Thread& me = current();
    for (const Unit& unit : me.stores) {
        store_unit(unit);
        for_each_stored_word(unit, [&](uint32_t address) {
            --block->shared.word(address).stores_under_way;
            block->shared.note_reader(address, me.now);
        });
    }
    me.stores.clear();
}

// Of a thread that returns.
inline void check_stores_finished() {
    if (!current().open_stores.empty()) fail("returns without tma_store_commit of its last stores");
    if (!current().stores.empty()) fail("returns without tma_store_wait for its last stores");
}

}  // namespace emulator
