// What LoRA adapters add to a product: y += scale * B (A x), each row with its own adapter or none.
//
// Two halves around a barrier. `down` makes h = scale * A x for the rows that have an adapter, whatever order they stand in: rows of
// one adapter together, 4 rows by 4 numbers of h at a time, so that A passes once. `up` makes B h for a few panels, which the
// product itself then adds to its sums. Many adapters are many short runs of memory, which the hardware is slow to foresee: each half
// asks for what it will read next. A is stored row by row, because it has few and long ones; B is packed as every matrix is.
#pragma once

#include <vector>

#include "linear.h"

namespace mmaas {

// One adapter's part of one product, as Python describes it (`low_rank.py`). A fused product has one run of A's rows for each part.
struct Delta {
    const void* down;       // depth x inputs; null: the adapter leaves this product as it is
    const void* up;         // panels of 32 outputs by `rank` inputs
    const int32_t* places;  // two for each panel: where in h its first and its second 16 outputs begin to read
    int64_t depth;          // a multiple of 4
    int64_t rank;           // of one part, a multiple of 4
    int64_t inputs;
    float scale;
};

template <class E>
struct Along;  // products of two runs of numbers, both along k

template <>
struct Along<Float32> {
    static constexpr int64_t WIDTH = LANES;
    using Run = Floats;
    static MMAAS_INLINE Run run(const float* from) { return load<Floats>(from); }
    static MMAAS_INLINE Floats add(Floats sum, Run x, Run a) { return sum + x * a; }
};

template <>
struct Along<BFloat16> {
    static constexpr int64_t WIDTH = 2 * LANES;
#ifdef __AVX512BF16__
    using Run = __m512bh;
    static MMAAS_INLINE Run run(const uint16_t* from) { return load<__m512bh>(from); }
    static MMAAS_INLINE Floats add(Floats sum, Run x, Run a) {
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), x, a));
    }
#else
    using Run = Ints;
    static MMAAS_INLINE Run run(const uint16_t* from) { return load<Ints>(from); }
    static MMAAS_INLINE Floats low(Ints pairs) {
        Ints bits = pairs << 16;
        return load<Floats>(&bits);
    }
    static MMAAS_INLINE Floats high(Ints pairs) {
        Ints bits = pairs & static_cast<int32_t>(0xffff0000);
        return load<Floats>(&bits);
    }
    static MMAAS_INLINE Floats add(Floats sum, Run x, Run a) { return sum + low(x) * low(a) + high(x) * high(a); }
#endif
};

// Which rows of a step have which adapter.
struct AdapterRows {
    static constexpr int TILE = 4;
    struct Tile {
        int32_t slot;
        int32_t first;  // in `order`
        int32_t count;
    };

    std::vector<int32_t> slots;  // of every row; empty: no row has one
    std::vector<int32_t> order;  // rows with an adapter, those of one adapter together
    std::vector<Tile> tiles;

    bool any() const { return !order.empty(); }

    void clear() {
        slots.clear();
        order.clear();
        tiles.clear();
    }

    // After `slots` was filled.
    void arrange() {
        for (size_t row = 0; row < slots.size(); ++row)
            if (slots[row]) order.push_back(int32_t(row));
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return slots[size_t(a)] < slots[size_t(b)]; });
        for (int32_t at = 0; at < int32_t(order.size()); ++at) {
            const int32_t slot = slots[size_t(order[size_t(at)])];
            if (tiles.empty() || tiles.back().slot != slot || tiles.back().count == TILE) tiles.push_back({slot, at, 0});
            ++tiles.back().count;
        }
    }
};

template <class E>
class LowRank {
    using Value = typename E::Value;
    static constexpr int COLUMNS = 4;
    static constexpr int64_t LINE = 64, MOST_AHEAD = 4096;  // bytes: of the next piece, as much is asked for

  public:
    static constexpr int64_t BLOCK = 8;  // panels that `up` prepares at once

    explicit LowRank(int threads) : added_(size_t(threads)) {}

