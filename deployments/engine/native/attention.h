// Attention over paged keys and values, on one thread: a few query rows of one key/value head against a sequence's pages.
//
// Pages are kept the way `dot` reads weights, so that scores and mixing are the same product as every linear layer:
//     keys    [block][head][block_size/16][head_size/PER_LANE][16][PER_LANE]   a panel has 16 positions as outputs
//     values  [block][head][block_size/PER_LANE][value_width/16][16][PER_LANE] a step along k is one lane of positions
// Everything is summed in float32; queries and, after the softmax, weights are rounded to the model's own type.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "linear.h"

namespace mmaas {

struct Pages {
    int64_t block_size;  // a multiple of 16
    int64_t heads;       // key/value heads
    int64_t head_size;   // a multiple of 32
    const int32_t* table;

    int64_t head_numbers() const { return block_size * head_size; }
    int64_t at(int64_t block, int64_t head) const { return (table[block] * heads + head) * head_numbers(); }
};

template <class E>
void write_key(typename E::Value* page, int64_t head_size, int64_t offset, const float* key) {
    constexpr int per = E::PER_LANE;
    auto* group = page + offset / LANES * LANES * head_size + offset % LANES * per;
    typename E::Value numbers[LANES];
    for (int64_t i = 0; i < head_size; i += LANES) {
        E::narrow(numbers, load<Floats>(key + i));
        for (int j = 0; j < LANES; ++j) group[(i + j) / per * LANES * per + j % per] = numbers[j];
    }
}

// `is_last`: nothing of the sequence follows yet. Then the rest of the lane is cleared: a weight of zero times what an earlier
// owner of the block left there would be NaN if that was not finite.
template <class E>
void write_value(typename E::Value* page, int64_t head_size, int64_t offset, const float* value, bool is_last) {
    constexpr int per = E::PER_LANE;
    auto* row = page + offset / per * head_size * per + offset % per;
    const bool clear = is_last && per == 2 && offset % 2 == 0;
    typename E::Value numbers[LANES];
    for (int64_t i = 0; i < head_size; i += LANES) {
        E::narrow(numbers, load<Floats>(value + i));
        for (int j = 0; j < LANES; ++j) {
            row[(i + j) * per] = numbers[j];
            if (clear) row[(i + j) * per + 1] = 0;
        }
    }
}

struct Softmax {
    float scale;
    float softcap;   // 0: none
    int64_t window;  // positions that a token sees, itself included; 0: all
};

// scores[r][p] of positions [first, last), both multiples of 16, for ROWS queries.
template <class E, int ROWS>
void score(const typename E::Value* queries, int64_t query_stride, const typename E::Value* keys, const Pages& pages, int64_t head,
           int64_t first, int64_t last, float* scores, int64_t scores_stride) {
    const int64_t steps = pages.head_size / E::PER_LANE, group = LANES * pages.head_size;
    auto panel = [&](int64_t position) {
        position = std::min(position, last - LANES);
        return keys + pages.at(position / pages.block_size, head) + position % pages.block_size / LANES * group;
    };
    for (int64_t position = first; position < last; position += PANEL) {
        const bool both = position + LANES < last;
        const int64_t next = position + PANEL;
        Sums<ROWS> sums = {};
        dot<E, ROWS>(sums, queries, query_stride, {panel(position), panel(position + LANES), panel(next), panel(next + LANES)},
                     LANES * E::PER_LANE, steps);
        for (int row = 0; row < ROWS; ++row) {
            float* to = scores + row * scores_stride + position - first;
            store(to, sums[row][0]);
            if (both) store(to + LANES, sums[row][1]);
        }
    }
}

// Turn one row's scores of positions [first, last) into weights in place of type E; returns what they sum to. Only [from, to) is
// seen.
template <class E>
float soften(float* scores, typename E::Value* weights, int64_t first, int64_t last, int64_t from, int64_t to, const Softmax& rule) {
    constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
    for (int64_t position = first; position < from; ++position) scores[position - first] = HIDDEN;
    for (int64_t position = to; position < last; ++position) scores[position - first] = HIDDEN;
    Floats most = splat(HIDDEN);
    for (int64_t i = 0; i < last - first; i += LANES) {
        Floats s = load<Floats>(scores + i);
        if (rule.softcap > 0) {
            Floats capped = tanh(s * (rule.scale / rule.softcap)) * rule.softcap;
            s = select(s == HIDDEN, s, capped);
        } else {
            s *= rule.scale;
        }
        store(scores + i, s);
        most = select(s > most, s, most);
    }
    const Floats top = splat(largest(most));
    Floats total = {};
    for (int64_t i = 0; i < last - first; i += LANES) {
        Floats s = load<Floats>(scores + i);
        Floats weight = select(s == HIDDEN, Floats{}, exp(s - top));
        total += weight;
        E::narrow(weights + i, weight);
    }
    return sum(total);
}

// out[r] = weights[r] . values over positions [first, last), divided by the row's total. Says whether all of it is finite.
template <class E, int ROWS>
bool mix(const typename E::Value* weights, int64_t weights_stride, const typename E::Value* values, const Pages& pages, int64_t head,
         int64_t first, int64_t last, const float* totals, typename E::Value* const* out) {
    constexpr int per = E::PER_LANE;
    Floats doubt = {};  // stays zero: nothing but finite numbers are zero times themselves
    for (int64_t column = 0; column < pages.head_size; column += PANEL) {
        Sums<ROWS> sums = {};
        for (int64_t position = first; position < last;) {
            const int64_t offset = position % pages.block_size, count = std::min(pages.block_size - offset, last - position);
            const auto* low = values + pages.at(position / pages.block_size, head) + offset * pages.head_size + column * per;
            const auto* later = values + pages.at(std::min(position + count, last - 1) / pages.block_size, head) + column * per;
            dot<E, ROWS>(sums, weights + position - first, weights_stride, {low, low + LANES * per, later, later + LANES * per},
                         pages.head_size * per, count / per);
            position += count;
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const float scale = 1.0f / totals[row];
            E::narrow(out[row] + column, sums[row][0] * scale);
            E::narrow(out[row] + column + LANES, sums[row][1] * scale);
            doubt += (sums[row][0] + sums[row][1]) * 0.0f;
        }
    }
    return sum(doubt) == 0;
}

// The same for one row and no position but [from, to), number by number. A product over a tile multiplies what others of its rows
// see by a weight of zero, which is NaN if that was not finite: then this is what keeps it from those who stand before it.
template <class E>
void mix_alone(const typename E::Value* weights, const typename E::Value* values, const Pages& pages, int64_t head, int64_t from,
               int64_t to, float total, typename E::Value* out) {
    constexpr int per = E::PER_LANE;
    for (int64_t column = 0; column < pages.head_size; column += LANES) {
        Floats sums = {};
        for (int64_t position = from; position < to; ++position) {
            const int64_t offset = position % pages.block_size;
            const auto* row = values + pages.at(position / pages.block_size, head) + offset / per * pages.head_size * per + offset % per;
            typename E::Value numbers[LANES], weight[LANES] = {weights[position - from]};
            for (int i = 0; i < LANES; ++i) numbers[i] = row[(column + i) * per];
            sums += E::widen(numbers) * E::widen(weight)[0];
        }
        E::narrow(out + column, sums * (1.0f / total));
    }
}

// Scores and weights of one tile of rows. Made large enough before the threads start.
template <class E>
struct Scratch {
    std::vector<float> scores;
    std::vector<typename E::Value> weights;

