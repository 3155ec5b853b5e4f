// One thread block on the CPU: a fiber for every CUDA thread, run in turn; collectives are rendezvous of fibers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include <emulator/fiber.h>
#include <emulator/memory.h>

namespace emulator {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};

// Fibers run in ascending order with early copies, in descending order with late copies, or in random order.
enum class Schedule { ascending, descending, random };

struct Copy {
    uint32_t to;
    const void* from;  // null: zeros
};

struct Thread {
    Context context;
    int number = 0;  // inside the block
    bool finished = false;
    const uint64_t* waiting_for = nullptr;  // generation counter of the rendezvous this thread waits in
    uint64_t generation = 0;
    int barriers = 0;  // __syncthreads passed
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// A meeting of `size` threads; the last to arrive does the work with everybody's argument.
struct Rendezvous {
    const char* what = nullptr;
    int arrived = 0;
    uint64_t generation = 0;
    const void* arguments[32];  // by lane, of a warp's collectives
};

struct Block {
    Index3 index, grid;
    int threads = 0, alive = 0, running = 0;
    uint64_t progress = 0;
    Schedule schedule = Schedule::ascending;
    uint64_t random_state = 1;
    Context scheduler;
    std::vector<Thread> thread;
    std::vector<Rendezvous> warp;
    Rendezvous all;
    SharedMemory shared;
    GlobalMemory global;
    std::function<void()> body;
    std::string error;
};

inline thread_local Block* block = nullptr;

inline Thread& current() { return block->thread[block->running]; }

inline uint64_t random_number() {
    uint64_t& x = block->random_state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

inline void yield() { switch_context(current().context, block->scheduler); }

// Ends the launch with a message; the calling fiber never runs again.
[[noreturn]] inline void fail(const std::string& message) {
    char place[96];
    std::snprintf(place, sizeof place, "block %u, thread %d: ", block->index.x, block->running);
    if (block->error.empty()) block->error = place + message;
    for (;;) yield();
}

template <class Work>
void meet(Rendezvous& r, const char* what, int slot, int size, const void* argument, Work&& work) {
    if (r.arrived > 0 && r.what != what) {
        fail(std::string("divergence: reached ") + what + " while others of its group wait in " + r.what);
    }
    r.what = what;
    r.arguments[slot] = argument;
    Thread& me = current();
    const uint64_t generation = r.generation;
    ++block->progress;
    if (++r.arrived == size) {
        r.arrived = 0;
        work(r.arguments);
        ++r.generation;
    } else {
        me.waiting_for = &r.generation, me.generation = generation;
        yield();
        me.waiting_for = nullptr;
    }
}

inline int warp_number() { return block->running / 32; }
inline int lane_number() { return block->running % 32; }

// A collective of all 32 lanes; a mask that leaves lanes out is an error.
template <class Work>
void warp_collective(const char* what, unsigned mask, const void* argument, Work&& work) {
    if (mask != 0xffffffffu) fail(std::string(what) + ": the mask leaves lanes out");
    meet(block->warp[warp_number()], what, lane_number(), 32, argument, work);
}

inline void block_barrier() {
    Thread& me = current();
    meet(block->all, "__syncthreads", 0, block->threads, nullptr, [](const void* const*) {});
    ++me.barriers;
}

}  // namespace emulator