    // `deltas`: one for each product of the model, in order; null: the slot is empty.
    void put(int64_t slot, const Delta* deltas, int64_t num_products) {
        if (int64_t(adapters_.size()) <= slot) adapters_.resize(size_t(slot) + 1);
        adapters_[size_t(slot)] = {deltas, 0};
        for (int64_t product = 0; deltas && product < num_products; ++product)
            adapters_[size_t(slot)].depth = std::max(adapters_[size_t(slot)].depth, deltas[product].depth);
    }

    // Room for h of the rows of a step.
    void prepare(const AdapterRows& rows) {
        stride_ = 0;
        for (const auto& tile : rows.tiles)
            if (size_t(tile.slot) < adapters_.size()) stride_ = std::max(stride_, adapters_[size_t(tile.slot)].depth);
        if (inner_.size() < rows.slots.size() * size_t(stride_)) inner_.resize(rows.slots.size() * size_t(stride_));
    }

    // A thread's part of h for one product of x.
    void down(const AdapterRows& rows, int64_t product, const Value* x, int64_t x_stride, int thread, int threads) {
        int64_t pieces = 0, piece = 0;
        for (const auto& tile : rows.tiles)
            if (const Delta* delta = find(tile.slot, product)) pieces += delta->depth / COLUMNS;
        const Range mine = Range::part(pieces, thread, threads);
        for (size_t index = 0; index < rows.tiles.size() && piece < mine.last; ++index) {
            const auto& tile = rows.tiles[index];
            const Delta* delta = find(tile.slot, product);
            if (!delta) continue;
            const Value* next = index + 1 < rows.tiles.size() ? first_row(rows.tiles[index + 1].slot, product) : nullptr;
            for (int64_t column = 0; column < delta->depth; column += COLUMNS, ++piece) {
                if (piece < mine.first || piece >= mine.last) continue;
                const Value* a = static_cast<const Value*>(delta->down) + column * delta->inputs;
                const Value* ahead = column + COLUMNS < delta->depth ? a + COLUMNS * delta->inputs : next;
                down_tile(*delta, &rows.order[size_t(tile.first)], tile.count, column, a, ahead, x, x_stride);
            }
        }
    }

    // B h of all rows for at most `BLOCK` panels, kept for the thread that asks.
    void up(const AdapterRows& rows, int64_t product, Range panels, int thread) {
        auto& added = added_[size_t(thread)];
        if (added.size() < rows.slots.size() * BLOCK * PANEL) added.resize(rows.slots.size() * BLOCK * PANEL);
        for (size_t index = 0; index < rows.tiles.size(); ++index) {
            const auto& tile = rows.tiles[index];
            const Delta* delta = find(tile.slot, product);
            if (!delta) continue;
            const Delta* next = index + 1 < rows.tiles.size() ? find(rows.tiles[index + 1].slot, product) : nullptr;
            with_rows(tile.count, [&](auto count) {
                if constexpr (count <= AdapterRows::TILE)
                    up_tile<count>(*delta, next, &rows.order[size_t(tile.first)], panels, added.data());
            });
        }
    }

    // What `up` made for a row and the panel `place` of its block, to the 32 sums.
    MMAAS_INLINE void add(const AdapterRows& rows, int64_t product, int64_t row, int64_t place, int thread, float* sums) const {
        if (!find(rows.slots[size_t(row)], product)) return;
        const float* added = &added_[size_t(thread)][size_t((row * BLOCK + place) * PANEL)];
        store(sums, load<Floats>(sums) + load<Floats>(added));
        store(sums + LANES, load<Floats>(sums + LANES) + load<Floats>(added + LANES));
    }

  private:
    struct Adapter {
        const Delta* deltas = nullptr;
        int64_t depth = 0;  // of its deepest product
    };

    std::vector<Adapter> adapters_;  // by slot
    std::vector<Value> inner_;       // rows x stride_: h
    int64_t stride_ = 0;
    std::vector<std::vector<float>> added_;  // by thread: rows x BLOCK x 32

    MMAAS_INLINE const Delta* find(int32_t slot, int64_t product) const {
        const Delta* deltas = size_t(slot) < adapters_.size() ? adapters_[size_t(slot)].deltas : nullptr;
        return deltas && deltas[product].down ? &deltas[product] : nullptr;
    }

    const Value* first_row(int32_t slot, int64_t product) const {
        const Delta* delta = find(slot, product);
        return delta ? static_cast<const Value*>(delta->down) : nullptr;
    }

