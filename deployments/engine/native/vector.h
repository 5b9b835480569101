// Sixteen floats at a time, and the two kinds of numbers that weights come in.
//
// `Floats` is the compiler's own vector type, which it lowers to whatever the CPU has; only the bfloat16 product asks for an
// instruction by name (AVX512-BF16) and has a portable form beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define MMAAS_INLINE inline __attribute__((always_inline))

namespace mmaas {

constexpr int LANES = 16;
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

template <class V, class T>
MMAAS_INLINE V load(const T* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class V, class T>
MMAAS_INLINE void store(T* to, V vector) {
    std::memcpy(to, &vector, sizeof vector);
}

MMAAS_INLINE Floats splat(float x) { return x - Floats{}; }

MMAAS_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

MMAAS_INLINE float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

MMAAS_INLINE float largest(Floats v) {
    float best = v[0];
    for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// e^x to about one unit in the last place: x = n ln 2 + r, and a polynomial in |r| <= ln 2 / 2 (Cephes' expf, Moshier 1992).
MMAAS_INLINE Floats exp(Floats x) {
    x = select(x < splat(-87.3f), splat(-87.3f), x);
    x = select(x > splat(88.3f), splat(88.3f), x);
    const Floats rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Floats n = (x * 1.44269504f + rounder) - rounder;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * load<Floats>(&power);
}

MMAAS_INLINE Floats tanh(Floats x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

// Weights and what they are multiplied with. A lane is 32 bits: one float32, or two bfloat16 that are neighbours along k.
struct Float32 {
    using Value = float;
    using Sum = Floats;
    using Number = float;  // one of a sum's
    static constexpr int PER_LANE = 1;

    static MMAAS_INLINE Floats widen(const Value* from) { return load<Floats>(from); }
    static MMAAS_INLINE void narrow(Value* to, Floats v) { store(to, v); }
    static MMAAS_INLINE Floats multiply_add(Floats sum, const Value* x, Floats weights) { return sum + *x * weights; }
    static MMAAS_INLINE Floats weights(const Value* from) { return load<Floats>(from); }
};

struct BFloat16 {
    using Value = uint16_t;
    using Sum = Floats;
    using Number = float;
    static constexpr int PER_LANE = 2;
    using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

    static MMAAS_INLINE Floats widen(const Value* from) {
        Ints bits = __builtin_convertvector(load<Halves>(from), Ints) << 16;
        return load<Floats>(&bits);
    }

    // Round to nearest, ties to even.
    static MMAAS_INLINE void narrow(Value* to, Floats v) {
#ifdef __AVX512BF16__
        store(to, _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
        using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
        Bits bits = load<Bits>(&v);
        Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        Bits quiet = (bits >> 16) | 0x40;  // a NaN stays one
        store(to, __builtin_convertvector(v == v ? rounded : quiet, Halves));
#endif
    }

#ifdef __AVX512BF16__
    static MMAAS_INLINE __m512bh weights(const Value* from) { return load<__m512bh>(from); }

    static MMAAS_INLINE Floats multiply_add(Floats sum, const Value* x, __m512bh weights) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), both, weights));
    }
#else
    static MMAAS_INLINE Ints weights(const Value* from) { return load<Ints>(from); }

    static MMAAS_INLINE float single(Value bits) {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
    }

    static MMAAS_INLINE Floats multiply_add(Floats sum, const Value* x, Ints weights) {
        Ints low = weights << 16, high = weights & static_cast<int32_t>(0xffff0000);
        return sum + single(x[0]) * load<Floats>(&low) + single(x[1]) * load<Floats>(&high);
    }
#endif
};

}  // namespace mmaas
