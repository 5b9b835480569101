// A whole pass of a BERT-like encoder in one call: rows of different lengths one behind the other, nothing padded.
//
// The layers are those of Devlin et al. 2018: attention over the whole row, then two linear layers, each followed by the sum with
// its input and a LayerNorm. MPNet (Song et al. 2020) adds a number to each score that depends on head and distance. With many rows
// each thread takes a group of rows through all layers by itself; with few, all threads work on the same rows between barriers.
//
// Every linear layer, scores and mixing are one product: up to 12 rows times a panel of 32 outputs, [k/PER_LANE][32][PER_LANE].
#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "team.h"
#include "vector.h"

using namespace mmaas;

extern "C" {

struct EncoderMatrix {  // panels of `outputs` / 32, a bias of `outputs` numbers; both sizes are multiples of 32
    const void* panels;
    const float* bias;
    int64_t inputs, outputs;
};

struct EncoderNorm {
    const float *weight, *bias;
};

struct EncoderLayer {
    EncoderMatrix attention_in, attention_out, mlp_in, mlp_out;
    EncoderNorm attention_norm, mlp_norm;
};

struct EncoderModel {
    const EncoderLayer* layers;
    int64_t num_layers, hidden, heads, head_size, activation, is_float32;
    const void *words, *positions, *types;  // types: null where there are none
    const float* distances;                 // [heads][2 * max_distance - 1], or null
    int64_t max_distance;
    EncoderNorm norm;
    float eps;
    int32_t threads;
};

struct EncoderBatch {
    const int32_t *tokens, *positions, *types;
    const int64_t* starts;  // of each row, and the end of the last
    int64_t num_rows;
    float* out;  // hidden states of every token
};
}

namespace {

constexpr int PANEL = 2 * LANES, MAX_ROWS = 12;
constexpr int64_t GROUP = 128;       // tokens that one thread takes through all layers: they stay near it
constexpr int64_t NEAR = 384 << 10;  // bytes of inputs that are kept in the second-level cache while the panels pass by
constexpr int OUT_OF_MEMORY = -2;

enum Activation : int64_t { GELU = 0, GELU_TANH = 1, RELU = 2, SILU = 3 };

// erf to 1.5e-7 (Abramowitz & Stegun 7.1.26).
MMAAS_INLINE Floats erf(Floats x) {
    const Floats size = select(x < Floats{}, -x, x), t = 1.0f / (1.0f + 0.3275911f * size);
    Floats p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Floats result = 1.0f - p * t * exp(-(size * size));
    return select(x < Floats{}, -result, result);
}

MMAAS_INLINE Floats activate(Activation kind, Floats x) {
    switch (kind) {
        case GELU: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
        case GELU_TANH: return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
        case RELU: return select(x > Floats{}, x, Floats{});
        default: return x / (1.0f + exp(-x));
    }
}

using Tile = float[MAX_ROWS][PANEL];

template <class E, int ROWS>
__attribute__((noinline)) void tile(const typename E::Value* x, int64_t x_stride, const typename E::Value* panel, int64_t steps,
                                    Tile& out) {
    Floats sums[ROWS][2] = {};
    for (int64_t step = 0; step < steps; ++step) {
        const auto first = E::weights(panel), second = E::weights(panel + LANES * E::PER_LANE);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            sums[row][0] = E::multiply_add(sums[row][0], x + row * x_stride, first);
            sums[row][1] = E::multiply_add(sums[row][1], x + row * x_stride, second);
        }
        x += E::PER_LANE;
        panel += PANEL * E::PER_LANE;
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
        store(out[row], sums[row][0]);
        store(out[row] + LANES, sums[row][1]);
    }
}

