// AVX2, few rows of x: eight columns at a time, everything in float32.
#include "avx2.h"

namespace budwood::with_avx2 {
namespace {

template <int TYPE, int CODING, int M, int R>
INLINE void rows_of(const Matrix& a, const int64_t* rows, bool safe, const Input& in, float (*sums)[M], const Tables& tables) {
    using Value = typename Values<TYPE>::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const Value* end = values + a.count;
    const float* x = static_cast<const float*>(in.data);
    const Spread& table = tables.by[CODING];
    const int64_t words = safe ? 0 : a.in / LANE;
    const Value* at[R];
    const uint8_t* places[R];
    __m256 s[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        at[r] = values + a.starts[rows[r]];
        places[r] = a.places + rows[r] * a.stride;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_ps();
    }
    for (int64_t word = 0; word < words; ++word, x += LANE * M) {
        uint32_t here[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            std::memcpy(&here[r], places[r] + 4 * word, 4);
            _mm_prefetch(reinterpret_cast<const char*>(at[r]) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int byte = 0; byte < LANE / 8; ++byte) {
            __m256 weights[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Value* from = at[r] + count_of<CODING>(here[r], byte);
                weights[r] = Values<TYPE>::spread(from, table, here[r] >> (8 * byte) & 255);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 inputs = _mm256_loadu_ps(x + LANE * m + 8 * byte);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[r][m] = _mm256_fmadd_ps(weights[r], inputs, s[r][m]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) at[r] += count_of<CODING>(here[r], LANE / 8);
    }
    // The remainder of the rows; all of them near the end of the values, where no whole vector may be read.
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        for (int64_t byte = 4 * words; byte < a.stride; ++byte) {
            const int64_t column = 8 * byte, columns = a.in - column, left = end - at[r];
            uint32_t bits = places[r][byte];
            if (CODING == NIBBLES) bits = tables.unfolded[bits];
            if (columns < 8) bits &= (1u << columns) - 1;
            Value room[8] = {};
            if (left > 0) std::memcpy(room, at[r], size_t(left < 8 ? left : 8) * sizeof(Value));
            const __m256 weights = Values<TYPE>::spread(room, tables.by[BITMASK], bits);
            at[r] += __builtin_popcount(bits);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float* inputs = static_cast<const float*>(in.data) + place(M, m, column);
                s[r][m] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(inputs), s[r][m]);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m] = sum_of(s[r][m]);
    }
}

template <int TYPE, int CODING, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M == 1 ? 4 : M <= 6 ? 2 : 1;  // memory streams, as many as the registers allow
    const Tables& tables = tables_of_bytes();
    by_parts<M, R>(a, out, first, last, 8, [&](const int64_t* rows, bool safe, float (*sums)[M]) {
        rows_of<TYPE, CODING, M, R>(a, rows, safe, in, sums, tables);
    });
}

template <int TYPE>
void few_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) {
        a.coding == NIBBLES ? few_rows<TYPE, NIBBLES, rows()>(a, in, out, first, last)
                            : few_rows<TYPE, BITMASK, rows()>(a, in, out, first, last);
    });
}

// A dense matrix.
template <int M>
void dense_rows(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M <= 3 ? 4 : M <= 6 ? 2 : 1;
    // Columns for one prefetch: a line where arithmetic is the limit; else a line four times, which keeps memory busier.
    constexpr int STEP = M <= 3 ? 8 : LANE;
    const int64_t part = (last - first + R - 1) / R;
    const float* inputs = static_cast<const float*>(x.data);
    for (int64_t i = 0; i < part; ++i) {
        int64_t row[R];
        const uint16_t* at[R];
        __m256 s[R][M];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            row[r] = first + r * part + i < last ? first + r * part + i : last - 1;
            at[r] = weight + row[r] * in;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_ps();
        }
        const auto multiply = [&](int64_t from) {
            __m256 w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) w[r] = Values<BFLOAT16>::eight(at[r] + from);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 eight = _mm256_loadu_ps(inputs + place(M, m, from));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[r][m] = _mm256_fmadd_ps(w[r], eight, s[r][m]);
            }
        };
        int64_t column = 0;
        for (; column + STEP <= in; column += STEP) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(at[r] + column) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int piece = 0; piece < STEP; piece += 8) multiply(column + piece);
        }
        for (; column + 8 <= in; column += 8) multiply(column);
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
                float sum = sum_of(s[r][m]);
                for (int64_t c = column; c < in; ++c) sum += from_bfloat16(at[r][c]) * inputs[place(M, m, c)];
                store(out, m, row[r], sum);
            }
        }
    }
}

}  // namespace

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    switch (a.type) {
        case FLOAT32: return few_of<FLOAT32>(a, in, out, first, last);
        case BFLOAT16: return few_of<BFLOAT16>(a, in, out, first, last);
        case FLOAT16: return few_of<FLOAT16>(a, in, out, first, last);
        default: return few_int8(a, in, out, first, last);
    }
}

void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    by_rows(x.rows, [&](auto rows) { dense_rows<rows()>(weight, in, x, out, first, last); });
}

}  // namespace budwood::with_avx2
