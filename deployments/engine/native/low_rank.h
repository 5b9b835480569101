// What LoRA adapters add to a product: y += scale * B (A x), each row with its own adapter or none.
//
// Two halves around a barrier. `down` makes h = scale * A x for the rows that have an adapter, whatever order they stand in: rows of
// one adapter together, 4 rows by 4 numbers of h at a time, so that A passes once. `up` adds B h to 32 finished sums of one row
// while they are in registers' reach, and asks memory for what the next panel will want. A is stored row by row, because it has few rows
// and long ones; B is packed as every matrix is (`linear.h`).
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
    static constexpr int64_t LINES = 32;  // of 64 bytes, that are asked from memory ahead: rank 32 and below

  public:
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
        int64_t piece = 0;
        for (const auto& tile : rows.tiles) {
            const Delta* delta = find(tile.slot, product);
            if (!delta) continue;
            for (int64_t column = 0; column < delta->depth; column += COLUMNS, ++piece)
                if (piece % threads == thread) down_tile(*delta, &rows.order[size_t(tile.first)], tile.count, column, x, x_stride);
        }
    }

    // Adds B h to the 32 sums of a row and a panel.
    MMAAS_INLINE void up(const AdapterRows& rows, int64_t product, int64_t row, int64_t panel, float* sums) const {
        const Delta* delta = find(rows.slots[size_t(row)], product);
        if (!delta) return;
        const Value *inner = &inner_[size_t(row * stride_)], *first = inner + delta->places[2 * panel];
        const Value *second = inner + delta->places[2 * panel + 1];
        const int64_t size = delta->rank * PANEL, step = PANEL * E::PER_LANE;
        const auto* weights = static_cast<const Value*>(delta->up) + panel * size;
        const int64_t ahead = std::min<int64_t>(size * int64_t(sizeof(Value)), LINES * 64);
        for (int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(weights + size) + byte);
        Floats low = load<Floats>(sums), high = load<Floats>(sums + LANES);
        for (int64_t at = 0; at < size; at += step, first += E::PER_LANE, second += E::PER_LANE) {
            low = E::multiply_add(low, first, E::weights(weights + at));
            high = E::multiply_add(high, second, E::weights(weights + at + LANES * E::PER_LANE));
        }
        store(sums, low);
        store(sums + LANES, high);
    }

  private:
    struct Adapter {
        const Delta* deltas = nullptr;
        int64_t depth = 0;  // of its deepest product
    };

    std::vector<Adapter> adapters_;  // by slot
    std::vector<Value> inner_;       // rows x stride_: h
    int64_t stride_ = 0;

    MMAAS_INLINE const Delta* find(int32_t slot, int64_t product) const {
        const Delta* deltas = size_t(slot) < adapters_.size() ? adapters_[size_t(slot)].deltas : nullptr;
        return deltas && deltas[product].down ? &deltas[product] : nullptr;
    }

    void down_tile(const Delta& delta, const int32_t* order, int count, int64_t column, const Value* x, int64_t x_stride) {
        const Value* numbers[AdapterRows::TILE];
        for (int row = 0; row < count; ++row) numbers[row] = x + order[row] * x_stride;
        const Value* a = static_cast<const Value*>(delta.down) + column * delta.inputs;
        float out[AdapterRows::TILE][COLUMNS];
        with_rows(count, [&](auto rows) {
            if constexpr (rows <= AdapterRows::TILE) dots<rows>(numbers, a, delta.inputs, out);
        });
        for (int row = 0; row < count; ++row)
            for (int i = 0; i < COLUMNS; ++i) narrow(&inner_[size_t(order[row] * stride_ + column + i)], out[row][i] * delta.scale);
    }

    template <int ROWS>
    static void dots(const Value* const* x, const Value* a, int64_t inputs, float (*out)[COLUMNS]) {
        using Run = typename Along<E>::Run;
        constexpr int64_t width = Along<E>::WIDTH;
        Floats sums[ROWS][COLUMNS] = {};
        int64_t k = 0;
        for (; k + width <= inputs; k += width) {
            Run columns[COLUMNS];
#pragma GCC unroll 4
            for (int i = 0; i < COLUMNS; ++i) columns[i] = Along<E>::run(a + i * inputs + k);
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

    static void narrow(float* to, float number) { *to = number; }
    static void narrow(uint16_t* to, float number) {
        Value rounded[LANES];
        BFloat16::narrow(reinterpret_cast<uint16_t*>(rounded), splat(number));
        std::memcpy(to, rounded, sizeof *to);
    }
};

}  // namespace mmaas