template <class E>
MMAAS_INLINE void any_tile(int64_t rows, const typename E::Value* x, int64_t x_stride, const typename E::Value* panel, int64_t steps,
                           Tile& out) {
    switch (rows) {
#define MMAAS_CASE(N) \
    case N: return tile<E, N>(x, x_stride, panel, steps, out);
        MMAAS_CASE(1) MMAAS_CASE(2) MMAAS_CASE(3) MMAAS_CASE(4) MMAAS_CASE(5) MMAAS_CASE(6)
        MMAAS_CASE(7) MMAAS_CASE(8) MMAAS_CASE(9) MMAAS_CASE(10) MMAAS_CASE(11) MMAAS_CASE(12)
#undef MMAAS_CASE
    }
}

struct Span {
    int64_t first, last;
    int64_t size() const { return last - first; }
    Span part(int64_t rank, int64_t count) const { return {first + size() * rank / count, first + size() * (rank + 1) / count}; }
};

// Calls f(span) for spans of at most MAX_ROWS, as even as can be.
template <class F>
MMAAS_INLINE void in_tiles(Span rows, F f) {
    const int64_t tiles = (rows.size() + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t i = 0; i < tiles; ++i) f(rows.part(i, tiles));
}

// take(row, column, sums): 32 numbers of x W' + bias.
template <class E, class Take>
void multiply(const EncoderMatrix& matrix, const typename E::Value* x, Span rows, Take take) {
    const int64_t steps = matrix.inputs / E::PER_LANE;
    const auto* weights = static_cast<const typename E::Value*>(matrix.panels);
    const int64_t block = std::max<int64_t>(MAX_ROWS, NEAR / (matrix.inputs * int64_t(sizeof *x)) / MAX_ROWS * MAX_ROWS);
    for (int64_t from = rows.first; from < rows.last; from += block) {
        const Span near = {from, std::min(rows.last, from + block)};
        for (int64_t column = 0; column < matrix.outputs; column += PANEL) {
            const Floats low = load<Floats>(matrix.bias + column), high = load<Floats>(matrix.bias + column + LANES);
            in_tiles(near, [&](Span part) {
                Tile sums;
                any_tile<E>(part.size(), x + part.first * matrix.inputs, matrix.inputs, weights + column * matrix.inputs, steps, sums);
                for (int64_t row = part.first; row < part.last; ++row) {
                    const float* numbers = sums[row - part.first];
                    take(row, column, load<Floats>(numbers) + low, load<Floats>(numbers + LANES) + high);
                }
            });
        }
    }
}

// x := LayerNorm(x) (Ba et al. 2016); also written to `copy` in the model's own type.
template <class E>
MMAAS_INLINE void layer_norm(float* x, const EncoderNorm& norm, int64_t size, float eps, typename E::Value* copy) {
    Floats total = {}, squares = {};
    for (int64_t i = 0; i < size; i += LANES) total += load<Floats>(x + i);
    const Floats mean = splat(sum(total) / float(size));
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats off = load<Floats>(x + i) - mean;
        squares += off * off;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats y = (load<Floats>(x + i) - mean) * scale * load<Floats>(norm.weight + i) + load<Floats>(norm.bias + i);
        store(x + i, y);
        E::narrow(copy + i, y);
    }
}

// What lies between the layers, for some rows one behind the other.
template <class E>
struct Space {
    using Value = typename E::Value;
    std::vector<float> states;  // the residual stream
    std::vector<Value> inputs, queries, mixed, middle;

    void hold(int64_t tokens, const EncoderModel& model) {
        const auto grow = [](auto& numbers, int64_t count) {
            if (int64_t(numbers.size()) < count) numbers.resize(count);
        };
        grow(states, tokens * model.hidden);
        grow(inputs, tokens * model.hidden);
        grow(queries, tokens * model.layers[0].attention_in.outputs);
        grow(mixed, tokens * model.hidden);
        grow(middle, tokens * model.layers[0].mlp_in.outputs);
    }
};

// One head of one row, as panels.
template <class E>
struct Head {
    std::vector<typename E::Value> keys, values, weights;
    std::vector<float> scores;

