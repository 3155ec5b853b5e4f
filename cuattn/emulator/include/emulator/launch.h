// Runs a grid block by block. Included last by the generated unit, which defines emulate() with it.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <cuda_builtins.h>
#include <emulator/cluster.h>
#include <emulator/floating_point.h>
#include <emulator/named_barrier.h>
#include <emulator/tma.h>
#include <emulator/wgmma.h>

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
    int64_t first_block;  // number of the first block among those of all launches, from 1
    int32_t threads, cluster, shared_bytes, overlaps, region_count, schedule, tensor_core_terms,
        tensor_core_fraction_bits;
};

inline void thread_entry() {
    try {
        block->body();
        finish_copies(0);
        check_products_finished();
        check_stores_finished();
    } catch (const std::exception& error) {
        block->error = "block " + std::to_string(block->index) + ", thread " + std::to_string(block->running) + ": " +
                       error.what();
    }
    current().finished = true;
    --block->alive, ++block->progress;
    for (;;) yield();
}

inline std::string deadlock() {
    std::string text = "deadlock: ";
    const auto group = [&](const Rendezvous& r, const std::string& who) {
        if (r.arrived > 0) {
            text += who + " waits in " + r.what + " with " + std::to_string(r.arrived) + " of " +
                    std::to_string(r.arguments.size()) + " threads; ";
        }
    };
    for (size_t w = 0; w < block->warp.size(); ++w) group(block->warp[w], "warp " + std::to_string(w));
    for (size_t w = 0; w < block->warpgroup.size(); ++w) {
        group(block->warpgroup[w].meeting, "warpgroup " + std::to_string(w));
    }
    group(block->all, "the block");
    for (int i = 1; i < 16; ++i) text += waiting_at(i);
    for (const auto& [address, barrier] : block->mbarriers) text += waiting_at(barrier);
    return text + std::to_string(block->threads - block->alive) + " of " + std::to_string(block->threads) +
           " threads returned";
}

// What is wrong with a block whose threads have all returned; empty where nothing is.
inline std::string end_error() {
    std::string error = register_error();
    for (const auto& [address, barrier] : block->mbarriers) {
        const auto last = std::max_element(barrier.waited_for.begin(), barrier.waited_for.end());
        if (barrier.loaded_in > *last) error = "nobody has waited for a copy that counts at " + describe(barrier);
    }
    if (!block->boxes.empty()) error = "copies are under way";
    return error.empty() ? error : "block " + std::to_string(block->index) + " ends: " + error;
}

// Turns of the block's fibers until all have returned or none can go on. Random schedules also hold back whole warps for a
// while.
inline void run_block() {
    std::vector<int> order(block->threads);
    std::iota(order.begin(), order.end(), 0);
    if (block->schedule == Schedule::descending) std::reverse(order.begin(), order.end());
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
        if (!block->boxes.empty() && (block->progress == before || draws_early_end())) land_one();
        const bool anyone_held = std::count(held.begin(), held.end(), 1) > 0;
        std::fill(held.begin(), held.end(), 0);
        if (block->progress == before && !anyone_held) return;
    }
}

// The blocks of a cluster in turn; returns what is wrong.
inline std::string run_cluster(std::vector<std::unique_ptr<Block>>& blocks) {
    for (bool progress = true; progress;) {
        progress = false;
        for (const auto& one : blocks) {
            block = one.get();
            blockIdx.x = static_cast<unsigned>(block->index);
            const uint64_t before = block->progress;
            run_block();
            if (!block->error.empty()) return block->error;
            progress = progress || (block->progress != before && block->alive > 0);
        }
    }
    for (const auto& one : blocks) {
        block = one.get();
        const std::string error =
            block->alive > 0 ? "block " + std::to_string(block->index) + ": " + deadlock() : end_error();
        if (!error.empty()) return error;
    }
    return "";
}

inline void run_grid(const Launch& launch, const std::function<void()>& body, std::string& error) {
    const DefaultFloatingPoint floating_point;
    tensor_core = {launch.tensor_core_terms, launch.tensor_core_fraction_bits};
    exp2_table = launch.exp2_table;
    blockDim.x = launch.threads;
    gridDim.x = static_cast<unsigned>(launch.grid);
    const bool descending = static_cast<Schedule>(launch.schedule) == Schedule::descending;
    if (launch.grid % launch.cluster != 0) fail("a grid that is no multiple of its clusters");
    std::vector<std::unique_ptr<Block>> blocks;
    for (int i = 0; i < launch.cluster; ++i) {
        blocks.emplace_back(new Block{{launch.regions, launch.region_count},
                                      SharedMemory(launch.shared_bytes, launch.threads),
                                      body,
                                      static_cast<Schedule>(launch.schedule),
                                      (launch.seed + i) * 2654435761u + 88172645463325252u,
                                      launch.threads,
                                      launch.overlaps != 0,
                                      static_cast<uint32_t>(launch.first_block)});
    }
    const std::unique_ptr<char[]> stacks(new char[stack_bytes * launch.threads * launch.cluster]);
    for (int64_t i = 0; i < launch.grid && error.empty(); i += launch.cluster) {
        const int64_t first = descending ? launch.grid - launch.cluster - i : i;
        Cluster cluster{launch.cluster, static_cast<uint32_t>(launch.first_block + first)};
        for (int b = 0; b < launch.cluster; ++b) {
            Block& state = *(block = blocks[b].get());
            state.cluster = &cluster;
            state.index = static_cast<int>(first + (descending ? launch.cluster - 1 - b : b));
            state.alive = state.threads;
            state.warp.assign((state.threads + 31) / 32, Rendezvous(32));
            state.all = Rendezvous(state.threads);
            state.warpgroup = std::vector<Warpgroup>(state.threads / 128);
            std::fill(std::begin(state.named), std::end(state.named), NamedBarrier{});
            state.mbarriers.clear();
            state.boxes.clear();
            state.stored.clear();
            state.shared.reset();
            state.thread.assign(state.threads, Thread{});
            for (int t = 0; t < state.threads; ++t) {
                state.thread[t].now.actor = t;
                make_context(state.thread[t].context, stacks.get() + stack_bytes * (b * state.threads + t),
                             thread_entry);
            }
        }
        error = run_cluster(blocks);
    }
}

// 0, or 1 with a message in launch.error.
inline int run(const Launch& launch, const std::function<void()>& body) {
    std::string error;
    try {
        run_grid(launch, body, error);
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    block = nullptr;
    std::strncpy(launch.error, error.c_str(), launch.error_bytes - 1);
    return error.empty() ? 0 : 1;
}

}  // namespace emulator
