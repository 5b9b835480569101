// A whole step of a Llama-like model in one call: embeddings, layers, logits. Threads work in lockstep; no tensor is allocated.
//
// The stream between layers stays in float32; what enters a product is rounded to the weights' type once. `decoder.py` describes
// the model and owns every buffer named here but the workspace.
#include <atomic>
#include <chrono>
#include <new>
#include <vector>

#include "attention.h"
#include "int8.h"
#include "linear.h"
#include "low_rank.h"
#include "meeting.h"
#include "norm.h"
#include "team.h"

namespace mmaas {

// Sums `count` numbers over all ranks, in place; anything but 0 breaks the step off. For ranks that share no memory.
using Reduce = int (*)(float* numbers, int64_t count);

struct Layer {
    Matrix attention_in;   // queries, keys and values, one under the other
    Matrix attention_out;
    Matrix mlp_in;         // in each panel 16 gates, then the 16 numbers they gate
    Matrix mlp_out;
    const float* input_norm;
    const float* query_norm;      // per head, or null
    const float* key_norm;
    const float* attention_norm;  // of the attention's output, or null
    const float* mlp_input_norm;
    const float* mlp_norm;        // of the MLP's output, or null
    void* keys;
    void* values;
    float scale;
    float softcap;
    int64_t window;
};

struct Model {
    const Layer* layers;
    int64_t num_layers;
    int64_t hidden;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_size;
    int64_t rotary_size;
    int64_t max_positions;
    int64_t vocabulary;
    int64_t block_size;
    int64_t activation;
    int64_t is_float32;
    const void* embeddings;  // vocabulary x hidden
    const float* cosines;    // max_positions x rotary_size/2
    const float* sines;
    const float* final_norm;
    Matrix head;
    int64_t head_offset;  // the first of the hidden numbers that this rank's part of the head takes
    float eps;
    float embedding_scale;
    float residual_scale;
    float logit_scale;
    float logit_softcap;  // 0: none
    int32_t threads;
    void* meeting;     // null: ranks share no memory, or this one is alone
    double timeout_s;  // of a sum in the meeting
    Reduce reduce;     // null: there is a meeting, or this rank is alone
};

// A step's work, as `Batch` has it: S sequences with T new tokens, R rows whose logits are wanted.
struct Step {
    const int32_t* tokens;  // T
    const int32_t* starts;  // S
    const int32_t* counts;  // S
    const int32_t* tables;  // S x width
    const int64_t* rows;    // R, ascending: the last tokens of some sequences
    int64_t num_tokens;
    int64_t num_sequences;
    int64_t num_rows;
    int64_t width;
    float* logits;            // R x vocabulary; null in a stage before the last
    const float* stream_in;   // T x hidden, from the stage before; null: embeddings
    float* stream_out;        // T x hidden, for the next stage; null in the last
    const int32_t* adapters;  // S: the slot of each sequence's adapter, 0: none; null: none has one
};

enum Product : int64_t { ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, NUM_PRODUCTS };  // of a layer

enum Phase : int { EMBED, NORM, LINEAR, ROTARY, ATTENTION, REDUCE, LOGITS, NUM_PHASES };

// Seconds of the leading thread in each kind of work, barriers included.
struct Clock {
    double seconds[NUM_PHASES] = {};
    std::chrono::steady_clock::time_point last;

    void start() { last = std::chrono::steady_clock::now(); }
    void count(Phase phase) {
        const auto now = std::chrono::steady_clock::now();
        seconds[phase] += std::chrono::duration<double>(now - last).count();
        last = now;
    }
};

constexpr int OUT_OF_MEMORY = -2;  // other failures are what the meeting, or `Reduce`, returned

class AnyDecoder {
  public:
    virtual ~AnyDecoder() = default;
    virtual int run(const Step& step) = 0;
    virtual void put_adapter(int64_t slot, const Delta* deltas) = 0;
    Clock clock;
};

template <class E>
class Decoder : public AnyDecoder {
    using Value = typename E::Value;

  public:
    explicit Decoder(const Model& model) : m_(model), layers_(model.layers, model.layers + model.num_layers), team_(model.threads) {
        scratch_.resize(size_t(model.threads));
    }

    void put_adapter(int64_t slot, const Delta* deltas) override { low_rank_.put(slot, deltas, m_.num_layers * NUM_PRODUCTS); }

    int run(const Step& step) override {
        try {
            prepare(step);
        } catch (const std::bad_alloc&) {
            return OUT_OF_MEMORY;
        }
        failure_ = 0;
        team_.run([&](int rank) { forward(step, rank); });
        return failure_;
    }

