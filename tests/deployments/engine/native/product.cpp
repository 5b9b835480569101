// One product in eight bits, for tests: rows of floats, a packed matrix, and what came of them.
#include "int8.h"

using namespace mmaas;

extern "C" void product(const Matrix* matrix, const float* x, int64_t rows, float* out, int8_t* numbers, float* scales) {
    Int8Rows rounded;
    rounded.hold(rows, matrix->inputs);
    for (int64_t row = 0; row < rows; ++row) rounded.put<Float32>(row, x + row * matrix->inputs, matrix->inputs);
    std::copy_n(rounded.numbers.data(), rows * matrix->inputs, numbers);
    std::copy_n(rounded.scales.data(), rows, scales);
    multiply(*matrix, rounded, rows, {0, matrix->num_panels}, [&](int64_t row, int64_t panel, const float* sums) {
        const int64_t count = std::min<int64_t>(PANEL, matrix->outputs - panel * PANEL);
        std::copy_n(sums, count, out + row * matrix->outputs + panel * PANEL);
    });
}
