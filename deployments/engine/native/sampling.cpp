// A token of each row of logits: the largest, or a draw from what temperature, top-k, top-p and min-p leave of the softmax. Where a
// row has a mask, of what it allows.
//
// `sampler.py` is the specification. No row is sorted: numbers fall into narrow buckets by their distance from the largest, and
// only the bucket in which a limit lies is put in order.
#include <algorithm>
#include <limits>
#include <vector>

#include "linear.h"
#include "team.h"

namespace mmaas {

// As Python describes it (`sampling.py`).
struct Rule {
    double uniform;  // in [0, 1)
    float temperature;  // 0: the largest
    float top_p;
    float min_p;
    int32_t top_k;  // 0: no limit
    const uint32_t* allowed;  // null: all; else column i is if bit i % 32 of word i / 32 is set
    int32_t relents;  // gives some allowed column even where all of them are -inf
};

constexpr int64_t NOT_FINITE = -1;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 512;            // numbers that are added up together
constexpr int BUCKETS = 4096;
constexpr float BUCKETS_PER_NAT = 128.0f;  // the last bucket holds all that is less likely than the best by e^-32

class Row {
  public:
    // Returns the column, or NOT_FINITE where the largest is no number.
    int64_t choose(const float* logits, int64_t size, const Rule& rule) {
        logits_ = logits;
        size_ = size;
        if (rule.allowed && !hold(rule.allowed)) return NOT_FINITE;
        int64_t best = largest_column();
        if (best == NOT_FINITE && rule.allowed && rule.relents) {
            relent(rule.allowed);
            best = largest_column();
        }
        if (best == NOT_FINITE || rule.temperature <= 0) return best;
        most_ = logits_[best];
        slope_ = 1.0f / rule.temperature;
        weigh();
        if (rule.top_k > 0 || rule.top_p < 1) truncate(rule);
        if (rule.min_p > 0)
            for (float& weight : weights_) weight = weight < rule.min_p ? 0.0f : weight;
        return draw(rule.uniform, best);
    }

  private:
    const float* logits_ = nullptr;
    int64_t size_ = 0;
    float most_ = 0, slope_ = 1;
    std::vector<float> held_;        // the logits, -inf where they aren't allowed
    std::vector<float> weights_;     // of each column, the best one's is 1; padded with zeros to whole vectors
    std::vector<uint16_t> buckets_;  // of each column; BUCKETS of one that is hidden
    std::vector<int32_t> edge_;      // columns of the bucket in which a limit lies, best first

    // Hides what isn't allowed. Says whether the row is without a NaN or +inf, allowed or not.
    bool hold(const uint32_t* allowed) {
        held_.resize(size_t(size_));
        Ints sound = ~Ints{};
        int64_t i = 0;
        for (; i + LANES <= size_; i += LANES) {
            const Floats v = load<Floats>(logits_ + i);
            sound &= v < splat(INFINITE);
            store(&held_[i], select(lanes(allowed[i / 32] >> i % 32), v, splat(-INFINITE)));
        }
        for (; i < size_; ++i) {
            sound[0] &= -int32_t(logits_[i] < INFINITE);
            held_[i] = is_set(allowed, i) ? logits_[i] : -INFINITE;
        }
        logits_ = held_.data();
        bool all = true;
        for (int lane = 0; lane < LANES; ++lane) all &= sound[lane] != 0;
        return all;
    }

    void relent(const uint32_t* allowed) {
        for (int64_t i = 0; i < size_; ++i) held_[i] = is_set(allowed, i) ? 0.0f : -INFINITE;
    }

    static bool is_set(const uint32_t* bits, int64_t i) { return bits[i / 32] >> i % 32 & 1; }

    // All ones in the lanes of the bits that are set, from the lowest on.
    static MMAAS_INLINE Ints lanes(uint32_t bits) {
        const Ints OWN = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        return ((int32_t(bits) + Ints{}) & OWN) != 0;
    }

    // The first of the largest.
    int64_t largest_column() const {
        constexpr float HIDDEN = -INFINITE;
        float best = HIDDEN;
        int64_t found = 0;  // the block that it is in
        bool ordered = true;
        for (int64_t from = 0; from < size_; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, size_);
            Floats most = splat(HIDDEN);
            Ints odd = {};
            int64_t i = from;
            for (; i + LANES <= to; i += LANES) {
                const Floats v = load<Floats>(logits_ + i);
                most = select(v > most, v, most);
                odd |= v != v;
            }
            float block = largest(most);
            for (; i < to; ++i) {
                block = logits_[i] > block ? logits_[i] : block;
                odd[0] |= logits_[i] != logits_[i];
            }
            for (int lane = 0; lane < LANES; ++lane) ordered &= !odd[lane];
            if (block > best) {
                best = block;
                found = from;
            }
        }
        if (!ordered || !std::isfinite(best)) return NOT_FINITE;
        while (logits_[found] != best) ++found;
        return found;
    }

    void weigh() {
        weights_.assign(size_t((size_ + LANES - 1) / LANES * LANES), 0.0f);
        const Floats hidden = splat(-INFINITE);
        int64_t i = 0;
        for (; i + LANES <= size_; i += LANES) {
            const Floats v = load<Floats>(logits_ + i);
            store(&weights_[i], select(v == hidden, Floats{}, exp((v - most_) * slope_)));
        }
        for (; i < size_; ++i) weights_[i] = std::exp((logits_[i] - most_) * slope_);
    }