    void hold(int64_t length, int64_t head_size) {
        const int64_t padded = (length + PANEL - 1) / PANEL * PANEL;
        if (int64_t(keys.size()) < padded * head_size) {
            keys.resize(padded * head_size);
            values.resize(padded * head_size);
        }
        if (int64_t(scores.size()) < padded * MAX_ROWS) {
            scores.resize(padded * MAX_ROWS);
            weights.resize(padded * MAX_ROWS);
        }
    }
};

template <class E>
class Encoder {
    using Value = typename E::Value;
    static constexpr int PER = E::PER_LANE;

  public:
    explicit Encoder(const EncoderModel& model) : model_(model), team_(model.threads), spaces_(model.threads), heads_(model.threads) {}

    void run(const EncoderBatch& batch) {
        batch_ = &batch;
        int64_t longest = 0;
        groups_.assign(1, 0);
        for (int64_t row = 0; row < batch.num_rows; ++row) {
            longest = std::max(longest, batch.starts[row + 1] - batch.starts[row]);
            if (row > groups_.back() && batch.starts[row + 1] - batch.starts[groups_.back()] > GROUP) groups_.push_back(row);
        }
        groups_.push_back(batch.num_rows);
        const int64_t count = int64_t(groups_.size()) - 1, tokens = batch.starts[batch.num_rows];
        const bool apart = team_.size() == 1 || count >= 3 * team_.size();
        for (auto& head : heads_) head.hold(longest, model_.head_size);
        if (apart)
            for (auto& space : spaces_) space.hold(std::max(GROUP, longest), model_);
        else
            spaces_[0].hold(tokens, model_);
        team_.reset_pieces();
        team_.run([&](int rank) { apart ? run_groups(rank, count) : run_together(rank); });
    }

  private:
    void run_groups(int rank, int64_t count) {
        for (int64_t group; (group = team_.next_piece()) < count;) {
            const Span rows = {groups_[group], groups_[group + 1]};
            const int64_t start = batch_->starts[rows.first];
            const Span tokens = {0, batch_->starts[rows.last] - start};
            Space<E>& space = spaces_[rank];
            embed(space, tokens, start);
            for (int64_t i = 0; i < model_.num_layers; ++i) {
                project(model_.layers[i], space, tokens);
                for (int64_t piece = 0; piece < rows.size() * model_.heads; ++piece) attend(space, rows, piece, start, heads_[rank]);
                finish(model_.layers[i], space, tokens);
            }
            give(space, tokens, start);
        }
    }

    void run_together(int rank) {
        const Span rows = {0, batch_->num_rows}, mine = Span{0, batch_->starts[rows.last]}.part(rank, team_.size());
        Space<E>& space = spaces_[0];
        embed(space, mine, 0);
        for (int64_t i = 0; i < model_.num_layers; ++i) {
            project(model_.layers[i], space, mine);
            if (rank == 0) team_.reset_pieces();
            team_.barrier();
            for (int64_t piece; (piece = team_.next_piece()) < rows.size() * model_.heads;) attend(space, rows, piece, 0, heads_[rank]);
            team_.barrier();
            finish(model_.layers[i], space, mine);
        }
        give(space, mine, 0);
    }

