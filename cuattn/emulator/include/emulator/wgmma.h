// Products of a warpgroup. They are computed when they are issued, which nobody can tell: until the wait for their group
// what they read must not be written, and their results are kept apart.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <emulator/under_way.h>
#include <emulator/wgmma_arithmetic.h>
#include <emulator/wgmma_operand.h>

namespace emulator {

// One thread's part of an instruction.
struct Issue {
    float* registers;
    const uint32_t* left_registers;  // null: the left operand is in shared memory
    uint64_t left, right;            // descriptors
    bool accumulate;
};

inline Warpgroup& my_warpgroup() {
    const size_t number = block->running / 128;
    if (number >= block->warpgroup.size()) fail("wgmma: not a whole warpgroup");
    return block->warpgroup[number];
}
inline int my_warpgroup_start() { return block->running / 128 * 128; }

template <class Work>
void warpgroup_collective(const char* what, const void* argument, Work&& work) {
    meet(my_warpgroup().meeting, what, block->running % 128, argument, work);
}

// A new record of registers, which from now on hold the NaN of under_way.h.
inline std::unique_ptr<Accumulators> take_registers(const Issue* const* issues, int blocks) {
    auto made = std::make_unique<Accumulators>();
    made->blocks = blocks;
    made->values.resize(64 * 8 * blocks);
    for (int t = 0; t < 128; ++t) {
        made->registers[t] = issues[t]->registers;
        for (int i = 0; i < 4 * blocks; ++i) {
            float& x = made->registers[t][i];
            if (issues[t]->accumulate) made->values[value_index(t, i)] = settled(x);
            x = float_of(under_way_bits);
        }
    }
    return made;
}

// Nobody has written to registers of products under way.
inline void check_registers(const Accumulators& x) {
    for (const float* const registers : x.registers) {
        for (int i = 0; i < 4 * x.blocks; ++i) {
            if (bits_of(registers[i]) != under_way_bits) fail("a register was written that a wgmma under way adds to");
        }
    }
}

// The record of the registers that an instruction adds to.
inline Accumulators& accumulators(const Issue* const* issues, int blocks) {
    auto& list = my_warpgroup().accumulators;
    const auto same = [&](const auto& x) { return x->registers[0] == issues[0]->registers && x->blocks == blocks; };
    const auto found = std::find_if(list.begin(), list.end(), same);
    if (found == list.end()) return *list.emplace_back(take_registers(issues, blocks));
    check_registers(**found);
    return **found;
}

// Reads of shared memory start: all threads know of what was written there.
inline void start_reads(const std::vector<uint32_t>& units) {
    Readership readership(my_warpgroup_start(), 128);
    for (const uint32_t unit : units) {
        if (!block->shared.holds(unit, unit_bytes)) fail_access("wgmma", unit, unit_bytes, "outside of shared memory");
        for (int i = 0; i < unit_bytes; i += 4) {
            readership.check(unit + i);
            ++block->shared.word(unit + i).products_under_way;
        }
    }
}

// All 128 threads' instruction; the last to come runs it. right_columns: the right operand is a tile's columns, else its rows.
template <bool bfloat16, bool right_columns, int blocks>
void issue_product(const char* what, const Issue& mine) {
    if (!current().wgmma_fence) fail(std::string(what) + ": no wgmma_fence since the last wgmma_wait");
    warpgroup_collective(what, &mine, [&](const void* const* all) {
        const auto* const* issues = reinterpret_cast<const Issue* const*>(all);
        const bool left_shared = mine.left_registers == nullptr;
        Product product{};
        std::vector<uint32_t>& units = product.units;
        if (left_shared) row_units(units, Descriptor(mine.left), 64);
        const size_t left_units = units.size();
        const Descriptor right(mine.right);
        right_columns ? column_units(units, right, 8 * blocks) : row_units(units, right, 8 * blocks);
        start_reads(units);

        const auto operands = std::make_unique<Operands<bfloat16, blocks>>();
        if (left_shared) operands->read_left(units);
        right_columns ? operands->read_right_columns(&units[left_units])
                      : operands->read_right_rows(&units[left_units]);
        for (int t = 0; t < 128; ++t) {
            const Issue& issue = *issues[t];
            if (issue.left != mine.left || issue.right != mine.right || issue.accumulate != mine.accumulate) {
                fail(std::string("divergence: threads of a warpgroup give ") + what + " different operands");
            }
            if (left_shared) continue;
            product.registers[t] = issue.left_registers;
            std::copy_n(issue.left_registers, 4, product.held[t]);
            operands->set_left(t, product.held[t]);
        }

        Warpgroup& group = my_warpgroup();
        Accumulators& to = accumulators(issues, blocks);
        to.group = group.committed + 1;
        if (!mine.accumulate) std::fill(to.values.begin(), to.values.end(), 0.0f);
        operands->multiply_add(to.values);
        group.open.push_back(std::move(product));
    });
}

inline void commit_products() {
    warpgroup_collective("wgmma_commit", nullptr, [](const void* const*) {
        Warpgroup& group = my_warpgroup();
        group.groups.push_back(std::exchange(group.open, {}));
        ++group.committed;
    });
}

// The oldest group ends. What it read may change now, for threads that know of its end.
inline void finish_group(Warpgroup& group, Moment& tensor_core) {
    tensor_core.epoch = ++group.finished;
    for (const Product& product : group.groups.front()) {
        for (const uint32_t unit : product.units) {
            for (int i = 0; i < unit_bytes; i += 4) {
                --block->shared.word(unit + i).products_under_way;
                block->shared.note_reader(unit + i, tensor_core);
            }
        }
        for (int t = 0; t < 128; ++t) {
            if (product.registers[t] && !std::equal(product.held[t], product.held[t] + 4, product.registers[t])) {
                fail("a register was written that a wgmma under way reads");
            }
        }
    }
    group.groups.erase(group.groups.begin());
    auto& list = group.accumulators;
    const auto goes_on = [&](const auto& x) { return x->group > group.finished; };
    const auto finished = std::stable_partition(list.begin(), list.end(), goes_on);
    for (auto x = finished; x != list.end(); ++x) {
        check_registers(**x);
        for (int t = 0; t < 128; ++t) {
            for (int i = 0; i < 4 * (*x)->blocks; ++i) (*x)->registers[t][i] = (*x)->values[value_index(t, i)];
        }
    }
    list.erase(finished, list.end());
}

inline void wait_for_products(size_t pending) {
    warpgroup_collective("wgmma_wait", nullptr, [&](const void* const*) {
        Warpgroup& group = my_warpgroup();
        if (pending == 0 && !group.open.empty()) fail("wgmma_wait: no wgmma_commit of the last products");
        Moment tensor_core;
        tensor_core.actor = block->shared.tensor_core(block->running / 128);
        while (group.groups.size() > pending) finish_group(group, tensor_core);
        Clock known;
        Clock::raise(known.epochs, tensor_core.actor, group.finished);
        Lesson lesson(std::make_shared<const Clock>(std::move(known)));
        for (int t = my_warpgroup_start(); t < my_warpgroup_start() + 128; ++t) {
            block->thread[t].wgmma_fence = false;
            lesson.teach(block->thread[t].now);
        }
    });
}

// Of a thread that returns.
inline void check_products_finished() {
    const size_t number = block->running / 128;
    if (number >= block->warpgroup.size()) return;
    const Warpgroup& group = block->warpgroup[number];
    if (!group.open.empty()) fail("returns without wgmma_commit of its last products");
    if (!group.groups.empty()) fail("returns without wgmma_wait for its last products");
}

}  // namespace emulator