    // Zero for whatever is not among the best `top_k`, nor among the best of these that come before `top_p` of their sum is reached.
    void truncate(const Rule& rule) {
        std::vector<int64_t> counts(BUCKETS);
        std::vector<double> sums(BUCKETS);
        buckets_.resize(size_t(size_));
        for (int64_t i = 0; i < size_; ++i) {
            if (weights_[i] == 0) {
                buckets_[i] = BUCKETS;
                continue;
            }
            const float distance = (most_ - logits_[i]) * (slope_ * BUCKETS_PER_NAT);
            const int bucket = distance < float(BUCKETS - 1) ? int(distance) : BUCKETS - 1;
            buckets_[i] = uint16_t(bucket);
            counts[bucket] += 1;
            sums[bucket] += weights_[i];
        }
        const int64_t most = rule.top_k > 0 ? std::min<int64_t>(rule.top_k, size_) : size_;
        const double kept = rule.top_p * sum_of_best(most, counts, sums);
        // The bucket where the best `most`, or `kept` of the sum, end; and how much came before it.
        int64_t before = 0;
        double sum_before = 0;
        int last = 0;
        while (last < BUCKETS - 1 && before + counts[last] < most && sum_before + sums[last] < kept) {
            before += counts[last];
            sum_before += sums[last];
            ++last;
        }
        order_edge(last);
        size_t stay = 0;
        while (stay < edge_.size() && before + int64_t(stay) < most && (sum_before < kept || before + int64_t(stay) == 0))
            sum_before += weights_[edge_[stay++]];
        for (int64_t i = 0; i < size_; ++i)
            if (buckets_[i] > last) weights_[i] = 0;
        for (size_t i = stay; i < edge_.size(); ++i) weights_[edge_[i]] = 0;
    }

    double sum_of_best(int64_t most, const std::vector<int64_t>& counts, const std::vector<double>& sums) {
        double sum = 0;
        int bucket = 0;
        for (; bucket < BUCKETS && counts[bucket] <= most; ++bucket) {
            sum += sums[bucket];
            most -= counts[bucket];
        }
        if (bucket == BUCKETS || most == 0) return sum;
        order_edge(bucket);
        for (int64_t i = 0; i < most; ++i) sum += weights_[edge_[i]];
        return sum;
    }

    void order_edge(int bucket) {
        edge_.clear();
        for (int64_t i = 0; i < size_; ++i)
            if (buckets_[i] == bucket) edge_.push_back(int32_t(i));
        std::sort(edge_.begin(), edge_.end(), [&](int32_t a, int32_t b) {
            return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
        });
    }

    // The first column at which the sum of the weights passes `uniform` of the whole.
    int64_t draw(double uniform, int64_t best) const {
        const int64_t size = int64_t(weights_.size());
        double total = 0;
        std::vector<double> sums;
        for (int64_t from = 0; from < size; from += BLOCK) {
            Floats sum = {};
            for (int64_t i = from; i < std::min(from + BLOCK, size); i += LANES) sum += load<Floats>(&weights_[i]);
            sums.push_back(mmaas::sum(sum));
            total += sums.back();
        }
        double rest = uniform * total;
        size_t block = 0;
        while (block + 1 < sums.size() && rest >= sums[block]) rest -= sums[block++];
        int64_t chosen = best;  // if rounding leaves nothing
        for (int64_t i = int64_t(block) * BLOCK; i < std::min(int64_t(block + 1) * BLOCK, size_); ++i) {
            if (weights_[i] <= 0) continue;
            chosen = i;
            if (rest < weights_[i]) break;
            rest -= weights_[i];
        }
        return chosen;
    }
};

class Sampler {
  public:
    explicit Sampler(int threads) : team_(threads), rows_(size_t(threads)) {}

    void choose(const float* logits, int64_t num_rows, int64_t size, const Rule* rules, int64_t* tokens) {
        if (num_rows * size < SMALL || num_rows == 1) {
            for (int64_t row = 0; row < num_rows; ++row) tokens[row] = rows_[0].choose(logits + row * size, size, rules[row]);
            return;
        }
        team_.reset_pieces();
        team_.run([&](int rank) {
            for (int64_t row; (row = team_.next_piece()) < num_rows;)
                tokens[row] = rows_[size_t(rank)].choose(logits + row * size, size, rules[row]);
        });
    }

  private:
    static constexpr int64_t SMALL = 1 << 16;  // numbers that one thread is done with before others are awake
    Team team_;
    std::vector<Row> rows_;
};

}  // namespace mmaas

extern "C" {

void* mmaas_sampler_new(int32_t threads) { return new mmaas::Sampler(threads); }

void mmaas_sampler_choose(void* sampler, const float* logits, int64_t num_rows, int64_t size, const mmaas::Rule* rules, int64_t* tokens) {
    static_cast<mmaas::Sampler*>(sampler)->choose(logits, num_rows, size, rules, tokens);
}

void mmaas_sampler_delete(void* sampler) { delete static_cast<mmaas::Sampler*>(sampler); }

}
