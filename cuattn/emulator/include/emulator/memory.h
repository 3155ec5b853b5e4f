// Memory as the emulator sees it: regions of global memory, and shared memory with a record of who touched each word.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace emulator {

// What a kernel may do with a tensor. It may read all but what is marked.
enum class Use : int32_t {
    input,    // not written
    output,   // each byte written once in all launches
    update,   // each byte written at most once in a launch
    scratch,  // read only where it has been written, written any number of times
};

// A tensor's bytes and, unless it is an input, which block has written each of them last: blocks of all launches are
// numbered from 1, and 0 is nobody.
struct Region {
    const char* name;
    char* begin;
    int64_t bytes;
    uint32_t* writer;
    Use use;
};

struct GlobalMemory {
    const Region* regions = nullptr;
    int count = 0;

    // The first region that holds all of [pointer, pointer + bytes), or null.
    const Region* find(const void* pointer, int64_t bytes) const {
        const char* p = static_cast<const char*>(pointer);
        for (int i = 0; i < count; ++i) {
            if (p >= regions[i].begin && p + bytes <= regions[i].begin + regions[i].bytes) return &regions[i];
        }
        return nullptr;
    }
};

// A thread of the block at one point of its run: __syncthreads passed, and __syncthreads and __syncwarp passed.
struct Moment {
    int thread = -1, block_barriers = 0, warp_barriers = 0;

    int warp() const { return thread / 32; }
    // Whether a barrier that both threads have passed lies between this moment and the later one.
    bool is_before(const Moment& later) const {
        return thread == later.thread || block_barriers < later.block_barriers ||
               (warp() == later.warp() && warp_barriers < later.warp_barriers);
    }
};

// One 4-byte word of shared memory: its last writer, and its readers since the last barrier of the block. Of these the
// lanes matter where they are of one warp, and then since the last barrier of the warp.
class Word {
  public:
    int copies_under_way = 0;

    // Each notes an access; the result says what is wrong with it and is empty for a good one.
    std::string write(const Moment& now) {
        if (copies_under_way > 0) return "a copy to there has not been waited for";
        if (writer_.thread >= 0 && !writer_.is_before(now)) return race("write", writer_.thread);
        if (last_reader_.thread >= 0 && last_reader_.block_barriers == now.block_barriers) {
            const bool same_warp = last_reader_.warp() == now.warp() && !several_warps_;
            const bool same_interval = last_reader_.warp_barriers == now.warp_barriers;
            if (!same_warp || (same_interval && (last_reader_.thread != now.thread || several_lanes_))) {
                return race("read", last_reader_.thread);
            }
        }
        writer_ = now;
        return {};
    }

    std::string read(const Moment& now) {
        if (copies_under_way > 0) return "a copy to there has not been waited for";
        if (writer_.thread < 0) return "never written";
        if (!writer_.is_before(now)) return race("write", writer_.thread);
        const bool other = last_reader_.thread >= 0 && last_reader_.block_barriers == now.block_barriers;
        const bool other_lane = other && last_reader_.warp_barriers == now.warp_barriers;
        several_warps_ = other && (several_warps_ || last_reader_.warp() != now.warp());
        several_lanes_ = other_lane && (several_lanes_ || last_reader_.thread != now.thread);
        last_reader_ = now;
        return {};
    }

  private:
    static std::string race(const char* with, int thread) {
        return std::string("race with a ") + with + " by thread " + std::to_string(thread);
    }

    Moment writer_, last_reader_;
    bool several_warps_ = false, several_lanes_ = false;
};

class SharedMemory {
  public:
    explicit SharedMemory(uint32_t size)
        : size_(size), bytes_(static_cast<char*>(std::aligned_alloc(1024, (size / 1024 + 1) * 1024))) {
        if (!bytes_) throw std::bad_alloc();
    }

    void reset() {
        std::memset(bytes_.get(), 0xff, size_);  // NaN in every format
        words_.assign((size_ + 3) / 4, Word{});
    }

    bool holds(uint32_t address, uint32_t bytes) const { return bytes <= size_ && address <= size_ - bytes; }
    uint32_t size() const { return size_; }
    char* bytes() const { return bytes_.get(); }
    Word& word(uint32_t address) { return words_[address / 4]; }

  private:
    struct Free {
        void operator()(char* pointer) const { std::free(pointer); }
    };

    uint32_t size_;
    std::unique_ptr<char, Free> bytes_;
    std::vector<Word> words_;
};

}  // namespace emulator
