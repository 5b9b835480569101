// A core for each thread that works in lockstep with others.
//
// Left to itself Linux keeps two such threads on one core beside an idle one: they sleep for moments, each wakes where the other
// runs, and as long as other processes keep that other core busy now and then, balancing it doesn't seem worth while. Behind a
// gateway on the same two cores a token took twice as long.
#pragma once

#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace mmaas {

#ifdef __linux__

class Cores {
  public:
    // Has one for each thread if this process may run on exactly so many, and else none: others share the machine by plan.
    explicit Cores(int threads) {
        cpu_set_t allowed;
        if (threads < 2 || pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
        if (CPU_COUNT(&allowed) != threads) return;
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (CPU_ISSET(core, &allowed)) cores_.push_back(core);
    }

    // The calling thread runs there from now on. Who may not be moved stays where it is.
    void take(int thread) const {
        if (cores_.empty()) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cores_[size_t(thread)], &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    }

    // The same for a while: what a caller's thread starts afterwards must not be bound.
    class Visit {
      public:
        Visit(const Cores& cores, int thread) : is_bound_(!cores.cores_.empty()) {
            if (!is_bound_) return;
            is_bound_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0;
            if (is_bound_) cores.take(thread);
        }
        ~Visit() {
            if (is_bound_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
        }
        Visit(const Visit&) = delete;
        Visit& operator=(const Visit&) = delete;

      private:
        bool is_bound_;
        cpu_set_t before_;
    };

  private:
    std::vector<int> cores_;
};

#else

class Cores {
  public:
    explicit Cores(int) {}
    void take(int) const {}
    struct Visit {
        Visit(const Cores&, int) {}
    };
};

#endif

}  // namespace mmaas
