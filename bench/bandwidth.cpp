// Reads memory as fast as the cores can: what a decode step could do at best, as it reads every weight once.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Eight sums, so that no addition waits for the one before; the compiler makes vectors of them.
uint64_t sum(const uint64_t* words, size_t count) {
    uint64_t sums[32] = {};
    for (size_t at = 0; at + 32 <= count; at += 32)
        for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[at + lane];
    uint64_t all = 0;
    for (uint64_t one : sums) all += one;
    return all;
}

}  // namespace

// Bytes per second over `rounds` readings of the whole buffer, each thread its own contiguous part. `sink` keeps the sums alive.
extern "C" double read_bandwidth(const uint64_t* words, size_t count, int threads, int rounds, uint64_t* sink) {
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
    std::vector<std::thread> readers;
    const size_t part = count / static_cast<size_t>(threads) / 32 * 32;
    const auto began = std::chrono::steady_clock::now();
    for (int thread = 0; thread < threads; ++thread)
        readers.emplace_back([=, &sums] {
            for (int round = 0; round < rounds; ++round)
                sums[static_cast<size_t>(thread) * 8] += sum(words + part * static_cast<size_t>(thread), part);
        });
    for (std::thread& reader : readers) reader.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    for (uint64_t one : sums) *sink += one;
    return static_cast<double>(part) * 8.0 * threads * rounds / took.count();
}
