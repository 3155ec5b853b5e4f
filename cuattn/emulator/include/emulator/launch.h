// Runs a grid block by block. Included last by the generated unit, which defines emulate() with it.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include <cuda_builtins.h>

namespace emulator {

// The argument of emulate(); cuattn/emulator/run.py mirrors it field by field.
struct Launch {
    const void* params;
    const Region* regions;
    const float* exp2_table;
    char* error;  // room for error_bytes
    int64_t error_bytes;
    int64_t grid;
    uint64_t seed;
    int32_t threads, shared_bytes, region_count, schedule, tensor_core_terms, tensor_core_fraction_bits;
};

inline void thread_entry() {
    block->body();
    Thread& me = current();
    if (!me.groups.empty() || !me.open_group.empty()) finish_copies(0);
    me.finished = true;
    --block->alive, ++block->progress;
    for (;;) yield();
}

inline std::string deadlock() {
    std::string text = "deadlock: ";
    const auto group = [&](const Rendezvous& r, const std::string& who, int size) {
        if (r.arrived > 0) {
            text += who + " waits in " + r.what + " with " + std::to_string(r.arrived) + " of " + std::to_string(size) +
                    " threads; ";
        }
    };
    for (size_t w = 0; w < block->warp.size(); ++w) group(block->warp[w], "warp " + std::to_string(w), 32);
    group(block->all, "the block", block->threads);
    return text + std::to_string(block->threads - block->alive) + " threads have returned";
}

// Turns of the block's fibers until all have returned. Random schedules also hold back whole warps for a while.
inline void run_block() {
    std::vector<int> order(block->threads);
    for (int i = 0; i < block->threads; ++i)
        order[i] = block->schedule == Schedule::descending ? block->threads - 1 - i : i;
    std::vector<char> held((block->threads + 31) / 32, 0);
    while (block->alive > 0 && block->error.empty()) {
        const uint64_t before = block->progress;
        if (block->schedule == Schedule::random) {
            for (int i = block->threads - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
            for (char& h : held) h = random_number() % 2;
        }
        for (const int number : order) {
            Thread& thread = block->thread[number];
            const bool waits = thread.waiting_for && *thread.waiting_for == thread.generation;
            if (thread.finished || waits || held[number / 32]) continue;
            block->running = number;
            threadIdx.x = number;
            switch_context(block->scheduler, thread.context);
            if (!block->error.empty()) return;
        }
        const bool anyone_held = std::count(held.begin(), held.end(), 1) > 0;
        std::fill(held.begin(), held.end(), 0);
        if (block->progress == before && !anyone_held) {
            block->error = "block " + std::to_string(block->index.x) + ": " + deadlock();
        }
    }
}

// 0, or 1 with a message in launch.error.
template <class Body>
int run(const Launch& launch, Body body) {
    Block state;
    block = &state;
    tensor_core = {launch.tensor_core_terms, launch.tensor_core_fraction_bits};
    exp2_table = launch.exp2_table;
    state.threads = launch.threads;
    state.schedule = static_cast<Schedule>(launch.schedule);
    state.random_state = launch.seed * 2654435761u + 88172645463325252u;
    state.global = {launch.regions, launch.region_count};
    state.shared.allocate(launch.shared_bytes);
    state.body = body;
    const std::unique_ptr<char[]> stacks(new char[stack_bytes * launch.threads]);
    gridDim.x = static_cast<unsigned>(launch.grid);
    for (int64_t index = 0; index < launch.grid && state.error.empty(); ++index) {
        blockIdx.x = state.index.x = static_cast<unsigned>(index);
        state.alive = state.threads;
        state.warp.assign((state.threads + 31) / 32, Rendezvous{});
        state.all = Rendezvous{};
        state.shared.reset();
        state.thread.assign(state.threads, Thread{});
        for (int i = 0; i < state.threads; ++i) {
            state.thread[i].number = i;
            make_context(state.thread[i].context, stacks.get() + stack_bytes * i, thread_entry);
        }
        run_block();
    }
    block = nullptr;
    if (state.error.empty()) return 0;
    std::strncpy(launch.error, state.error.c_str(), launch.error_bytes - 1);
    return 1;
}

}  // namespace emulator
