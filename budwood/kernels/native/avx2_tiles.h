// How the AVX2 kernels read tiles.
#pragma once

#include "avx2.h"
#include "tiles.h"

#define UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

namespace budwood::tiles {
namespace {

INLINE __m256i load_line(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE __m256 joined(__m128 low, __m128 high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1); }

// Four bits in two's complement as float32: they become the lower bits of a number of 2^23 and more, with the sign bit turned.
INLINE __m256 number_of(__m256i bits) {
    const __m256 number = _mm256_castsi256_ps(_mm256_xor_si256(bits, _mm256_set1_epi32(0x4b000008)));
    return _mm256_sub_ps(number, _mm256_set1_ps(0x1p23f + 8));
}

// Vector v of a tile: weights as float32 times WEIGHT_SCALE, and codes in the lowest two bits of each lane.
template <int TYPE>
INLINE void lanes(const char* tile, int v, __m256& weight, __m256i& code) {
    if (TYPE == BFLOAT16) {
        const __m256i two = load_line(tile + 32 * (v / 2));
        const __m256i value = v % 2 ? two : _mm256_slli_epi32(two, 16);
        code = _mm256_srli_epi32(two, v % 2 ? 16 + CODE : CODE);
        weight = _mm256_castsi256_ps(_mm256_and_si256(value, _mm256_set1_epi32(int(0xffffu << 16 & ~(3u << (16 + CODE))))));
    } else if (TYPE == FLOAT32) {
        const __m256i one = load_line(tile + 32 * v);
        code = _mm256_srli_epi32(one, WIDE_CODE);
        weight = _mm256_castsi256_ps(_mm256_and_si256(one, _mm256_set1_epi32(int(~(3u << WIDE_CODE)))));
    } else if (TYPE == SHORTS) {
        const int half = v / 2 % 2, first = v / 8 * 16 + 8 * half, part = v / 4 % 2 * 2, high = v % 2;  // words; parts of words
        const auto by = [](int low, int next) { return _mm256_setr_epi32(low, low, low, low, next, next, next, next); };
        const __m128i words = _mm_load_si128(at<const __m128i>(tile, 2 * first));
        const __m128i bytes = _mm_cvtepu16_epi32(_mm_loadl_epi64(at<const __m128i>(tile, 64 + first)));
        const int shift = 16 * high + 4 * part, code_shift = 8 * high + 2 * part;
        code = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(bytes), by(code_shift, code_shift + 2));
        const __m256i field = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(words), by(shift, shift + 4));
        weight = number_of(_mm256_and_si256(field, _mm256_set1_epi32(15)));
    } else if (TYPE == INT4) {  // a field becomes the lower bits of a number of 2^23 and more, from which that is subtracted
        const __m256i high = v == 15 ? load_line(tile + 32) : _mm256_setzero_si256();
        const __m256i word = load_line(tile + 32 * (v % 15 / 5)), field = _mm256_srli_epi32(word, v == 15 ? 30 : 6 * (v % 5));
        __m256i bits = _mm256_and_si256(field, _mm256_set1_epi32(15 << 2));
        if (v == 15) {
            const __m256i lower = _mm256_and_si256(_mm256_srli_epi32(high, 28), _mm256_set1_epi32(3 << 2));
            bits = _mm256_or_si256(
                lower, _mm256_and_si256(_mm256_srli_epi32(load_line(tile + 64), 26), _mm256_set1_epi32(3 << 4)));
        }
        code = field;
        // The sign bit is turned: two's complement, plus 8.
        const __m256 number = _mm256_castsi256_ps(_mm256_xor_si256(bits, _mm256_set1_epi32(0x4b000000 | 8 << 2)));
        weight = _mm256_sub_ps(number, _mm256_set1_ps(0x1p23f + (8 << 2)));
    } else {
        code = _mm256_srli_epi32(load_line(tile), 2 * v);
        if (TYPE == FLOAT16) {
            weight = _mm256_cvtph_ps(_mm_load_si128(at<const __m128i>(tile, 32 + 16 * v)));
            return;
        }
        // A byte goes to the top of its lane.
        const __m256i four = load_line(tile + 32 + 32 * (v / 4));
        const int top = 0x00808080 + (v % 4 << 24), lane = 4 << 24;
        const __m256i to = _mm256_setr_epi32(top, top + lane, top + 2 * lane, top + 3 * lane, top, top + lane,
                                             top + 2 * lane, top + 3 * lane);
        weight = _mm256_cvtepi32_ps(v % 4 == 0   ? _mm256_slli_epi32(four, 24)
                                    : v % 4 == 3 ? _mm256_and_si256(four, _mm256_set1_epi32(int(0xff000000)))
                                                 : _mm256_shuffle_epi8(four, to));
    }
}

// 8 bfloat16 scales of a group of columns, one for each row of a strip.
INLINE __m256 group_scales(const char* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_load_si128(at<const __m128i>(p, 0))), 16));
}

// Column `column` of eight of a tile of a DENSE matrix, from the word of its rows.
INLINE __m256 whole_column(__m256i word, int column) {
    return number_of(_mm256_and_si256(_mm256_srli_epi32(word, 4 * column), _mm256_set1_epi32(15)));
}

INLINE void transpose(__m256 r[8]) {
    __m256 t[8], u[8];
    UNROLLED(i, 8) t[i] = i % 2 ? _mm256_unpackhi_ps(r[i - 1], r[i]) : _mm256_unpacklo_ps(r[i], r[i + 1]);
    UNROLLED(i, 8) {
        const int from = i / 4 * 4 + i % 4 / 2;
        u[i] = i % 2 ? _mm256_shuffle_ps(t[from], t[from + 2], 0xee) : _mm256_shuffle_ps(t[from], t[from + 2], 0x44);
    }
    UNROLLED(i, 8) {
        r[i] = i < 4 ? _mm256_permute2f128_ps(u[i], u[i + 4], 0x20) : _mm256_permute2f128_ps(u[i - 4], u[i], 0x31);
    }
}

}  // namespace

int64_t bytes(const Matrix& a);
int64_t border(const Matrix& a, int part, int parts);
// A thread's part of the products of matrices, which may differ in the type of their values.
using Few = decltype(Tiled::few);
void few(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs, int part,
         int parts);
// The same with another kernel for INT4 values, which takes matrices of one `type_of`, as `few_int4` does.
void few_of_any(Few int4, const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows,
                const Output* outputs, int part, int parts);
void few_int4(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs, int part,
              int parts);
extern const Many by_sparse;

}  // namespace budwood::tiles
