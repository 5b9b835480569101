// Rows of numbers times a packed weight matrix, on one thread.
//
// A matrix of n outputs and k inputs is packed into panels of 32 outputs: [n/32][k/PER_LANE][32][PER_LANE]. A step along k reads
// one run of 128 bytes, so a panel streams through once for up to 12 rows, whose sums all stay in registers (12 x 2 vectors).
#pragma once

#include <algorithm>

#include "vector.h"

namespace mmaas {

constexpr int PANEL = 2 * LANES;
constexpr int MAX_ROWS = 12;
constexpr int64_t PREFETCH_STEPS = 24;  // 3 KiB ahead: what the memory delivers while the hardware's own prefetcher crosses a page

// As Python describes it (`packing.py`). `outputs` is what counts of the n; the rest is padding.
struct Matrix {
    const void* panels;
    const float* bias;    // n numbers, or null
    const float* scales;  // n numbers where the weights are in eight bits (`int8.h`), else null
    int64_t num_panels;
    int64_t inputs;
    int64_t outputs;
};

template <int ROWS, class Sum = Floats>
using Sums = Sum[ROWS][2];

// Two vectors of weights side by side along k, and those that will be read later, which are asked from memory meanwhile.
template <class E>
struct Pair {
    const typename E::Value *low, *high, *low_later, *high_later;
};

// sums[r][v] += x[r] . weights, over `steps` lanes of k.
template <class E, int ROWS>
MMAAS_INLINE void dot(Sums<ROWS, typename E::Sum>& sums, const typename E::Value* x, int64_t x_stride, Pair<E> weights,
                      int64_t weights_step, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = step * weights_step;
        const auto first = E::weights(weights.low + at), second = E::weights(weights.high + at);
        __builtin_prefetch(weights.low_later + at);
        __builtin_prefetch(weights.high_later + at);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const auto* number = x + row * x_stride;
            sums[row][0] = E::multiply_add(sums[row][0], number, first);
            sums[row][1] = E::multiply_add(sums[row][1], number, second);
        }
        x += E::PER_LANE;
    }
}

// Calls f with `rows` as a constant, so that the sums of a tile are registers.
template <class F>
MMAAS_INLINE void with_rows(int rows, F f) {
    switch (rows) {
#define MMAAS_CASE(N) \
    case N: return f(std::integral_constant<int, N>{});
        MMAAS_CASE(1) MMAAS_CASE(2) MMAAS_CASE(3) MMAAS_CASE(4) MMAAS_CASE(5) MMAAS_CASE(6)
        MMAAS_CASE(7) MMAAS_CASE(8) MMAAS_CASE(9) MMAAS_CASE(10) MMAAS_CASE(11) MMAAS_CASE(12)
#undef MMAAS_CASE
    }
}

template <class E, int ROWS>
__attribute__((noinline)) void panel_tile(const typename E::Value* x, int64_t x_stride, const typename E::Value* panel, int64_t steps,
                                          typename E::Number (*out)[PANEL]) {
    Sums<ROWS, typename E::Sum> sums = {};
    constexpr int64_t step = PANEL * E::PER_LANE, half = LANES * E::PER_LANE, later = PREFETCH_STEPS * step;
    dot<E, ROWS>(sums, x, x_stride, {panel, panel + half, panel + later, panel + later + half}, step, steps);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
        store(out[row], sums[row][0]);
        store(out[row] + LANES, sums[row][1]);
    }
}

// A part `rank` of `size` of [0, count), as even as can be.
struct Range {
    int64_t first, last;
    static Range part(int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }
};

// x W' for `num_rows` rows of x, `x_stride` apart. `take(row, panel, sums)` receives 32 sums of one row and may change them.
// Rows go in blocks that stay in the second-level cache while every panel of this thread passes by.
template <class E, class Take>
void products(const Matrix& matrix, const typename E::Value* x, int64_t x_stride, int64_t num_rows, Range panels, Take take) {
    const int64_t steps = matrix.inputs / E::PER_LANE;
    const auto* weights = static_cast<const typename E::Value*>(matrix.panels);
    const int64_t block = std::max<int64_t>(MAX_ROWS, (512 << 10) / (matrix.inputs * int64_t(sizeof *x)) / MAX_ROWS * MAX_ROWS);
    for (int64_t from = 0; from < num_rows; from += block) {
        const int64_t rows = std::min(block, num_rows - from), tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
        for (int64_t panel = panels.first; panel < panels.last; ++panel) {
            const auto* panel_weights = weights + panel * matrix.inputs * PANEL;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const Range part = {from + rows * tile / tiles, from + rows * (tile + 1) / tiles};
                typename E::Number out[MAX_ROWS][PANEL];
                with_rows(int(part.last - part.first), [&](auto count) {
                    panel_tile<E, count>(x + part.first * x_stride, x_stride, panel_weights, steps, out);
                });
                for (int64_t row = part.first; row < part.last; ++row) take(row, panel, out[row - part.first]);
            }
        }
    }
}

// y = x W' + bias. `take(row, panel, numbers)` receives 32 finished numbers of one row and may change them.
template <class E, class Take>
void multiply(const Matrix& matrix, const typename E::Value* x, int64_t x_stride, int64_t num_rows, Range panels, Take take) {
    products<E>(matrix, x, x_stride, num_rows, panels, [&](int64_t row, int64_t panel, float* numbers) {
        if (matrix.bias) {
            const float* bias = matrix.bias + panel * PANEL;
            store(numbers, load<Floats>(numbers) + load<Floats>(bias));
            store(numbers + LANES, load<Floats>(numbers + LANES) + load<Floats>(bias + LANES));
        }
        take(row, panel, numbers);
    });
}

}  // namespace mmaas
