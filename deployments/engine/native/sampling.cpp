// A token of each row of logits: the largest, or a draw from what temperature, top-k, top-p and min-p leave of the softmax. Where a
// row has a mask, of what it allows. Before it, penalties and bias; beside it, log probabilities.
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

// What penalties and bias a row gets. Repetition looks at all tokens, frequency and presence at those behind the prompt.
struct Steering {
    float repetition, frequency, presence;
    int32_t num_prompt, num_tokens, num_biased, num_banned;
    const int32_t* tokens;
    const int32_t* biased;
    const float* bias;
    const int32_t* banned;
};

// A row whose log probabilities are asked for, its token, and how many of the best ones.
struct Wanted {
    int64_t row, token, count;
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

// Of a row without a NaN or +inf: the log of a softmax, and its best columns, the first of equals before the others.
class Ranking {
  public:
    void report(const float* logits, int64_t size, const Wanted& wanted, float* own, int64_t* columns, float* best) {
        rank(logits, size, wanted.count);
        const float least = float(log_of_sum(logits, size));
        *own = logits[wanted.token] - least;
        for (size_t place = 0; place < ranks_.size(); ++place) {
            columns[place] = ranks_[place];
            best[place] = logits[ranks_[place]] - least;
        }
    }

  private:
    std::vector<int64_t> ranks_;  // best first

    // One pass, which looks at a column alone only where it is better than the last of the best so far.
    void rank(const float* logits, int64_t size, int64_t count) {
        ranks_.clear();
        if (count == 0) return;
        float least = -INFINITE;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            if (int64_t(ranks_.size()) == count && !any(load<Floats>(logits + i) > splat(least))) continue;
            for (int64_t column = i; column < i + LANES; ++column) least = insert(logits, column, count);
        }
        for (; i < size; ++i) least = insert(logits, i, count);
    }

    // Returns the last of the best.
    float insert(const float* logits, int64_t column, int64_t count) {
        if (int64_t(ranks_.size()) == count) {
            if (!(logits[column] > logits[ranks_.back()])) return logits[ranks_.back()];
            ranks_.pop_back();
        }
        auto after = std::upper_bound(ranks_.begin(), ranks_.end(), column, [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
        ranks_.insert(after, column);
        return logits[ranks_.back()];
    }

    static double log_of_sum(const float* logits, int64_t size) {
        Floats highest = splat(-INFINITE);
        float most = -INFINITE;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Floats v = load<Floats>(logits + i);
            highest = select(v > highest, v, highest);
        }
        for (; i < size; ++i) most = std::max(most, logits[i]);
        most = std::max(most, largest(highest));
        double total = 0;
        for (int64_t from = 0; from < size; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, size);
            Floats part = {};
            for (i = from; i + LANES <= to; i += LANES) part += exp(load<Floats>(logits + i) - most);
            total += sum(part);
            for (; i < to; ++i) total += std::exp(logits[i] - most);
        }
        return most + std::log(total);
    }

    static MMAAS_INLINE bool any(Ints mask) {
        int32_t found = 0;
        for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
        return found != 0;
    }
};

class Sampler {
  public:
    explicit Sampler(int threads) : team_(threads), rows_(size_t(threads)), rankings_(size_t(threads)) {}

    // Says whether the row was finite.
    bool adjust(float* logits, int64_t size, const Steering& steering) {
        const bool sound = is_sound(logits, size);
        const int32_t* const end = steering.tokens + steering.num_tokens;
        counts_.resize(size_t(size));  // zeros, between calls too
        if (steering.repetition != 1)
            each_once(steering.tokens, end, size, [&](int32_t token, int32_t) {
                logits[token] = logits[token] > 0 ? logits[token] / steering.repetition : logits[token] * steering.repetition;
            });
        if (steering.frequency != 0 || steering.presence != 0)
            each_once(std::min(steering.tokens + steering.num_prompt, end), end, size, [&](int32_t token, int32_t times) {
                logits[token] -= float(double(times) * steering.frequency + steering.presence);
            });
        for (int32_t i = 0; i < steering.num_biased; ++i)
            if (is_column(steering.biased[i], size)) logits[steering.biased[i]] += steering.bias[i];
        for (int32_t i = 0; i < steering.num_banned; ++i)
            if (is_column(steering.banned[i], size)) logits[steering.banned[i]] = -INFINITE;
        return sound;
    }

