// Checked accesses: bounds, uninitialised reads, and races between warps that no block barrier orders.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include <emulator/block.h>

namespace emulator {

inline std::string range(const char* what, unsigned long long address, int bytes) {
    char text[128];
    std::snprintf(text, sizeof text, "%s of %d bytes at 0x%llx", what, bytes, address);
    return text;
}

inline const Region& global_region(const char* what, const void* pointer, int bytes) {
    const auto address = reinterpret_cast<unsigned long long>(pointer);
    if (address % bytes != 0) fail(range(what, address, bytes) + ": misaligned");
    const Region* region = block->global.find(pointer, bytes);
    if (!region) {
        std::string nearest;
        for (int i = 0; i < block->global.count; ++i) {
            const Region& r = block->global.regions[i];
            nearest += std::string(i ? ", " : "") + r.name + " " +
                       std::to_string(static_cast<const char*>(pointer) - r.begin) + " of " + std::to_string(r.bytes);
        }
        fail(range(what, address, bytes) + ": outside of every tensor (offsets: " + nearest + ")");
    }
    return *region;
}

inline void store_global(void* to, const void* from, int bytes) {
    const Region& region = global_region("global store", to, bytes);
    if (!region.written)
        fail(range("global store", reinterpret_cast<unsigned long long>(to), bytes) + ": " + region.name +
             " is an input");
    std::memcpy(to, from, bytes);
    std::memset(region.written + (static_cast<char*>(to) - region.begin), 1, bytes);
}

inline char* shared_bytes(const char* what, uint32_t address, int bytes) {
    if (address % bytes != 0) fail(range(what, address, bytes) + ": misaligned");
    if (address + bytes > block->shared.size) fail(range(what, address, bytes) + ": outside of shared memory");
    return block->shared.bytes + address;
}

// Marks a write by this warp in its current interval between barriers.
inline void note_write(const char* what, uint32_t address, int bytes) {
    const int warp = warp_number(), interval = current().barriers;
    for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
        Word& word = block->shared.words[i];
        if (word.writer >= 0 && word.writer != warp && word.write_interval >= interval) {
            fail(range(what, address, bytes) + ": race with a write by warp " + std::to_string(word.writer));
        }
        if (word.reader != -1 && word.reader != warp && word.read_interval >= interval) {
            fail(range(what, address, bytes) + ": race with a read by another warp");
        }
        word.writer = static_cast<int16_t>(warp), word.write_interval = interval;
    }
}

inline void note_read(const char* what, uint32_t address, int bytes) {
    const int warp = warp_number(), interval = current().barriers;
    for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
        Word& word = block->shared.words[i];
        if (word.copies_under_way) fail(range(what, address, bytes) + ": a copy to there has not been waited for");
        if (word.writer < 0) fail(range(what, address, bytes) + ": never written");
        if (word.writer != warp && word.write_interval >= interval) {
            fail(range(what, address, bytes) + ": race with a write by warp " + std::to_string(word.writer));
        }
        const bool shared_interval = word.read_interval == interval && word.reader != -1 && word.reader != warp;
        word.reader = shared_interval ? int16_t{-2} : static_cast<int16_t>(warp);
        word.read_interval = interval;
    }
}

inline void load_shared(void* to, uint32_t from, int bytes) {
    const char* source = shared_bytes("shared load", from, bytes);
    note_read("shared load", from, bytes);
    std::memcpy(to, source, bytes);
}

inline void store_shared(uint32_t to, const void* from, int bytes) {
    char* target = shared_bytes("shared store", to, bytes);
    note_write("shared store", to, bytes);
    std::memcpy(target, from, bytes);
}

// An asynchronous copy is a write from its start (what others still read must not be overwritten) and again when it
// lands, at the wait; until then nobody may read there.
inline void start_copy(uint32_t to, const void* from, int bytes, bool valid) {
    char* target = shared_bytes("cp.async", to, bytes);
    if (valid) global_region("cp.async", from, bytes);
    note_write("cp.async", to, bytes);
    for (int i = 0; i < bytes / 4; ++i) ++block->shared.words[to / 4 + i].copies_under_way;
    const bool early =
        block->schedule == Schedule::ascending || (block->schedule == Schedule::random && random_number() % 2);
    if (early) valid ? std::memcpy(target, from, bytes) : std::memset(target, 0, bytes);
    current().open_group.push_back({to, valid ? from : nullptr});
}

inline void finish_copies(size_t pending) {
    Thread& me = current();
    while (me.groups.size() > pending) {
        for (const Copy& copy : me.groups.front()) {
            char* target = block->shared.bytes + copy.to;
            copy.from ? std::memcpy(target, copy.from, 16) : std::memset(target, 0, 16);
            for (int i = 0; i < 4; ++i) --block->shared.words[copy.to / 4 + i].copies_under_way;
            note_write("cp.async", copy.to, 16);
        }
        me.groups.erase(me.groups.begin());
    }
}

}  // namespace emulator