  private:
    struct Tile {
        int64_t sequence;
        int64_t first;  // first row, counted in (token of the step) x (heads of a group)
        int rows;
        int64_t skipped;  // tokens before it that nobody attends with
    };

    const Model m_;
    const std::vector<Layer> layers_;
    Team team_;
    std::vector<Scratch<E>> scratch_;
    std::vector<float> stream_, part_, projected_;  // T x hidden, T x hidden, T x (heads + 2 kv_heads) x head_size
    std::vector<Value> input_, queries_, mixed_, gated_;
    Int8Rows eight_bits_;  // of what enters the next product, where weights are in eight bits
    std::vector<int64_t> positions_, sequences_;  // T
    std::vector<Tile> tiles_, wanted_tiles_;  // of every token, and of those alone whose logits are wanted
    LowRank<E> low_rank_;
    AdapterRows adapter_rows_, wanted_adapter_rows_;
    std::atomic<int> failure_ = 0;

    int64_t group() const { return m_.heads / m_.kv_heads; }
    int64_t projected_width() const { return (m_.heads + 2 * m_.kv_heads) * m_.head_size; }
    int64_t gated_width() const { return layers_[0].mlp_out.inputs; }
    bool in_eight_bits() const { return layers_[0].mlp_out.scales; }

    template <class T>
    static void grow(std::vector<T>& vector, int64_t size) {
        if (int64_t(vector.size()) < size) vector.resize(size_t(size));
    }

    void prepare(const Step& step) {
        const int64_t tokens = step.num_tokens;
        grow(stream_, tokens * m_.hidden);
        grow(part_, tokens * m_.hidden);
        grow(input_, tokens * m_.hidden);
        grow(projected_, tokens * projected_width());
        grow(queries_, tokens * m_.heads * m_.head_size);
        grow(mixed_, tokens * m_.heads * m_.head_size);
        grow(gated_, tokens * gated_width());
        if (in_eight_bits()) eight_bits_.hold(tokens, std::max({m_.hidden, m_.heads * m_.head_size, gated_width()}));
        adapter_rows_.clear();
        wanted_adapter_rows_.clear();
        positions_.clear();
        sequences_.clear();
        tiles_.clear();
        wanted_tiles_.clear();
        int64_t wanted = 0;
        for (int64_t sequence = 0; sequence < step.num_sequences; ++sequence) {
            const int64_t first = int64_t(positions_.size()), end = first + step.counts[sequence], before = wanted;
            while (wanted < step.num_rows && step.rows[wanted] < end) ++wanted;
            add_tiles(tiles_, sequence, first, end, 0);
            if (wanted > before) add_tiles(wanted_tiles_, sequence, end - (wanted - before), end, end - wanted);
            for (auto& scratch : scratch_) scratch.hold(step.starts[sequence] + step.counts[sequence] + 2 * LANES);
            for (int32_t token = 0; token < step.counts[sequence]; ++token) {
                positions_.push_back(step.starts[sequence] + token);
                sequences_.push_back(sequence);
                if (step.adapters) adapter_rows_.slots.push_back(step.adapters[sequence]);
            }
        }
        if (step.adapters)
            for (int64_t row = 0; row < step.num_rows; ++row)
                wanted_adapter_rows_.slots.push_back(adapter_rows_.slots[size_t(step.rows[row])]);
        adapter_rows_.arrange();
        wanted_adapter_rows_.arrange();
        low_rank_.prepare(adapter_rows_);
    }

    // Tokens [first, end) of the step, all of one sequence.
    void add_tiles(std::vector<Tile>& tiles, int64_t sequence, int64_t first, int64_t end, int64_t skipped) const {
        const int64_t rows = (end - first) * group(), count = (rows + MAX_ROWS - 1) / MAX_ROWS;
        for (int64_t tile = 0; tile < count; ++tile) {
            const int64_t from = rows * tile / count, to = rows * (tile + 1) / count;
            tiles.push_back({sequence, first * group() + from, int(to - from), skipped});
        }
    }

