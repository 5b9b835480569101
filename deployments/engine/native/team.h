// A few threads that work on one step together, in lockstep between barriers.
//
// Waiting is a short spin, because the others are usually microseconds away, and then sleep, because the machine also runs a
// gateway and other models: a thread that lost its core must not be waited for by burning another.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "cores.h"
#include "vector.h"

namespace mmaas {

MMAAS_INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team {
  public:
    explicit Team(int size) : size_(size), cores_(size) {
        for (int rank = 1; rank < size; ++rank) threads_.emplace_back([this, rank] { follow(rank); });
    }

    ~Team() {
        work_ = nullptr;
        start();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Every member calls `work(rank)`; returns when all have. Only one caller at a time.
    void run(const std::function<void(int)>& work) {
        const Cores::Visit visit(cores_, 0);
        work_ = &work;
        start();
        work(0);
        barrier();
    }

    // Nobody leaves before all have come; what was written before is seen after.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            wake(round_);
        } else {
            wait(round_, round);
        }
    }

    // The next piece of work that is shared out as it is asked for; `reset_pieces` by one member, between two barriers.
    int64_t next_piece() { return piece_.fetch_add(1, std::memory_order_relaxed); }
    void reset_pieces() { piece_.store(0, std::memory_order_relaxed); }

  private:
    static constexpr int SPINS = 4000;  // some 50 microseconds

    void start() { wake(started_); }

    void follow(int rank) {
        cores_.take(rank);
        for (uint32_t seen = 0;; ++seen) {
            wait(started_, seen);
            if (work_ == nullptr) return;
            (*work_)(rank);
            barrier();
        }
    }

    void wake(std::atomic<uint32_t>& counter) {
        counter.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) counter.notify_all();
    }

    void wait(std::atomic<uint32_t>& counter, uint32_t old) {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (counter.load(std::memory_order_acquire) != old) return;
            relax();
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (counter.load(std::memory_order_seq_cst) == old) counter.wait(old, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

    const int size_;
    const Cores cores_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> started_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<int64_t> piece_{0};
};

}  // namespace mmaas