    void hold(int64_t positions) {
        const int64_t padded = positions + PANEL;
        if (int64_t(scores.size()) < padded * MAX_ROWS) {
            scores.resize(padded * MAX_ROWS);
            weights.resize(padded * MAX_ROWS);
        }
    }
};

// One tile: ROWS query rows of a head. `positions[r]` is the row's own place in its sequence: it sees that and what is before.
template <class E, int ROWS>
void attend(const typename E::Value* queries, int64_t query_stride, const int64_t* positions, typename E::Value* const* out,
            const typename E::Value* keys, const typename E::Value* values, const Pages& pages, int64_t head, const Softmax& rule,
            Scratch<E>& scratch) {
    const auto [lowest, highest] = std::minmax_element(positions, positions + ROWS);
    auto start_of = [&](int64_t position) { return rule.window > 0 ? std::max<int64_t>(0, position + 1 - rule.window) : 0; };
    const int64_t first = start_of(*lowest) / LANES * LANES, last = (*highest / LANES + 1) * LANES, stride = last - first + LANES;
    score<E, ROWS>(queries, query_stride, keys, pages, head, first, last, scratch.scores.data(), stride);
    float totals[ROWS];
    for (int row = 0; row < ROWS; ++row)
        totals[row] = soften<E>(scratch.scores.data() + row * stride, scratch.weights.data() + row * stride, first, last,
                                start_of(positions[row]), positions[row] + 1, rule);
    const int64_t written = (*highest / E::PER_LANE + 1) * E::PER_LANE;
    const bool sound = mix<E, ROWS>(scratch.weights.data(), stride, values, pages, head, first, written, totals, out);
    if (sound || *lowest == *highest) return;
    for (int row = 0; row < ROWS; ++row) {
        const int64_t from = start_of(positions[row]);
        mix_alone<E>(scratch.weights.data() + row * stride + from - first, values, pages, head, from, positions[row] + 1, totals[row],
                     out[row]);
    }
}

}  // namespace mmaas
