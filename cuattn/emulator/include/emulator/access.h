// Checked accesses: bounds, alignment, uninitialised reads, and races that no barrier and no launch orders.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include <emulator/block.h>

namespace emulator {

[[noreturn]] inline void fail_access(const char* what, unsigned long long address, int bytes, const std::string& why) {
    char text[128];
    std::snprintf(text, sizeof text, "%s of %d bytes at 0x%llx: ", what, bytes, address);
    fail(text + why);
}

inline const Region& global_region(const char* what, const void* pointer, int bytes) {
    const auto address = reinterpret_cast<unsigned long long>(pointer);
    if (address % bytes != 0) fail_access(what, address, bytes, "misaligned");
    if (block->overlaps && !current().waited) fail_access(what, address, bytes, "before the wait for earlier launches");
    const Region* region = block->global.find(pointer, bytes);
    if (!region) {
        std::string offsets;
        for (int i = 0; i < block->global.count; ++i) {
            const Region& r = block->global.regions[i];
            const auto offset = static_cast<long long>(address - reinterpret_cast<unsigned long long>(r.begin));
            offsets +=
                std::string(i ? ", " : "") + r.name + " " + std::to_string(offset) + " of " + std::to_string(r.bytes);
        }
        fail_access(what, address, bytes, "outside of every tensor (offsets: " + offsets + ")");
    }
    return *region;
}

enum class Access { read, write };

// What is wrong with an access to a byte that block `writer` has written last; null for a good one. Blocks of one launch
// run in no order, so what one of them writes is not for the others, but for those of a cluster that has met.
inline const char* global_error(Access access, Use use, uint32_t writer) {
    const bool this_launch = writer >= block->first_number;
    const bool told = writer == block->number() || (current().met_cluster && block->cluster->has(writer));
    const char* const elsewhere = this_launch && !told ? "has been written there by another block" : nullptr;
    const bool once = (use == Use::output && writer != 0) || (use == Use::update && this_launch);
    if (access == Access::write) return once ? "has been written there before" : elsewhere;
    if (use == Use::scratch && writer == 0) return "has not been written there";
    return use == Use::output ? nullptr : elsewhere;
}

// Checks an access; a write also becomes the last one.
template <Access access>
void note_global(const char* what, const void* pointer, int bytes) {
    const Region& region = global_region(what, pointer, bytes);
    const auto address = reinterpret_cast<unsigned long long>(pointer);
    const auto fail = [&](const char* why) { fail_access(what, address, bytes, std::string(region.name) + ' ' + why); };
    if (!block->stored.empty() && block->stored.count(address / 16)) fail("is being stored there by the copy engine");
    if (!region.writer) {
        if (access == Access::write) fail("is an input");
        return;
    }
    uint32_t* const writer = region.writer + (static_cast<const char*>(pointer) - region.begin);
    for (int i = 0; i < bytes; ++i) {
        if (const char* error = global_error(access, region.use, writer[i])) fail(error);
    }
    if (access == Access::write) std::fill_n(writer, bytes, block->number());
}

inline void load_global(void* to, const void* from, int bytes) {
    note_global<Access::read>("global load", from, bytes);
    std::memcpy(to, from, bytes);
}

inline void store_global(void* to, const void* from, int bytes) {
    note_global<Access::write>("global store", to, bytes);
    std::memcpy(to, from, bytes);
}

inline char* shared_bytes(const char* what, uint32_t address, int bytes) {
    if (address % bytes != 0) fail_access(what, address, bytes, "misaligned");
    if (!block->shared.holds(address, bytes)) fail_access(what, address, bytes, "outside of shared memory");
    return block->shared.bytes() + address;
}

template <Access access>
void note(const char* what, uint32_t address, int bytes) {
    const Moment& now = current().now;
    SharedMemory& shared = block->shared;
    for (uint32_t at = address; at < address + bytes; at += 4) {
        const bool right = access == Access::read ? shared.read(at, now) : shared.write(at, now);
        if (!right) fail_access(what, at, bytes, shared.why(at, now));
    }
}

// A read by the asynchronous proxy, of what a thread with `now` may ask it for.
inline void check_asynchronous_read(const char* what, uint32_t address, const Moment& now) {
    SharedMemory& shared = block->shared;
    const Word& word = shared.word(address);
    if (word.copies_under_way > 0 || word.is_barrier || word.writer < 0 || !now.knows(word.writer, word.epoch)) {
        fail_access(what, address, 4, shared.why(address, now));
    }
    if (word.writer < shared.tensor_core(0) && !now.sees_through_proxy(word.writer, word.epoch)) {
        fail_access(what, address, 4,
                    "a store by thread " + std::to_string(word.writer) +
                        " is not visible to the asynchronous proxy: no fence_async_proxy after it");
    }
}

inline void load_shared(void* to, uint32_t from, int bytes) {
    const char* source = shared_bytes("shared load", from, bytes);
    note<Access::read>("shared load", from, bytes);
    std::memcpy(to, source, bytes);
}

inline void store_shared(uint32_t to, const void* from, int bytes) {
    char* target = shared_bytes("shared store", to, bytes);
    note<Access::write>("shared store", to, bytes);
    std::memcpy(target, from, bytes);
}

inline void land(const Copy& copy) {
    char* target = block->shared.bytes() + copy.to;
    copy.from ? std::memcpy(target, copy.from, copy_bytes) : std::memset(target, 0, copy_bytes);
}

// An asynchronous copy is a write from its start (what others still read must not be overwritten) and again at the wait
// for it; in between nobody may touch its target. Its bytes land at the start or at the wait, as the schedule says.
inline void start_copy(uint32_t to, const void* from, bool valid) {
    shared_bytes("cp.async", to, copy_bytes);
    if (valid) note_global<Access::read>("cp.async", from, copy_bytes);
    note<Access::write>("cp.async", to, copy_bytes);
    for (int i = 0; i < copy_bytes; i += 4) ++block->shared.word(to + i).copies_under_way;
    const Copy copy{to, valid ? from : nullptr};
    if (block->schedule == Schedule::ascending || (block->schedule == Schedule::random && random_number() % 2)) {
        land(copy);
    }
    current().open_group.push_back(copy);
}

// Until `pending` of the thread's committed groups are left.
inline void finish_copies(size_t pending) {
    Thread& me = current();
    while (me.groups.size() > pending) {
        for (const Copy& copy : me.groups.front()) {
            for (int i = 0; i < copy_bytes; i += 4) --block->shared.word(copy.to + i).copies_under_way;
            note<Access::write>("cp.async", copy.to, copy_bytes);
            land(copy);
        }
        me.groups.erase(me.groups.begin());
    }
}

}  // namespace emulator
