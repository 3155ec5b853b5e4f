// Memory as the emulator sees it: regions of global memory, and shared memory with a record of who touched each word.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include <emulator/clock.h>

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

// One 4-byte word of shared memory: what is under way there, who wrote it last, and which warps (or tensor cores) have
// read it since then.
struct Word {
    uint16_t copies_under_way = 0, products_under_way = 0, stores_under_way = 0;  // to there; that read there
    bool is_barrier = false;
    int writer = -1;  // actors as in clock.h
    uint32_t epoch = 0;
    uint64_t readers = 0;
};

// The lanes of one warp that have read a word since its last write, but for those that later ones knew of, and the epoch
// they did it in; 0 where they differ.
struct Readers {
    uint32_t lanes, epoch;
};

class SharedMemory {
  public:
    SharedMemory(uint32_t size, int threads)
        : size_(size),
          warps_((threads + 31) / 32),
          warpgroups_(threads / 128),
          bytes_(static_cast<char*>(std::aligned_alloc(1024, (size / 1024 + 1) * 1024))),
          readers_(new Readers[(size + 3) / 4 * size_t(warps_ + warpgroups_)]) {
        if (!bytes_) throw std::bad_alloc();
    }

    void reset() {
        std::memset(bytes_.get(), 0xff, size_);  // NaN in every format
        words_.assign((size_ + 3) / 4, Word{});
        uneven_.clear();
    }

    bool holds(uint32_t address, uint32_t bytes) const { return bytes <= size_ && address <= size_ - bytes; }
    uint32_t size() const { return size_; }
    char* bytes() const { return bytes_.get(); }
    Word& word(uint32_t address) { return words_[address / 4]; }

    int tensor_core(int warpgroup) const { return 32 * (warps_ + warpgroup); }
    int mbarrier(int number) const { return 32 * (warps_ + warpgroups_) + number; }

    // Each notes an access, or returns false where it is wrong; why() says what is.
    bool read(uint32_t address, const Moment& now) {
        const Word& w = word(address);
        if (w.copies_under_way > 0 || w.is_barrier || w.writer < 0 || !now.knows(w.writer, w.epoch)) return false;
        note_reader(address, now);
        return true;
    }
    bool write(uint32_t address, const Moment& now) {
        Word& w = word(address);
        if (w.copies_under_way > 0 || w.products_under_way > 0 || w.stores_under_way > 0 || w.is_barrier) return false;
        if ((w.writer >= 0 && !now.knows(w.writer, w.epoch)) || unknown_reader(address, now) >= 0) return false;
        w.writer = now.actor, w.epoch = now.epoch, w.readers = 0;
        return true;
    }
    void note_reader(uint32_t address, const Moment& now) {
        const int source = now.actor / 32, lane = now.actor % 32;
        Word& w = word(address);
        Readers& r = readers(address, source);
        if (!(w.readers >> source & 1) || unknown_lane(r, source, now) < 0) {
            r = {1u << lane, now.epoch};
        } else if (r.epoch == now.epoch) {
            r.lanes |= 1u << lane;
        } else {
            auto& epochs = uneven_[&r];
            if (r.epoch != 0) epochs.fill(r.epoch);
            epochs[lane] = now.epoch;
            r = {r.lanes | 1u << lane, 0};
        }
        w.readers |= uint64_t{1} << source;
    }

    std::string why(uint32_t address, const Moment& now) {
        const Word& w = word(address);
        if (w.is_barrier) return "is an mbarrier";
        if (w.copies_under_way > 0) return "a copy to there has not been waited for";
        if (w.products_under_way > 0) return "wgmma still reads there";
        if (w.stores_under_way > 0) return "a store from there has not been waited for";
        if (w.writer < 0) return "never written";
        if (w.writer >= mbarrier(0)) return "a copy to there has not been waited for";
        if (!now.knows(w.writer, w.epoch)) return "race with a write by " + name(w.writer);
        return "race with a read by " + name(unknown_reader(address, now));
    }

  private:
    struct Free {
        void operator()(char* pointer) const { std::free(pointer); }
    };

    Readers& readers(uint32_t address, int source) {
        return readers_[address / 4 * size_t(warps_ + warpgroups_) + source];
    }
    int unknown_lane(const Readers& r, int source, const Moment& now) const {
        for (uint32_t left = r.lanes; left != 0; left &= left - 1) {
            const int lane = __builtin_ctz(left), actor = 32 * source + lane;
            if (!now.knows(actor, r.epoch != 0 ? r.epoch : uneven_.at(&r)[lane])) return actor;
        }
        return -1;
    }
    int unknown_reader(uint32_t address, const Moment& now) {
        for (uint64_t left = word(address).readers; left != 0; left &= left - 1) {
            const int source = __builtin_ctzll(left), actor = unknown_lane(readers(address, source), source, now);
            if (actor >= 0) return actor;
        }
        return -1;
    }
    std::string name(int actor) const {
        const int warpgroup = actor / 32 - warps_;
        return warpgroup < 0 ? "thread " + std::to_string(actor) : "wgmma of warpgroup " + std::to_string(warpgroup);
    }

    uint32_t size_;
    int warps_, warpgroups_;
    std::unique_ptr<char, Free> bytes_;
    std::vector<Word> words_;
    std::unique_ptr<Readers[]> readers_;
    std::unordered_map<const Readers*, std::array<uint32_t, 32>> uneven_;  // epochs by lane
};

}  // namespace emulator