    void forward(const Step& step, int rank) {
        if (rank == 0) clock.start();
        const Range rows = Range::part(step.num_tokens, rank, team_.size());
        embed(step, rows);
        norm(layers_[0].input_norm, rows);
        meet(rank, EMBED);
        for (int64_t index = 0; index < m_.num_layers; ++index) {
            const Layer& layer = layers_[size_t(index)];
            const bool is_last = index + 1 == m_.num_layers, narrows = is_last && !step.stream_out;
            const int64_t products = index * NUM_PRODUCTS;
            project(layer.attention_in, {products + ATTENTION_IN, adapter_rows_}, step.num_tokens, rank);
            meet(rank, LINEAR);
            place(layer, step, rank);
            team_.reset_pieces();
            meet(rank, ROTARY);
            if (narrows && step.num_rows == 0) return;
            if (narrows && rank == 0) keep_wanted(step);
            attention(layer, narrows ? wanted_tiles_ : tiles_, step, rank);
            meet(rank, ATTENTION);
            const int64_t count = narrows ? step.num_rows : step.num_tokens;
            const AdapterRows& adapters = narrows ? wanted_adapter_rows_ : adapter_rows_;
            finish(layer.attention_out, {products + ATTENTION_OUT, adapters}, mixed_.data(), layer.attention_norm,
                   layer.mlp_input_norm, count, rank);
            gate(layer.mlp_in, {products + MLP_IN, adapters}, count, rank);
            meet(rank, LINEAR);
            const float* after = is_last ? (narrows ? m_.final_norm : nullptr) : layers_[size_t(index + 1)].input_norm;
            finish(layer.mlp_out, {products + MLP_OUT, adapters}, gated_.data(), layer.mlp_norm, after, count, rank);
            if (failure_) return;
        }
        if (step.stream_out)
            leave(step, rows);
        else
            logits(step, rank);
    }

    // The last layer's keys and values are of every token; what comes after them only serves the rows whose logits are wanted.
    void keep_wanted(const Step& step) {
        for (int64_t row = 0; row < step.num_rows; ++row)
            if (step.rows[row] != row) std::copy_n(&stream_[step.rows[row] * m_.hidden], m_.hidden, &stream_[row * m_.hidden]);
    }

    void meet(int rank, Phase phase) {
        team_.barrier();
        if (rank == 0) clock.count(phase);
    }

    // Whether other ranks have the rest of the model.
    bool shared() const { return m_.meeting || m_.reduce; }

    void sum_over_ranks(float* numbers, int64_t count, int rank) {
        if (rank == 0 && !failure_)
            failure_ = m_.meeting ? mmaas_meeting_all_reduce(m_.meeting, numbers, count, m_.timeout_s) : m_.reduce(numbers, count);
        meet(rank, REDUCE);
    }

    Range panels(const Matrix& matrix, int rank) const { return Range::part(matrix.num_panels, rank, team_.size()); }

    void embed(const Step& step, Range rows) {
        const int64_t first = rows.first * m_.hidden, last = rows.last * m_.hidden;
        if (step.stream_in) return void(std::copy(step.stream_in + first, step.stream_in + last, &stream_[size_t(first)]));
        const auto* table = static_cast<const Value*>(m_.embeddings);
        for (int64_t row = rows.first; row < rows.last; ++row)
            for (int64_t i = 0; i < m_.hidden; i += LANES)
                store(&stream_[row * m_.hidden + i], E::widen(table + step.tokens[row] * m_.hidden + i) * m_.embedding_scale);
    }

    void leave(const Step& step, Range rows) {
        const int64_t first = rows.first * m_.hidden;
        std::copy_n(&stream_[size_t(first)], (rows.last - rows.first) * m_.hidden, step.stream_out + first);
    }

    void norm(const float* weight, Range rows) {
        for (int64_t row = rows.first; row < rows.last; ++row)
            rms_norm(&stream_[row * m_.hidden], weight, m_.hidden, m_.eps,
                     [&](int64_t i, Floats v) { E::narrow(&input_[row * m_.hidden + i], v); });
        if (in_eight_bits()) quantize(input_.data(), m_.hidden, rows);
    }

    void quantize(const Value* x, int64_t width, Range rows) {
        for (int64_t row = rows.first; row < rows.last; ++row) eight_bits_.put<E>(row, x + row * width, width);
    }

    // Some panels of the product of a layer's matrix with rows x, which also stand in `eight_bits_` if the matrix does.
    template <class Take>
    void product(const Matrix& matrix, const Value* x, int64_t num_rows, Range panels, Take take) {
        if (matrix.scales)
            multiply(matrix, eight_bits_, num_rows, panels, take);
        else
            multiply<E>(matrix, x, matrix.inputs, num_rows, panels, take);
    }

    // What adapters change: a product of the model, by its number, for these rows.
    struct Change {
        int64_t product;
        const AdapterRows& rows;
    };

