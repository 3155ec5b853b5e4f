// Memory as the emulator sees it: regions of global memory, and shared memory with a record of who touched each word.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace emulator {

// A tensor's bytes. `written`, where given, has one byte for each, set when a kernel writes it.
struct Region {
    const char* name;
    char* begin;
    int64_t bytes;
    char* written;
};

struct GlobalMemory {
    const Region* regions = nullptr;
    int count = 0;

    // The region that holds all of [pointer, pointer + bytes), or null.
    const Region* find(const void* pointer, int64_t bytes) const {
        const char* p = static_cast<const char*>(pointer);
        for (int i = 0; i < count; ++i) {
            if (p >= regions[i].begin && p + bytes <= regions[i].begin + regions[i].bytes) return &regions[i];
        }
        return nullptr;
    }
};

// One 4-byte word of shared memory: the last warp that wrote or read it and how many block barriers it had passed.
struct Word {
    int16_t writer = -1, reader = -1;  // warps; reader -2: several in this interval
    int32_t write_interval = -1, read_interval = -1;
    int16_t copies_under_way = 0;
};

struct SharedMemory {
    char* bytes = nullptr;
    uint32_t size = 0;
    std::vector<Word> words;

    void allocate(uint32_t n) {
        size = n;
        bytes = static_cast<char*>(std::aligned_alloc(1024, (n + 1023) / 1024 * 1024 + 1024));
    }
    void reset() {
        std::memset(bytes, 0xff, size);  // NaN in every format
        words.assign((size + 3) / 4, Word{});
    }
    ~SharedMemory() { std::free(bytes); }
};

}  // namespace emulator
