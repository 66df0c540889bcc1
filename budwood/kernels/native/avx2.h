// What the AVX2 files share: values expanded to their columns by a shuffle that a byte of places selects.
#pragma once

#include "kernels.h"

#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))

namespace budwood::with_avx2 {

// For every byte of places, the shuffle of the next values to its eight columns, with zeros in the others. The first
// three are operands of vpshufb, where a negative index gives a zero.
struct Spread {
    alignas(32) int8_t wide[256][32];     // 16 bits -> the upper half of 32
    alignas(16) int8_t halves[256][16];   // 16 bits -> 16 bits
    alignas(8) int8_t bytes[256][8];      // 8 bits -> 8 bits
    alignas(32) int32_t floats[256][8];   // 32 bits -> 32 bits; negative where none does
};

struct Tables {
    static constexpr int8_t NONE = INT8_MIN;
    Spread by[2];  // Coding
    alignas(16) int8_t behind[9][16];    // number of values before the upper eight
    alignas(8) uint8_t columns[256][8];  // that are set, in order
    uint8_t unfolded[256];               // nibbles of places -> set bits
    Tables() {
        for (int i = 0; i < 9 * 16; ++i) behind[i / 16][i % 16] = int8_t(i % 16 < 8 ? 0 : i / 16);
        for (int byte = 0; byte < 256; ++byte) {
            unfolded[byte] = uint8_t(covered(byte & 15) | covered(byte >> 4) << 4);
            fill(by[BITMASK], byte, byte);
            fill(by[NIBBLES], byte, unfolded[byte]);
            for (int column = 0, next = 0; column < 8; ++column) {
                columns[byte][column] = 0;
                if (byte >> column & 1) columns[byte][next++] = uint8_t(column);
            }
        }
    }
    static void fill(Spread& spread, int byte, int bits) {
        for (int column = 0, next = 0; column < 8; ++column) {
            const bool set = bits >> column & 1;
            for (int half = 0; half < 2; ++half) {
                const int8_t from = int8_t(set ? 2 * next + half : NONE);
                spread.wide[byte][4 * column + half] = NONE;
                spread.wide[byte][4 * column + 2 + half] = from;
                spread.halves[byte][2 * column + half] = from;
            }
            spread.bytes[byte][column] = int8_t(set ? next : NONE);
            spread.floats[byte][column] = set ? next : INT32_MIN;
            next += set;
        }
    }
};

const Tables& tables_of_bytes();

namespace {

INLINE __m128i sixteen_bytes(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
INLINE __m128i eight_bytes(const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); }

// Eight values in a row as float32, and the next values expanded to the eight columns of a byte.
template <int TYPE>
struct Values;

template <>
struct Values<BFLOAT16> {
    using Value = uint16_t;
    static INLINE __m256 eight(const Value* at) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen_bytes(at)), 16));
    }
    static INLINE __m256 spread(const Value* at, const Spread& table, uint32_t byte) {
        const __m256i to = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.wide[byte]));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen_bytes(at)), to));
    }
};

template <>
struct Values<FLOAT16> {
    using Value = uint16_t;
    static INLINE __m256 eight(const Value* at) { return _mm256_cvtph_ps(sixteen_bytes(at)); }
    static INLINE __m256 spread(const Value* at, const Spread& table, uint32_t byte) {
        return _mm256_cvtph_ps(_mm_shuffle_epi8(sixteen_bytes(at), sixteen_bytes(table.halves[byte])));
    }
};

template <>
struct Values<FLOAT32> {
    using Value = float;
    static INLINE __m256 eight(const Value* at) { return _mm256_loadu_ps(at); }
    static INLINE __m256 spread(const Value* at, const Spread& table, uint32_t byte) {
        const __m256i to = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.floats[byte]));
        const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), to);
        return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(to));
    }
};

template <>
struct Values<INT8> {
    using Value = int8_t;
    static INLINE __m256 eight(const Value* at) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(at))); }
};

// Eight values from `at` on as float32, zeros in place of those from `end` on.
INLINE __m256 widened(const void* values, int32_t type, int64_t at, int64_t end) {
    if (at + 8 > end) {
        alignas(32) float room[8] = {};
        for (int64_t i = 0; i < 8 && at + i < end; ++i) room[i] = load(values, type, at + i);
        return _mm256_load_ps(room);
    }
    switch (type) {
        case FLOAT32: return Values<FLOAT32>::eight(static_cast<const float*>(values) + at);
        case BFLOAT16: return Values<BFLOAT16>::eight(static_cast<const uint16_t*>(values) + at);
        case FLOAT16: return Values<FLOAT16>::eight(static_cast<const uint16_t*>(values) + at);
        default: return Values<INT8>::eight(static_cast<const int8_t*>(values) + at);
    }
}

INLINE float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

constexpr int AHEAD = 1024;  // bytes: prefetch distance

// The number of values of the first `bytes` of a word of places.
template <int CODING>
INLINE int64_t count_of(uint32_t word, int bytes) {
    if (CODING == NIBBLES) return 4 * bytes;
    return __builtin_popcount(bytes < 4 ? word & ((1u << (8 * bytes)) - 1) : word);
}

// R rows of the matrix at a time, from R distant parts of [first, last), with M rows of x: use(rows, safe, sums). safe: so
// near to the end of the values that `beyond` more than a row has may not be read.
template <int M, int R, class Use>
INLINE void by_parts(const Matrix& a, const Output& out, int64_t first, int64_t last, int64_t beyond, Use use) {
    const int64_t part = (last - first + R - 1) / R;
    for (int64_t i = 0; i < part; ++i) {
        int64_t rows[R];
        bool safe = false;
        for (int r = 0; r < R; ++r) {
            rows[r] = first + r * part + i < last ? first + r * part + i : first + i;
            safe = safe || a.starts[rows[r] + 1] + beyond > a.count;
        }
        float sums[R][M];
        use(rows, safe, sums);
        for (int r = 0; r < R; ++r) {
            if (r && rows[r] == rows[0]) continue;
            for (int m = 0; m < M; ++m) store(out, m, rows[r], sums[r][m]);
        }
    }
}

}  // namespace

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last);
void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last);
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last);
void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last);
bool norm(const Norm& a);
extern const Attends attends;
extern const Many by_sparse;

}  // namespace budwood::with_avx2
