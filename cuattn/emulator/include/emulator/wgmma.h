// Products of a warpgroup. They are computed when they are issued, which nobody can tell: until the wait for their group
// what they read must not be written, and their results are kept apart.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <emulator/tensor_core.h>
#include <emulator/under_way.h>
#include <emulator/wgmma_operand.h>

namespace emulator {

// One thread's part of an instruction.
struct Issue {
    float* registers;
    const uint32_t* left_registers;  // or null, and
    uint64_t left;
    uint64_t right;
    bool accumulate;
};

constexpr int panel = 16;  // columns that are computed together

// Thread t of a warpgroup holds numbers i of rows as mma.cuh has them; index of one in values (panel, row, column).
inline int value_index(int thread, int i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    return (column / panel * 64 + row) * panel + column % panel;
}

inline Warpgroup& my_warpgroup() {
    const size_t number = block->running / 128;
    if (number >= block->warpgroup.size()) fail("wgmma: not a whole warpgroup");
    return block->warpgroup[number];
}

// The first of the running thread's warpgroup.
inline Thread* warpgroup_threads() { return &block->thread[block->running / 128 * 128]; }

template <class Work>
void warpgroup_collective(const char* what, const void* argument, Work&& work) {
    meet(my_warpgroup().meeting, what, block->running % 128, argument, work);
}

// The registers' record, new where no product is under way to them; they then hold the NaN of under_way.h.
inline Accumulators& accumulators(Warpgroup& group, const void* const* all, int blocks) {
    const auto issue = [&](int thread) -> const Issue& { return *static_cast<const Issue*>(all[thread]); };
    auto& list = group.accumulators;
    const auto same = [&](const auto& x) { return x->registers[0] == issue(0).registers && x->blocks == blocks; };
    auto found = std::find_if(list.begin(), list.end(), same);
    if (found == list.end()) {
        list.push_back(std::make_unique<Accumulators>());
        found = list.end() - 1;
        Accumulators& made = **found;
        made.blocks = blocks;
        made.values.resize(64 * 8 * ((blocks + 1) / 2 * 2));
        for (int t = 0; t < 128; ++t) {
            made.registers[t] = issue(t).registers;
            for (int i = 0; i < 4 * blocks; ++i) {
                float& x = made.registers[t][i];
                if (issue(t).accumulate) made.values[value_index(t, i)] = settled(x);
                x = float_of(under_way_bits);
            }
        }
    }
    return **found;
}

// Whether nobody has written to registers of products under way.
inline void check_accumulators(const Accumulators& x) {
    for (const float* const registers : x.registers) {
        for (int i = 0; i < 4 * x.blocks; ++i) {
            if (bits_of(registers[i]) != under_way_bits) fail("a register was written that a wgmma under way adds to");
        }
    }
}

inline Operand operand_of(uint16_t bits, bool bfloat16) { return bfloat16 ? bf16_operand(bits) : fp16_operand(bits); }

// values += left * right; rows of zeros add nothing to finite numbers.
template <int blocks>
void multiply(std::vector<float>& values, const Operand (&left)[64][16], const std::vector<OperandRow<panel>>& right,
              int fraction) {
    const int terms = tensor_core.terms;
    for (int row = 0; row < 64; ++row) {
        for (int p = 0; p < (blocks + 1) / 2; ++p) {
            auto& c = reinterpret_cast<float (&)[panel]>(values[(p * 64 + row) * panel]);
            for (int k = 0; k < 16; k += terms) dot_add(c, &left[row][k], &right[p * 16 + k], terms, fraction);
        }
    }
}

// All 128 threads' instruction; the last to come runs it.
template <bool bfloat16, int blocks>
void issue_product(const char* what, const Issue& mine) {
    if (!current().wgmma_fence) fail(std::string(what) + ": no wgmma_fence since the last wgmma_wait");
    warpgroup_collective(what, &mine, [&](const void* const* all) {
        const auto issue = [&](int thread) -> const Issue& { return *static_cast<const Issue*>(all[thread]); };
        Warpgroup& group = my_warpgroup();
        Product product{};
        std::vector<uint32_t>& units = product.units;
        if (!mine.left_registers) row_units(units, Descriptor(mine.left), 64);
        const size_t left_units = units.size();
        const Descriptor right(mine.right);
        mine.left_registers ? column_units(units, right, 8 * blocks) : row_units(units, right, 8 * blocks);

        Readership readership(block->running / 128 * 128, 128);
        for (const uint32_t unit : units) {
            if (!block->shared.holds(unit, unit_bytes)) fail_access(what, unit, unit_bytes, "outside of shared memory");
            for (int i = 0; i < unit_bytes; i += 4) {
                readership.check(unit + i);
                ++block->shared.word(unit + i).products_under_way;
            }
        }

        const auto element = [&](size_t unit, int i) {
            uint16_t bits;
            std::memcpy(&bits, block->shared.bytes() + units[unit] + 2 * i, 2);
            return operand_of(bits, bfloat16);
        };
        static thread_local Operand left[64][16];
        std::vector<OperandRow<panel>> b((blocks + 1) / 2 * 16);
        for (size_t unit = 0; unit < left_units; ++unit) {
            for (int i = 0; i < 8; ++i) left[unit / 2][unit % 2 * 8 + i] = element(unit, i);
        }
        for (size_t unit = left_units; unit < units.size(); ++unit) {
            const int number = static_cast<int>(unit - left_units);
            for (int i = 0; i < 8; ++i) {
                const int k = mine.left_registers ? number / blocks : number % 2 * 8 + i;
                const int column = mine.left_registers ? number % blocks * 8 + i : number / 2;
                b[column / panel * 16 + k].set(column % panel, element(unit, i));
            }
        }
        for (int t = 0; t < 128; ++t) {
            const Issue& other = issue(t);
            if (other.left != mine.left || other.right != mine.right || other.accumulate != mine.accumulate) {
                fail(std::string("divergence: threads of a warpgroup give ") + what + " different operands");
            }
            product.registers[t] = other.left_registers;
            if (!other.left_registers) continue;
            std::copy_n(other.left_registers, 4, product.held[t]);
            for (int i = 0; i < 8; ++i) {
                const auto bits = static_cast<uint16_t>(product.held[t][i / 2] >> 16 * (i % 2));
                left[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8] =
                    operand_of(bits, bfloat16);
            }
        }
        Accumulators& to = accumulators(group, all, blocks);
        check_accumulators(to);
        to.group = group.committed + 1;
        if (!mine.accumulate) std::fill(to.values.begin(), to.values.end(), 0.0f);
        multiply<blocks>(to.values, left, b, bfloat16 ? 7 : 10);
        group.open.push_back(std::move(product));
    });
}

inline void commit_products() {
    warpgroup_collective("wgmma_commit", nullptr, [](const void* const*) {
        Warpgroup& group = my_warpgroup();
        group.groups.push_back(std::move(group.open));
        group.open.clear();
        ++group.committed;
    });
}

// The products' operands may change from now on, as far as threads know of the group's end.
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
    for (const auto& x : list) {
        if (x->group > group.finished) continue;
        check_accumulators(*x);
        for (int t = 0; t < 128; ++t) {
            for (int i = 0; i < 4 * x->blocks; ++i) x->registers[t][i] = x->values[value_index(t, i)];
        }
    }
    const auto finished = [&](const auto& x) { return x->group <= group.finished; };
    list.erase(std::remove_if(list.begin(), list.end(), finished), list.end());
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
        for (int t = 0; t < 128; ++t) {
            Thread& thread = warpgroup_threads()[t];
            thread.wgmma_fence = false;
            lesson.teach(thread.now);
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
