// What threads of a block meet in: data only, for Block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include <emulator/clock.h>

namespace emulator {

// A meeting of a warp's, a warpgroup's or a block's threads; the last to arrive does the work with everybody's argument.
struct Rendezvous {
    const char* what = nullptr;
    size_t arrived = 0;
    uint64_t generation = 0;
    std::vector<const void*> arguments;  // by number of the thread in the group

    explicit Rendezvous(int size) : arguments(size) {}
};

// A barrier that some warps wait in and others only arrive at.
struct NamedBarrier {
    int threads = 0;           // that make it complete, as the first to arrive says
    uint64_t warps = 0;        // that have arrived
    std::vector<int> waiting;  // threads
    uint64_t generation = 0;
    Gathering arrived;
};

struct Mbarrier {
    uint32_t address;
    int actor;  // of its copies, as in clock.h
    int arrivals, missing;
    int64_t bytes = 0;                // expected and not yet there
    uint64_t phase = 0;               // that is under way
    int initialiser;                  // a thread, in its
    uint32_t initialised;             // epoch of that number
    bool fenced = false;              // known to the copy engine
    int64_t loaded_in = -1;           // the last phase that counted bytes
    std::vector<int64_t> waited_for;  // the last phase that each thread has waited for, or -1
    Gathering arrived;
    Lesson ended;              // for those who wait for the last phase that has ended
    std::vector<int> waiting;  // threads
};

// A copy of the copy engine: units of 16 bytes of shared memory and, for each byte, its place in a tensor.
struct Unit {
    uint32_t shared;
    int first, end;  // bytes that lie inside of the tensor
    char* global;    // of byte 0
};
struct BoxCopy {
    std::vector<Unit> units;
    Mbarrier* barrier;
};

// Registers that a product in flight adds to (blocks of 8 columns), and the numbers that they will get.
struct Accumulators {
    int blocks;
    float* registers[128];
    std::vector<float> values;  // panels of columns, as multiply() has them
    uint32_t group;             // the last group of products that add to it
};
struct Product {
    std::vector<uint32_t> units;     // of 16 bytes that it reads from shared memory
    const uint32_t* registers[128];  // that it reads, or null
    uint32_t held[128][4];           // by them when it was issued
};
struct Warpgroup {
    Rendezvous meeting{128};
    uint32_t committed = 0, finished = 0;  // groups of products
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;  // committed and under way, oldest first
    std::vector<std::unique_ptr<Accumulators>> accumulators;
    int registers[4] = {};  // that a thread of each warp may use; 0: as many as the launch gave it
};

}  // namespace emulator
