// Weights and rows in eight bits. What is multiplied are integers, so that sums are exact and no order of adding changes them.
//
// A row is scale * q with q from -127 to 127, the scale its own; each output's weights likewise. Weights are kept as q + 128: the
// instruction (AVX512-VNNI) multiplies unsigned numbers with signed ones. What that adds to every sum of a row is the row's
// `offset`. `quantization.py` is the specification.
#pragma once

#include <vector>

#include "linear.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace mmaas {

// A lane is four neighbours along k.
struct Int8 {
    using Value = int8_t;
    using Sum = Ints;
    using Number = int32_t;
    static constexpr int PER_LANE = 4;
    static constexpr float LARGEST = 127;
    static constexpr float SMALLEST = 0x1p-100f;  // a row of less is zero

#ifdef __AVX512VNNI__
    static MMAAS_INLINE __m512i weights(const Value* from) { return load<__m512i>(from); }

    static MMAAS_INLINE Ints multiply_add(Ints sum, const Value* x, __m512i weights) {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), weights, _mm512_set1_epi32(four)));
    }
#else
    static MMAAS_INLINE Ints weights(const Value* from) { return load<Ints>(from); }

    static MMAAS_INLINE Ints multiply_add(Ints sum, const Value* x, Ints weights) {
        for (int i = 0; i < PER_LANE; ++i) sum += (weights >> (8 * i) & 255) * int32_t(x[i]);
        return sum;
    }
#endif

    // To the nearest integer, ties to even.
    static MMAAS_INLINE Ints nearest(Floats v) {
#ifdef __AVX512F__
        return reinterpret_cast<Ints>(_mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(v)));
#else
        Ints rounded;
        for (int i = 0; i < LANES; ++i) rounded[i] = int32_t(std::lrint(v[i]));
        return rounded;
#endif
    }
};

// Rows that are to be multiplied, one behind the other. Of a row that isn't finite the scale isn't either, and so is no result.
struct Int8Rows {
    std::vector<int8_t> numbers;
    std::vector<float> scales;
    std::vector<int32_t> offsets;

    void hold(int64_t rows, int64_t width) {
        if (int64_t(numbers.size()) < rows * width) numbers.resize(size_t(rows * width));
        if (int64_t(scales.size()) < rows) scales.resize(size_t(rows)), offsets.resize(size_t(rows));
    }

    // Row `row` of `width` numbers, a multiple of 16.
    template <class E>
    void put(int64_t row, const typename E::Value* x, int64_t width) {
        Ints widest = {};  // compared as bits: then nothing is larger than a NaN
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats v = E::widen(x + i);
            const Ints size = load<Ints>(&v) & 0x7fffffff;
            widest = size > widest ? size : widest;
        }
        int32_t bits = 0;
        for (int lane = 0; lane < LANES; ++lane) bits = std::max(bits, widest[lane]);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const float inverse = largest > Int8::SMALLEST ? Int8::LARGEST / largest : 0.0f;
        Ints total = {};
        for (int64_t i = 0; i < width; i += LANES) {
            const Ints q = Int8::nearest(E::widen(x + i) * inverse);
            total += q;
            store(&numbers[size_t(row * width + i)], __builtin_convertvector(q, Bytes));
        }
        uint32_t sum = 0;  // a row that isn't finite may overflow
        for (int lane = 0; lane < LANES; ++lane) sum += uint32_t(total[lane]);
        scales[size_t(row)] = largest / Int8::LARGEST;
        offsets[size_t(row)] = int32_t(sum * 128);
    }

  private:
    using Bytes = int8_t __attribute__((vector_size(LANES)));
};

// As `multiply`, of rows and a matrix in eight bits.
template <class Take>
void multiply(const Matrix& matrix, const Int8Rows& x, int64_t num_rows, Range panels, Take take) {
    products<Int8>(matrix, x.numbers.data(), matrix.inputs, num_rows, panels, [&](int64_t row, int64_t panel, const int32_t* sums) {
        const float scale = x.scales[size_t(row)];
        const int32_t offset = x.offsets[size_t(row)];
        float numbers[PANEL];
        for (int64_t i = 0, at = panel * PANEL; i < PANEL; i += LANES, at += LANES) {
            const Floats exact = __builtin_convertvector(load<Ints>(sums + i) - offset, Floats);
            const Floats scaled = exact * scale * load<Floats>(matrix.scales + at);
            store(numbers + i, matrix.bias ? scaled + load<Floats>(matrix.bias + at) : scaled);
        }
        take(row, panel, numbers);
    });
}

}  // namespace mmaas