    void down_tile(const Delta& delta, const int32_t* order, int count, int64_t column, const Value* a, const Value* ahead,
                   const Value* x, int64_t x_stride) {
        const Value* numbers[AdapterRows::TILE];
        for (int row = 0; row < count; ++row) numbers[row] = x + order[row] * x_stride;
        float out[AdapterRows::TILE][COLUMNS];
        with_rows(count, [&](auto rows) {
            if constexpr (rows <= AdapterRows::TILE) dots<rows>(numbers, a, ahead, delta.inputs, out);
        });
        for (int row = 0; row < count; ++row)
            for (int i = 0; i < COLUMNS; ++i) narrow(&inner_[size_t(order[row] * stride_ + column + i)], out[row][i] * delta.scale);
    }

    template <int ROWS>
    static void dots(const Value* const* x, const Value* a, const Value* ahead, int64_t inputs, float (*out)[COLUMNS]) {
        using Run = typename Along<E>::Run;
        constexpr int64_t width = Along<E>::WIDTH;
        Floats sums[ROWS][COLUMNS] = {};
        int64_t k = 0;
        for (; k + width <= inputs; k += width) {
            Run columns[COLUMNS];
#pragma GCC unroll 4
            for (int i = 0; i < COLUMNS; ++i) {
                columns[i] = Along<E>::run(a + i * inputs + k);
                if (ahead) __builtin_prefetch(ahead + i * inputs + k);
            }
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; ++row) {
                const Run numbers = Along<E>::run(x[row] + k);
#pragma GCC unroll 4
                for (int i = 0; i < COLUMNS; ++i) sums[row][i] = Along<E>::add(sums[row][i], numbers, columns[i]);
            }
        }
        for (; k < inputs; k += LANES)  // inputs are a multiple of 16
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < COLUMNS; ++i) sums[row][i] += E::widen(x[row] + k) * E::widen(a + i * inputs + k);
        for (int row = 0; row < ROWS; ++row)
            for (int i = 0; i < COLUMNS; ++i) out[row][i] = sum(sums[row][i]);
    }

    template <int ROWS>
    void up_tile(const Delta& delta, const Delta* next, const int32_t* order, Range panels, float* added) const {
        const int64_t size = delta.rank * PANEL, step = PANEL * E::PER_LANE;
        const int64_t ahead = next ? std::min(next->rank * PANEL * int64_t(sizeof(Value)), MOST_AHEAD) : 0;
        for (int64_t panel = panels.first; panel < panels.last; ++panel) {
            const auto* weights = static_cast<const Value*>(delta.up) + panel * size;
            if (ahead) {
                const char* wanted = reinterpret_cast<const char*>(static_cast<const Value*>(next->up) + panel * next->rank * PANEL);
                for (int64_t byte = 0; byte < ahead; byte += LINE) __builtin_prefetch(wanted + byte);
            }
            const Value *first[ROWS], *second[ROWS];
            for (int row = 0; row < ROWS; ++row) {
                first[row] = &inner_[size_t(order[row] * stride_)] + delta.places[2 * panel];
                second[row] = &inner_[size_t(order[row] * stride_)] + delta.places[2 * panel + 1];
            }
            Sums<ROWS> sums = {};
            for (int64_t at = 0, k = 0; at < size; at += step, k += E::PER_LANE) {
                const auto low = E::weights(weights + at), high = E::weights(weights + at + LANES * E::PER_LANE);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; ++row) {
                    sums[row][0] = E::multiply_add(sums[row][0], first[row] + k, low);
                    sums[row][1] = E::multiply_add(sums[row][1], second[row] + k, high);
                }
            }
            for (int row = 0; row < ROWS; ++row) {
                float* out = added + (order[row] * BLOCK + panel - panels.first) * PANEL;
                store(out, sums[row][0]);
                store(out + LANES, sums[row][1]);
            }
        }
    }

    static void narrow(float* to, float number) { *to = number; }
    static void narrow(uint16_t* to, float number) {
        Value rounded[LANES];
        BFloat16::narrow(reinterpret_cast<uint16_t*>(rounded), splat(number));
        std::memcpy(to, rounded, sizeof *to);
    }
};

}  // namespace mmaas
