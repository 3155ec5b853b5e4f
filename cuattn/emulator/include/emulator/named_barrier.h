// Barriers 1 to 15, which warps may wait in or only arrive at, and registers that warps pass on.
#pragma once

#include <string>

#include <emulator/access.h>

namespace emulator {

// One thread's part; `threads` of the block make the barrier complete. Warps come as wholes.
inline void arrive_named(const char* what, int id, int threads, bool waits) {
    if (id < 1 || id > 15) fail(std::string(what) + ": no barrier " + std::to_string(id));
    struct Arrival {
        int id;
        mutable uint64_t generation;
    };
    const Arrival mine{id, 0};
    NamedBarrier& barrier = block->named[id];
    warp_collective(what, 0xffffffffu, &mine, [&](const void* const* all) {
        for (int lane = 0; lane < 32; ++lane) {
            const auto& other = *static_cast<const Arrival*>(all[lane]);
            if (other.id != id) fail(std::string("divergence: ") + what + " of two barriers");
            other.generation = barrier.generation;
        }
        const std::string name = std::string(what) + ": barrier " + std::to_string(id);
        if (barrier.warps == 0) barrier.threads = threads;
        if (barrier.threads != threads) {
            fail(name + " of " + std::to_string(threads) + " threads, which others take for one of " +
                 std::to_string(barrier.threads));
        }
        if (barrier.warps >> warp_number() & 1) fail(name + ": a warp arrives twice");
        barrier.warps |= uint64_t{1} << warp_number();
        const int first = warp_number() * 32;
        for (int i = first; i < first + 32; ++i) barrier.arrived.add(block->thread[i].now);
        if (waits) {
            for (int i = first; i < first + 32; ++i) barrier.waiting.push_back(i);
        }
        if (32 * __builtin_popcountll(barrier.warps) < threads) return;
        Lesson lesson(barrier.arrived.result());
        for (const int i : barrier.waiting) lesson.teach(block->thread[i].now);
        barrier.warps = 0;
        barrier.waiting.clear();
        ++barrier.generation, ++block->progress;
    });
    if (waits && barrier.generation == mine.generation) wait_for_end_of(barrier.generation);
}

// For the report of a deadlock.
inline std::string waiting_at(int id) {
    const NamedBarrier& barrier = block->named[id];
    if (barrier.waiting.empty()) return {};
    std::string warps;
    for (int i = 0; i < 64; ++i) {
        if (barrier.warps >> i & 1) warps += (warps.empty() ? "" : ", ") + std::to_string(i);
    }
    return "barrier " + std::to_string(id) + " of " + std::to_string(barrier.threads) + " threads has warps " + warps +
           "; ";
}

inline void set_registers(const char* what, int registers) {
    warp_collective(what, 0xffffffffu, nullptr, [&](const void* const*) {
        const size_t number = warp_number() / 4;
        if (number >= block->warpgroup.size()) fail(std::string(what) + ": not a whole warpgroup");
        block->warpgroup[number].registers[warp_number() % 4] = registers;
    });
}

// What is wrong with the registers that the block's warps have asked for; empty where nothing is.
inline std::string register_error() {
    // What the block starts with, for each thread of a warpgroup if it were alone: a thread's come in units of 8, and what
    // these leave of the register file cannot be asked for.
    const int warpgroups = static_cast<int>(block->warpgroup.size());
    if (warpgroups == 0) return {};
    const int all = 64 * 1024 / (128 * warpgroups) / 8 * 8 * warpgroups;
    std::string counts;
    int sum = 0;
    for (const Warpgroup& group : block->warpgroup) {
        for (const int registers : group.registers) {
            if (registers != group.registers[0])
                return "warps of one warpgroup asked for different numbers of registers";
        }
        sum += group.registers[0];
        counts += (counts.empty() ? "" : " + ") + std::to_string(group.registers[0]);
    }
    if (sum <= all) return {};
    return "more registers than there are: " + counts + " for each thread of the warpgroups, of " + std::to_string(all);
}

}  // namespace emulator