    // This member's panels, with what the rows' adapters add. The threads meet once more only in steps with adapters.
    template <class Take>
    void adapted(const Matrix& matrix, const Change& change, const Value* x, int64_t num_rows, int rank, Take take) {
        const Range mine = panels(matrix, rank);
        if (!change.rows.any()) return product(matrix, x, num_rows, mine, take);
        low_rank_.down(change.rows, change.product, x, matrix.inputs, rank, team_.size());
        team_.barrier();
        product(matrix, x, num_rows, mine, [&](int64_t row, int64_t panel, float* sums) {
            low_rank_.up(change.rows, change.product, row, panel, sums);
            take(row, panel, sums);
        });
    }

    void project(const Matrix& matrix, const Change& change, int64_t num_rows, int rank) {
        const int64_t width = projected_width();
        adapted(matrix, change, input_.data(), num_rows, rank, [&](int64_t row, int64_t panel, const float* sums) {
            std::copy_n(sums, std::min<int64_t>(PANEL, width - panel * PANEL), &projected_[row * width + panel * PANEL]);
        });
    }

    // Turn queries and keys to their positions; put keys and values into their pages, queries in the order that attention reads.
    void place(const Layer& layer, const Step& step, int rank) {
        const int64_t all = m_.heads + 2 * m_.kv_heads, size = m_.head_size;
        const Range part = Range::part(step.num_tokens * all, rank, team_.size());
        for (int64_t item = part.first; item < part.last; ++item) {
            const int64_t row = item / all, head = item % all, position = positions_[size_t(row)];
            float* numbers = &projected_[item * size];
            if (head < m_.heads) {
                turn(numbers, layer.query_norm, position);
                const int64_t kv_head = head / group(), at = (kv_head * step.num_tokens + row) * group() + head % group();
                for (int64_t i = 0; i < size; i += LANES) E::narrow(&queries_[at * size + i], load<Floats>(numbers + i));
                continue;
            }
            const bool is_key = head < m_.heads + m_.kv_heads;
            const Pages pages = pages_of(step, sequences_[size_t(row)]);
            const int64_t kv_head = (head - m_.heads) % m_.kv_heads, at = pages.at(position / m_.block_size, kv_head);
            if (is_key) {
                turn(numbers, layer.key_norm, position);
                write_key<E>(static_cast<Value*>(layer.keys) + at, size, position % m_.block_size, numbers);
            } else {
                const bool is_last = row + 1 == step.num_tokens || sequences_[size_t(row + 1)] != sequences_[size_t(row)];
                write_value<E>(static_cast<Value*>(layer.values) + at, size, position % m_.block_size, numbers, is_last);
            }
        }
    }

    void turn(float* head, const float* weight, int64_t position) {
        if (weight) rms_norm(head, weight, m_.head_size, m_.eps, [&](int64_t i, Floats v) { store(head + i, v); });
        const int64_t half = m_.rotary_size / 2;
        rotate(head, m_.cosines + position * half, m_.sines + position * half, m_.rotary_size);
    }

    Pages pages_of(const Step& step, int64_t sequence) const {
        return {m_.block_size, m_.kv_heads, m_.head_size, step.tables + sequence * step.width};
    }

    void attention(const Layer& layer, const std::vector<Tile>& tiles, const Step& step, int rank) {
        const Softmax rule = {layer.scale, layer.softcap, layer.window};
        const int64_t pieces = int64_t(tiles.size()) * m_.kv_heads, size = m_.head_size;
        for (int64_t piece; (piece = team_.next_piece()) < pieces;) {
            const Tile& tile = tiles[size_t(piece / m_.kv_heads)];
            const int64_t head = piece % m_.kv_heads;
            int64_t positions[MAX_ROWS];
            Value* out[MAX_ROWS];
            for (int row = 0; row < tile.rows; ++row) {
                const int64_t token = (tile.first + row) / group(), member = (tile.first + row) % group();
                positions[row] = positions_[size_t(token)];
                out[row] = &mixed_[((token - tile.skipped) * m_.heads + head * group() + member) * size];
            }
            const Value* queries = &queries_[(head * step.num_tokens * group() + tile.first) * size];
            with_rows(tile.rows, [&](auto count) {
                attend<E, count>(queries, size, positions, out, static_cast<const Value*>(layer.keys),
                                 static_cast<const Value*>(layer.values), pages_of(step, tile.sequence), head, rule,
                                 scratch_[size_t(rank)]);
            });
        }
    }

