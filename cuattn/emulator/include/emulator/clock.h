// Happens-before, by vector clocks: who knows of what the others have done.
//
// Actors are the lanes of all warps (thread t is actor t), the warpgroups' tensor cores, with 32 numbers each as if they
// were warps too, and the mbarriers, which stand for the copies that they announce. An actor's run is cut into epochs,
// from 1: a thread's ends where it publishes what it did; a tensor core's is a group of products, an mbarrier's a phase.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

// The last epoch of each actor that somebody knows, and the last whose stores to shared memory the tensor cores and the
// copy engine see. What lies behind the end is 0: nothing.
struct Clock {
    std::vector<uint32_t> epochs, fenced;

    static uint32_t at(const std::vector<uint32_t>& of, int actor) {
        return static_cast<size_t>(actor) < of.size() ? of[actor] : 0;
    }
    static void raise(std::vector<uint32_t>& of, int actor, uint32_t epoch) {
        if (of.size() <= static_cast<size_t>(actor)) of.resize(actor + 1, 0);
        of[actor] = std::max(of[actor], epoch);
    }
    void join(const Clock& other) {
        join(epochs, other.epochs);
        join(fenced, other.fenced);
    }

  private:
    static void join(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
        if (mine.size() < other.size()) mine.resize(other.size(), 0);
        for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
    }
};

// Threads that know the same share one.
using Knowledge = std::shared_ptr<const Clock>;

// A thread at one point of its run.
struct Moment {
    int actor = -1;
    uint32_t epoch = 1, fenced = 0;
    Knowledge known = std::make_shared<Clock>();

    bool knows(int other, uint32_t of) const { return other == actor || Clock::at(known->epochs, other) >= of; }
    bool sees_through_proxy(int other, uint32_t of) const {
        return (other == actor ? fenced : Clock::at(known->fenced, other)) >= of;
    }
    // Everything so far, in order with what comes later: an epoch ends.
    void publish(Clock& to) {
        Clock::raise(to.epochs, actor, epoch++);
        if (fenced > 0) Clock::raise(to.fenced, actor, fenced);
    }
};

// What is gathered from many threads; those that know the same in a row count once.
class Gathering {
  public:
    void add(Moment& thread) {
        if (thread.known != last_) {
            clock_.join(*thread.known);
            last_ = thread.known;
        }
        thread.publish(clock_);
    }
    void add_epoch(int actor, uint32_t epoch) { Clock::raise(clock_.epochs, actor, epoch); }
    Knowledge result() const { return std::make_shared<const Clock>(clock_); }

  private:
    Clock clock_;
    Knowledge last_;
};

// Threads that learn the same; those that knew the same before share what they know afterwards.
class Lesson {
  public:
    Lesson() : Lesson(std::make_shared<const Clock>()) {}
    explicit Lesson(Knowledge what) : what_(std::move(what)) {}

    void teach(Moment& thread) {
        if (thread.known != before_) {
            Clock both = *thread.known;
            both.join(*what_);
            before_ = thread.known;
            after_ = std::make_shared<const Clock>(std::move(both));
        }
        thread.known = after_;
    }

  private:
    Knowledge what_, before_, after_;
};

// A barrier: all learn what each of them knows, and end epochs of one number, so that readers of a word can be described
// together.
template <class Threads>
void synchronize(const Threads& threads) {
    uint32_t epoch = 0;
    for (const Moment* thread : threads) epoch = std::max(epoch, thread->epoch);
    Gathering gathering;
    for (Moment* thread : threads) thread->epoch = epoch, gathering.add(*thread);
    const Knowledge all = gathering.result();
    for (Moment* thread : threads) thread->known = all;
}

}  // namespace emulator