    // `own`: one for each of `wanted`; `columns` and `best`: `most` for each.
    void report(
        const float* logits, int64_t size, int64_t num, int64_t most, const Wanted* wanted, float* own, int64_t* columns, float* best
    ) {
        auto one = [&](int rank, int64_t i) {
            rankings_[size_t(rank)].report(
                logits + wanted[i].row * size, size, wanted[i], own + i, columns + i * most, best + i * most
            );
        };
        each_row(num, size, one);
    }

    void choose(const float* logits, int64_t num_rows, int64_t size, const Rule* rules, int64_t* tokens) {
        each_row(num_rows, size, [&](int rank, int64_t row) {
            tokens[row] = rows_[size_t(rank)].choose(logits + row * size, size, rules[row]);
        });
    }

  private:
    static constexpr int64_t SMALL = 1 << 16;  // numbers that one thread is done with before others are awake
    Team team_;
    std::vector<Row> rows_;
    std::vector<Ranking> rankings_;
    std::vector<int32_t> counts_;  // by column, of the row that is adjusted

    // No NaN, no +inf, and something above -inf.
    static bool is_sound(const float* logits, int64_t size) {
        Ints sound = ~Ints{}, alive = {};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Floats v = load<Floats>(logits + i);
            sound &= v < splat(INFINITE);
            alive |= v > splat(-INFINITE);
        }
        for (; i < size; ++i) {
            sound[0] &= -int32_t(logits[i] < INFINITE);
            alive[0] |= -int32_t(logits[i] > -INFINITE);
        }
        bool all = true, some = false;
        for (int lane = 0; lane < LANES; ++lane) {
            all &= sound[lane] != 0;
            some |= alive[lane] != 0;
        }
        return all && some;
    }

    static bool is_column(int32_t token, int64_t size) { return token >= 0 && token < size; }

    // `change` with each different token and how often it is there.
    template <class Change>
    void each_once(const int32_t* begin, const int32_t* end, int64_t size, Change change) {
        for (const int32_t* token = begin; token < end; ++token)
            if (is_column(*token, size)) ++counts_[size_t(*token)];
        for (const int32_t* token = begin; token < end; ++token) {
            if (!is_column(*token, size) || !counts_[size_t(*token)]) continue;
            change(*token, counts_[size_t(*token)]);
            counts_[size_t(*token)] = 0;
        }
    }

    // `work` with a thread's number and a row's; on one thread where waking others would take longer.
    template <class Work>
    void each_row(int64_t num_rows, int64_t size, Work work) {
        if (num_rows * size < SMALL || num_rows == 1) {
            for (int64_t row = 0; row < num_rows; ++row) work(0, row);
            return;
        }
        team_.reset_pieces();
        team_.run([&](int rank) {
            for (int64_t row; (row = team_.next_piece()) < num_rows;) work(rank, row);
        });
    }
};

}  // namespace mmaas

extern "C" {

void* mmaas_sampler_new(int32_t threads) { return new mmaas::Sampler(threads); }

void mmaas_sampler_choose(void* sampler, const float* logits, int64_t num_rows, int64_t size, const mmaas::Rule* rules, int64_t* tokens) {
    static_cast<mmaas::Sampler*>(sampler)->choose(logits, num_rows, size, rules, tokens);
}

int32_t mmaas_sampler_adjust(void* sampler, float* logits, int64_t size, const mmaas::Steering* steering) {
    return static_cast<mmaas::Sampler*>(sampler)->adjust(logits, size, *steering);
}

void mmaas_sampler_report(
    void* sampler, const float* logits, int64_t size, int64_t num, int64_t most, const mmaas::Wanted* wanted, float* own, int64_t* columns,
    float* best
) {
    static_cast<mmaas::Sampler*>(sampler)->report(logits, size, num, most, wanted, own, columns, best);
}

void mmaas_sampler_delete(void* sampler) { delete static_cast<mmaas::Sampler*>(sampler); }

}