    void gate(const Matrix& matrix, const Change& change, int64_t num_rows, int rank) {
        const int64_t width = gated_width();
        adapted(matrix, change, input_.data(), num_rows, rank, [&](int64_t row, int64_t panel, const float* sums) {
            const Floats gates = activate(Activation(m_.activation), load<Floats>(sums));
            E::narrow(&gated_[row * width + panel * LANES], gates * load<Floats>(sums + LANES));
        });
    }

    // The end of a half layer: product, sum over ranks, its own norm if it has one, into the stream, and the next half's norm.
    void finish(const Matrix& matrix, const Change& change, const Value* x, const float* own_norm, const float* next_norm,
                int64_t num_rows, int rank) {
        const bool direct = !shared() && !own_norm;
        float* to = direct ? stream_.data() : part_.data();
        if (matrix.scales) {
            quantize(x, matrix.inputs, Range::part(num_rows, rank, team_.size()));
            meet(rank, NORM);
        }
        adapted(matrix, change, x, num_rows, rank, [&](int64_t row, int64_t panel, const float* sums) {
            float* out = to + row * m_.hidden + panel * PANEL;
            const int64_t count = std::min<int64_t>(PANEL, m_.hidden - panel * PANEL);
            for (int64_t i = 0; i < count; i += LANES) {
                const Floats s = load<Floats>(sums + i);
                store(out + i, direct ? load<Floats>(out + i) + s * m_.residual_scale : s);
            }
        });
        meet(rank, LINEAR);
        if (shared()) sum_over_ranks(part_.data(), num_rows * m_.hidden, rank);
        const Range rows = Range::part(num_rows, rank, team_.size());
        if (!direct) add(own_norm, rows);
        if (next_norm) norm(next_norm, rows);
        meet(rank, NORM);
    }

    void add(const float* weight, Range rows) {
        for (int64_t row = rows.first; row < rows.last; ++row) {
            float *part = &part_[row * m_.hidden], *stream = &stream_[row * m_.hidden];
            if (weight) rms_norm(part, weight, m_.hidden, m_.eps, [&](int64_t i, Floats v) { store(part + i, v); });
            for (int64_t i = 0; i < m_.hidden; i += LANES)
                store(stream + i, load<Floats>(stream + i) + load<Floats>(part + i) * m_.residual_scale);
        }
    }

    void logits(const Step& step, int rank) {
        const Value* x = input_.data() + m_.head_offset;
        multiply<E>(m_.head, x, m_.hidden, step.num_rows, panels(m_.head, rank), [&](int64_t row, int64_t panel, float* sums) {
            const int64_t count = std::min<int64_t>(PANEL, m_.vocabulary - panel * PANEL);
            std::copy_n(sums, count, step.logits + row * m_.vocabulary + panel * PANEL);
        });
        meet(rank, LOGITS);
        if (shared() && m_.head.inputs < m_.hidden) sum_over_ranks(step.logits, step.num_rows * m_.vocabulary, rank);
        if (m_.logit_scale == 1 && m_.logit_softcap == 0) return;
        const Range part = Range::part(step.num_rows * m_.vocabulary, rank, team_.size());
        for (int64_t i = part.first; i < part.last; ++i) {
            step.logits[i] *= m_.logit_scale;
            if (m_.logit_softcap > 0) step.logits[i] = std::tanh(step.logits[i] / m_.logit_softcap) * m_.logit_softcap;
        }
    }
};

}  // namespace mmaas

extern "C" {

void* mmaas_decoder_new(const mmaas::Model* model) {
    if (model->is_float32) return new mmaas::Decoder<mmaas::Float32>(*model);
    return new mmaas::Decoder<mmaas::BFloat16>(*model);
}

// Between two steps. `deltas`, four for each layer, must live until the slot has others; null empties it.
void mmaas_decoder_put_adapter(void* decoder, int64_t slot, const mmaas::Delta* deltas) {
    static_cast<mmaas::AnyDecoder*>(decoder)->put_adapter(slot, deltas);
}

int mmaas_decoder_run(void* decoder, const mmaas::Step* step) { return static_cast<mmaas::AnyDecoder*>(decoder)->run(*step); }

// The seconds spent in each phase since the beginning, in the order of `Phase`.
void mmaas_decoder_profile(void* decoder, double* seconds) {
    const auto& clock = static_cast<mmaas::AnyDecoder*>(decoder)->clock;
    std::copy_n(clock.seconds, int(mmaas::NUM_PHASES), seconds);
}

void mmaas_decoder_delete(void* decoder) { delete static_cast<mmaas::AnyDecoder*>(decoder); }

}