    // `tokens` count from `start`, the first one that lies in `space`.
    void embed(Space<E>& space, Span tokens, int64_t start) {
        const int64_t size = model_.hidden;
        for (int64_t token = tokens.first; token < tokens.last; ++token) {
            const auto row_of = [&](const void* table, int32_t id) { return static_cast<const Value*>(table) + id * size; };
            const Value* word = row_of(model_.words, batch_->tokens[start + token]);
            const Value* place = row_of(model_.positions, batch_->positions[start + token]);
            const Value* type = model_.types ? row_of(model_.types, batch_->types[start + token]) : nullptr;
            float* to = &space.states[token * size];
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats both = E::widen(word + i) + E::widen(place + i);
                store(to + i, type ? both + E::widen(type + i) : both);
            }
            layer_norm<E>(to, model_.norm, size, model_.eps, &space.inputs[token * size]);
        }
    }

    void project(const EncoderLayer& layer, Space<E>& space, Span tokens) {
        const int64_t width = layer.attention_in.outputs;
        multiply<E>(layer.attention_in, space.inputs.data(), tokens, [&](int64_t row, int64_t column, Floats low, Floats high) {
            E::narrow(&space.queries[row * width + column], low);
            E::narrow(&space.queries[row * width + column + LANES], high);
        });
    }

    void finish(const EncoderLayer& layer, Space<E>& space, Span tokens) {
        const int64_t size = model_.hidden, width = layer.mlp_in.outputs;
        const auto kind = Activation(model_.activation);
        const auto add = [&](int64_t row, int64_t column, Floats low, Floats high) {
            float* to = &space.states[row * size + column];
            store(to, load<Floats>(to) + low);
            store(to + LANES, load<Floats>(to + LANES) + high);
        };
        const auto norm = [&](const EncoderNorm& by) {
            for (int64_t token = tokens.first; token < tokens.last; ++token)
                layer_norm<E>(&space.states[token * size], by, size, model_.eps, &space.inputs[token * size]);
        };
        multiply<E>(layer.attention_out, space.mixed.data(), tokens, add);
        norm(layer.attention_norm);
        multiply<E>(layer.mlp_in, space.inputs.data(), tokens, [&](int64_t row, int64_t column, Floats low, Floats high) {
            E::narrow(&space.middle[row * width + column], activate(kind, low));
            E::narrow(&space.middle[row * width + column + LANES], activate(kind, high));
        });
        multiply<E>(layer.mlp_out, space.middle.data(), tokens, add);
        norm(layer.mlp_norm);
    }

    void give(const Space<E>& space, Span tokens, int64_t start) {
        std::memcpy(batch_->out + (start + tokens.first) * model_.hidden, &space.states[tokens.first * model_.hidden],
                    tokens.size() * model_.hidden * sizeof(float));
    }

    // A piece is one head of one of `rows`.
    void attend(Space<E>& space, Span rows, int64_t piece, int64_t start, Head<E>& head) {
        const int64_t row = rows.first + piece / model_.heads, number = piece % model_.heads;
        const int64_t from = batch_->starts[row] - start, length = batch_->starts[row + 1] - batch_->starts[row];
        const int64_t size = model_.head_size, hidden = model_.hidden, stride = 3 * hidden;
        const int64_t padded = (length + PANEL - 1) / PANEL * PANEL, lanes = (length + PER - 1) / PER;
        const Value* queries = &space.queries[from * stride + number * size];
        pack(queries + hidden, queries + 2 * hidden, stride, length, padded, head);
        const float scale = 1.0f / std::sqrt(float(size));
        in_tiles({0, length}, [&](Span part) {
            Tile sums;
            for (int64_t column = 0; column < padded; column += PANEL) {
                any_tile<E>(part.size(), queries + part.first * stride, stride, &head.keys[column * size], size / PER, sums);
                for (int64_t i = 0; i < part.size(); ++i) std::memcpy(&head.scores[i * padded + column], sums[i], sizeof sums[i]);
            }
            float totals[MAX_ROWS];
            for (int64_t i = 0; i < part.size(); ++i)
                totals[i] = soften(&head.scores[i * padded], &head.weights[i * padded], length, padded, scale,
                                   distances(number, part.first + i));
            for (int64_t column = 0; column < size; column += PANEL) {
                any_tile<E>(part.size(), head.weights.data(), padded, &head.values[column * lanes * PER], lanes, sums);
                for (int64_t i = 0; i < part.size(); ++i) {
                    Value* to = &space.mixed[(from + part.first + i) * hidden + number * size + column];
                    E::narrow(to, load<Floats>(sums[i]) * (1.0f / totals[i]));
                    E::narrow(to + LANES, load<Floats>(sums[i] + LANES) * (1.0f / totals[i]));
                }
            }
        });
    }

    // What is added to the scores of the query at `position`, from key 0 on.
    const float* distances(int64_t head, int64_t position) const {
        if (model_.distances == nullptr) return nullptr;
        return model_.distances + head * (2 * model_.max_distance - 1) + model_.max_distance - 1 - position;
    }

    // Keys as panels of 32 positions, values as panels of 32 channels; what lies behind the row's end is zero.
    void pack(const Value* keys, const Value* values, int64_t stride, int64_t length, int64_t padded, Head<E>& head) {
        const int64_t size = model_.head_size, lanes = (length + PER - 1) / PER;
        for (int64_t position = 0; position < padded; ++position) {
            Value* to = &head.keys[position / PANEL * PANEL * size + position % PANEL * PER];
            for (int64_t i = 0; i < size; i += PER)
                for (int j = 0; j < PER; ++j) to[i * PANEL + j] = position < length ? keys[position * stride + i + j] : Value{};
        }
        for (int64_t position = 0; position < lanes * PER; ++position)
            for (int64_t i = 0; i < size; ++i) {
                Value* to = &head.values[i / PANEL * PANEL * lanes * PER + position / PER * PANEL * PER];
                to[i % PANEL * PER + position % PER] = position < length ? values[position * stride + i] : Value{};
            }
    }

    // One row's scores become weights, not yet divided by their sum, which is returned.
    static float soften(float* scores, Value* weights, int64_t length, int64_t padded, float scale, const float* distances) {
        constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
        Floats most = splat(HIDDEN), total = {};
        for (int64_t i = 0; i < length; i += LANES) {
            Floats s = load<Floats>(scores + i) * scale;
            if (distances) s += load_some(distances + i, length - i);
            store(scores + i, s);
        }
        for (int64_t i = length; i < padded; ++i) scores[i] = HIDDEN;
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats s = load<Floats>(scores + i);
            most = select(s > most, s, most);
        }
        const Floats top = splat(largest(most));
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats s = load<Floats>(scores + i), weight = select(s == HIDDEN, Floats{}, exp(s - top));
            total += weight;
            E::narrow(weights + i, weight);
        }
        return sum(total);
    }

    static MMAAS_INLINE Floats load_some(const float* from, int64_t count) {
        if (count >= LANES) return load<Floats>(from);
        Floats numbers = {};
        std::memcpy(&numbers, from, count * sizeof(float));
        return numbers;
    }

    const EncoderModel model_;
    Team team_;
    std::vector<Space<E>> spaces_;
    std::vector<Head<E>> heads_;
    std::vector<int64_t> groups_;  // first row of each, and the end
    const EncoderBatch* batch_ = nullptr;
};

struct Handle {
    Encoder<Float32>* exact = nullptr;
    Encoder<BFloat16>* half = nullptr;
};

}  // namespace

extern "C" {

void* mmaas_encoder_new(const EncoderModel* model) {
    auto* handle = new (std::nothrow) Handle;
    if (handle == nullptr) return nullptr;
    if (model->is_float32)
        handle->exact = new Encoder<Float32>(*model);
    else
        handle->half = new Encoder<BFloat16>(*model);
    return handle;
}

void mmaas_encoder_delete(void* opaque) {
    auto* handle = static_cast<Handle*>(opaque);
    delete handle->exact;
    delete handle->half;
    delete handle;
}

int mmaas_encoder_run(void* opaque, const EncoderBatch* batch) {
    auto* handle = static_cast<Handle*>(opaque);
    try {
        handle->exact ? handle->exact->run(*batch) : handle->half->run(*batch);
        return 0;
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}
}
