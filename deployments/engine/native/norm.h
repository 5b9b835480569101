// What happens between the products: norms, rotary positions, activations. One row at a time, in float32.
#pragma once

#include "vector.h"

namespace mmaas {

// RMSNorm (Zhang & Sennrich 2019): to = x / sqrt(mean(x^2) + eps) * weight. `size` is a multiple of 16.
template <class Write>
MMAAS_INLINE void rms_norm(const float* x, const float* weight, int64_t size, float eps, Write write) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Floats v = load<Floats>(x + i);
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += LANES) write(i, load<Floats>(x + i) * scale * load<Floats>(weight + i));
}

// Rotary positions (Su 2021), pairs half a rotation apart: the first `size` numbers of a head are turned, in place.
// `cosines` and `sines` hold size/2 numbers for the row's position; size/2 is a multiple of 16.
MMAAS_INLINE void rotate(float* head, const float* cosines, const float* sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        Floats a = load<Floats>(head + i), b = load<Floats>(head + half + i);
        Floats c = load<Floats>(cosines + i), s = load<Floats>(sines + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
}

enum Activation : int64_t { SILU = 0, GELU_TANH = 1 };

// SiLU is x sigmoid(x); GELU's tanh form (Hendrycks & Gimpel 2016) is x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
MMAAS_INLINE Floats activate(Activation kind, Floats x) {
    Floats inner = kind == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-inner));
}

}  // namespace mmaas
