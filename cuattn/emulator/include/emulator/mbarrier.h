// Barriers in shared memory, and copies that count at them. An mbarrier's state lives outside of shared memory, whose 8
// bytes nobody else may touch.
#pragma once

#include <cstdint>
#include <string>

#include <emulator/access.h>

namespace emulator {

constexpr int mbarrier_bytes = 8;

inline std::string describe(const Mbarrier& barrier) {
    char text[64];
    std::snprintf(text, sizeof text, "the mbarrier at 0x%x in phase %llu", barrier.address,
                  static_cast<unsigned long long>(barrier.phase));
    return text;
}

inline void init_mbarrier(uint32_t address, int arrivals) {
    const char* const what = "mbarrier_init";
    shared_bytes(what, address, mbarrier_bytes);
    if (arrivals < 1 || arrivals >= 1 << 20) fail_access(what, address, mbarrier_bytes, "no such count of arrivals");
    if (block->mbarriers.count(address)) fail_access(what, address, mbarrier_bytes, "is an mbarrier already");
    note<Access::write>(what, address, mbarrier_bytes);
    for (int i = 0; i < mbarrier_bytes; i += 4) block->shared.word(address + i).is_barrier = true;
    Mbarrier barrier{};
    barrier.address = address;
    barrier.actor = block->shared.mbarrier(static_cast<int>(block->mbarriers.size()));
    barrier.arrivals = barrier.missing = arrivals;
    barrier.waited_for.assign(block->threads, -1);
    barrier.initialiser = current().now.actor, barrier.initialised = current().now.epoch;
    block->mbarriers.emplace(address, barrier);
}

// By the copy engine, of those that this thread has initialised.
inline void fence_mbarriers() {
    for (auto& [address, barrier] : block->mbarriers) {
        if (barrier.initialiser == block->running) barrier.fenced = true;
    }
}

inline Mbarrier& mbarrier(const char* what, uint32_t address) {
    shared_bytes(what, address, mbarrier_bytes);
    const auto found = block->mbarriers.find(address);
    if (found == block->mbarriers.end()) fail_access(what, address, mbarrier_bytes, "no mbarrier has been initialised");
    Mbarrier& barrier = found->second;
    if (!current().now.knows(barrier.initialiser, barrier.initialised)) {
        fail_access(what, address, mbarrier_bytes, "race with the initialisation of the mbarrier");
    }
    return barrier;
}

// The phase ends when nothing is missing.
inline void advance(Mbarrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.arrived.add_epoch(barrier.actor, static_cast<uint32_t>(barrier.phase + 1));
    barrier.ended = Lesson(barrier.arrived.result());
    barrier.missing = barrier.arrivals;
    ++barrier.phase, ++block->progress;
}

inline void count_bytes(Mbarrier& barrier, int64_t bytes) {
    constexpr int64_t limit = (1 << 20) - 1;
    barrier.bytes += bytes;
    if (barrier.bytes > limit || barrier.bytes < -limit) fail(describe(barrier) + ": more bytes than it can count");
}

inline void arrive(const char* what, uint32_t address, int expected_bytes) {
    Mbarrier& barrier = mbarrier(what, address);
    if (barrier.missing == 0) {
        fail(std::string(what) + ": more than " + std::to_string(barrier.arrivals) + " arrivals at " +
             describe(barrier));
    }
    count_bytes(barrier, expected_bytes);
    barrier.arrived.add(current().now);
    --barrier.missing, ++block->progress;
    advance(barrier);
}

inline void wait_for_phase(uint32_t address, uint32_t parity) {
    Mbarrier& barrier = mbarrier("mbarrier_wait", address);
    if (parity > 1) fail("mbarrier_wait: a parity of " + std::to_string(parity));
    if (barrier.phase % 2 == parity) {
        const uint64_t phase = barrier.phase;
        barrier.waiting.push_back(block->running);
        wait_for_end_of(barrier.phase);
        barrier.waiting.erase(std::find(barrier.waiting.begin(), barrier.waiting.end(), block->running));
        if (barrier.phase != phase + 1) {  // a device, which looks at the parity now and then, may wait forever
            fail("mbarrier_wait: while it waited for phase " + std::to_string(phase) + " began " + describe(barrier));
        }
    }
    barrier.waited_for[block->running] = static_cast<int64_t>(barrier.phase) - 1;
    barrier.ended.teach(current().now);
}

// For the report of a deadlock. A thread that others leave behind waits for a parity that has come back.
inline std::string waiting_at(const Mbarrier& barrier) {
    if (barrier.waiting.empty()) return {};
    const int thread = barrier.waiting.front();
    const int64_t last = barrier.waited_for[thread];
    return describe(barrier) + " misses " + std::to_string(barrier.missing) + " of " +
           std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) + " bytes; " +
           std::to_string(barrier.waiting.size()) + " of its threads wait, one of them thread " +
           std::to_string(thread) +
           (last < 0 ? ", for the first time; " : ", last for phase " + std::to_string(last) + "; ");
}

}  // namespace emulator
