// Plain C++: the reference of the other paths, and the path (vectorised by the compiler) of all other CPUs.
#include "kernels.h"

namespace budwood {
namespace {

void few(const Matrix& a, const Input& x, const Output& out, int64_t first, int64_t last) {
    const int64_t words = (a.in + 31) / 32;
    float* row_values = static_cast<float*>(scratch(0, size_t(words) * 32 * sizeof(float)));
    for (int64_t row = first; row < last; ++row) {
        // The row is unpacked once, to zeros and values, and multiplied with every row of x.
        std::memset(row_values, 0, size_t(words) * 32 * sizeof(float));
        int64_t next = a.starts[row];
        for (int64_t word = 0; word < words; ++word) {
            for (uint32_t bits = mask_word(a, row, word); bits; bits &= bits - 1) {
                row_values[32 * word + __builtin_ctz(bits)] = load(a.values, a.type, next++);
            }
        }
        if (a.type == INT8) {
            const float* scales = a.scales + row * segments_of(a);
            for (int64_t column = 0; column < a.in; ++column) row_values[column] *= scales[column / SEGMENT];
        }
        each_more(a, row, [&](int64_t column, float value) { row_values[column] += value; });
        for (int64_t token = 0; token < x.rows; ++token) {
            const float* input = static_cast<const float*>(x.data);
            float sums[16] = {};  // independent, so that the compiler may keep them in vectors
            for (int64_t column = 0; column < 32 * words; column += 16) {
                const float* lane = input + place(x.rows, token, column);
                for (int i = 0; i < 16; ++i) sums[i] += row_values[column + i] * lane[i];
            }
            for (int width = 8; width; width /= 2) {
                for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
            }
            store(out, token, row, sums[0]);
        }
    }
}

}  // namespace

const Path scalar = {"scalar", false, few, nullptr, nullptr, nullptr, nullptr, nullptr, false, nullptr, nullptr};

}  // namespace budwood
