// One thread block on the CPU: a fiber for every CUDA thread, run in turn; collectives are rendezvous of fibers.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <emulator/fiber.h>
#include <emulator/memory.h>

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
    Moment now;  // `thread` is the number inside the block
    bool finished = false;
    const uint64_t* waiting_for = nullptr;  // generation counter of the rendezvous this thread waits in
    uint64_t generation = 0;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// A meeting of a warp's or a block's threads; the last to arrive does the work with everybody's argument.
struct Rendezvous {
    const char* what = nullptr;
    size_t arrived = 0;
    uint64_t generation = 0;
    std::vector<const void*> arguments;  // by lane of the warp or thread of the block

    explicit Rendezvous(int size) : arguments(size) {}
};

struct Block {
    GlobalMemory global;
    SharedMemory shared;
    std::function<void()> body;
    Schedule schedule;
    uint64_t random_state;
    int threads;
    uint32_t first_number;  // of the launch's first block among those of all launches
    int index = 0, alive = 0, running = 0;
    uint64_t progress = 0;
    Context scheduler;
    std::vector<Thread> thread;
    std::vector<Rendezvous> warp;
    Rendezvous all{0};
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

template <class Work>
void meet(Rendezvous& r, const char* what, int slot, const void* argument, Work&& work) {
    if (r.arrived > 0 && r.what != what) {
        fail(std::string("divergence: reached ") + what + " while others of its group wait in " + r.what);
    }
    r.what = what;
    r.arguments[slot] = argument;
    Thread& me = current();
    ++block->progress;
    if (++r.arrived == r.arguments.size()) {
        r.arrived = 0;
        work(r.arguments.data());
        ++r.generation;
    } else {
        me.waiting_for = &r.generation, me.generation = r.generation;
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
    meet(block->warp[warp_number()], what, lane_number(), argument, work);
}

inline void no_work(const void* const*) {}

inline void warp_barrier(unsigned mask) {
    warp_collective("__syncwarp", mask, nullptr, no_work);
    ++current().now.warp_barriers;
}

inline void block_barrier() {
    meet(block->all, "__syncthreads", block->running, nullptr, no_work);
    Moment& now = current().now;
    ++now.block_barriers, ++now.warp_barriers;
}

}  // namespace emulator
