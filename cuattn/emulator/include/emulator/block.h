// One thread block on the CPU: a fiber for every CUDA thread, run in turn; collectives are rendezvous of fibers.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include <emulator/fiber.h>
#include <emulator/memory.h>
#include <emulator/rendezvous.h>

namespace emulator {

// Blocks and fibers run in ascending order with early copies or in descending order with late copies; or fibers and
// copies in random order.
enum class Schedule { ascending, descending, random };

// An asynchronous copy of copy_bytes.
struct Copy {
    uint32_t to;
    const void* from;  // null: zeros
};
constexpr int copy_bytes = 16;

struct Thread {
    Context context;
    Moment now;
    bool finished = false;
    const uint64_t* waiting_for = nullptr;  // counter of generations or phases that this thread waits for
    uint64_t generation = 0;
    bool waited = false;       // for the launches before this one
    bool met_cluster = false;  // has been in a meeting of it
    bool wgmma_fence = false;  // since the last wait for products
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Unit> open_stores, stores;  // by the copy engine, from shared memory: not committed, and committed
};

// The blocks that run together, and the meeting of all their threads.
struct Cluster {
    int blocks;
    uint32_t first_number;  // of the first block
    int arrived = 0;
    uint64_t generation = 0;

    bool has(uint32_t number) const { return number - first_number < static_cast<uint32_t>(blocks); }
};

struct Block {
    GlobalMemory global;
    SharedMemory shared;
    std::function<void()> body;
    Schedule schedule;
    uint64_t random_state;
    int threads;
    bool overlaps;          // may have started before earlier launches ended
    uint32_t first_number;  // of the launch's first block among those of all launches
    Cluster* cluster = nullptr;
    int index = 0, alive = 0, running = 0, arrived_in_cluster = 0;
    uint64_t progress = 0;
    Context scheduler;
    std::vector<Thread> thread;
    std::vector<Rendezvous> warp;
    Rendezvous all{0};
    std::vector<Warpgroup> warpgroup;
    NamedBarrier named[16];
    std::map<uint32_t, Mbarrier> mbarriers;  // by address
    std::vector<BoxCopy> boxes;              // under way
    std::unordered_set<uint64_t> stored;     // units of global memory, by number, that the copy engine writes
    std::string error;

    uint32_t number() const { return first_number + index; }
};

inline thread_local Block* block = nullptr;

inline Thread& current() { return block->thread[block->running]; }

inline uint64_t random_number() {
    uint64_t& x = block->random_state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

inline void yield() { switch_context(current().context, block->scheduler); }

// Ends the launch with a message; thread_entry catches it.
[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// Until a counter of generations or phases has moved on.
inline void wait_for_end_of(const uint64_t& generation) {
    Thread& me = current();
    me.waiting_for = &generation, me.generation = generation;
    yield();
    me.waiting_for = nullptr;
}

template <class Work>
void meet(Rendezvous& r, const char* what, int slot, const void* argument, Work&& work) {
    if (r.arrived > 0 && r.what != what) {
        fail(std::string("divergence: reached ") + what + " while others of its group wait in " + r.what);
    }
    r.what = what;
    r.arguments[slot] = argument;
    ++block->progress;
    if (++r.arrived == r.arguments.size()) {
        r.arrived = 0;
        work(r.arguments.data());
        ++r.generation;
    } else {
        wait_for_end_of(r.generation);
    }
}

inline int warp_number() { return block->running / 32; }
inline int lane_number() { return block->running % 32; }

// A collective of all 32 lanes; a mask that leaves lanes out is an error.
template <class Work>
void warp_collective(const char* what, unsigned mask, const void* argument, Work&& work) {
    if (mask != 0xffffffffu) fail(std::string(what) + ": the mask leaves lanes out");
    meet(block->warp[warp_number()], what, lane_number(), argument, work);
}

inline void synchronize_threads(int first, int count) {
    std::vector<Moment*> threads;
    threads.reserve(count);
    for (int i = first; i < first + count; ++i) threads.push_back(&block->thread[i].now);
    synchronize(threads);
}

inline void warp_barrier(unsigned mask) {
    warp_collective("__syncwarp", mask, nullptr,
                    [](const void* const*) { synchronize_threads(warp_number() * 32, 32); });
}

inline void block_barrier() {
    meet(block->all, "__syncthreads", block->running, nullptr,
         [](const void* const*) { synchronize_threads(0, block->threads); });
}

}  // namespace emulator
