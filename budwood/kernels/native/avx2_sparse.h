// What the AVX2 kernels for many rows of x share: the table of x in parts, the product of a list of weights with a part,
// and how sums become y.
#pragma once

#include "avx2.h"

namespace budwood::with_avx2 {
namespace {

constexpr int COLUMNS = 64, TOKENS = 64, LANES = TOKENS / 8;  // of x in one part of the table: 16 KB, in the L1 cache
constexpr int PASS = 512;                                     // rows of x whose sums are kept at a time
constexpr size_t PART = size_t(COLUMNS) * TOKENS * sizeof(float);
constexpr int NEARBY = 192;  // bytes: prefetch distance

constexpr int ROOM = COLUMNS + 40;  // eight more than there can be are written

// One row in one block: its weights, and the byte offsets of their columns in the table.
struct List {
    float weights[ROOM];
    uint16_t entries[ROOM];
    int count;
};

INLINE void micro(const List& list, const char* table, float* sums, bool fresh) {
    __m256 s[LANES];
#pragma GCC unroll 8
    for (int k = 0; k < LANES; ++k) s[k] = fresh ? _mm256_setzero_ps() : _mm256_load_ps(sums + 8 * k);
    for (int i = 0; i < list.count; ++i) {
        const __m256 weight = _mm256_broadcast_ss(list.weights + i);
        const float* at = reinterpret_cast<const float*>(table + list.entries[i]);
#pragma GCC unroll 8
        for (int k = 0; k < LANES; ++k) s[k] = _mm256_fmadd_ps(weight, _mm256_load_ps(at + 8 * k), s[k]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < LANES; ++k) _mm256_store_ps(sums + 8 * k, s[k]);
}

INLINE void transpose(__m256 r[8]) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Bits of bfloat16, as `to_bfloat16` rounds.
INLINE __m128i rounded_to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

// y of one token for eight rows of the matrix, which follow one another or not; rows below 0 do not exist.
INLINE void store_eight(const Output& out, int64_t token, const int64_t* rows, bool follow, __m256 value) {
    const int64_t start = token * out.stride;
    if (out.type == FLOAT32) {
        float* y = static_cast<float*>(out.y) + start;
        if (follow) return _mm256_storeu_ps(y + rows[0], value);
        alignas(32) float each[8];
        _mm256_store_ps(each, value);
        for (int i = 0; i < 8; ++i) {
            if (rows[i] >= 0) y[rows[i]] = each[i];
        }
        return;
    }
    uint16_t* y = static_cast<uint16_t*>(out.y) + start;
    const __m128i half = out.type == BFLOAT16 ? rounded_to_bfloat16(value)
                                              : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (follow) return _mm_storeu_si128(reinterpret_cast<__m128i*>(y + rows[0]), half);
    alignas(16) uint16_t each[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(each), half);
    for (int i = 0; i < 8; ++i) {
        if (rows[i] >= 0) y[rows[i]] = each[i];
    }
}

// The sums [row][token] of one tile of x into y. row_of: the row of the matrix of each of `rows`, below 0 for none.
template <typename RowOf>
INLINE void store_tile(const Output& out, const float* sums, int rows, int64_t token, int64_t tokens, RowOf row_of) {
    const int64_t here = tokens - token < TOKENS ? tokens - token : TOKENS;
    for (int first = 0; first < rows; first += 8) {
        int64_t row[8];
        alignas(32) float bias[8];
        bool follow = true;
        for (int i = 0; i < 8; ++i) {
            row[i] = first + i < rows ? row_of(first + i) : -1;
            bias[i] = out.bias && row[i] >= 0 ? load(out.bias, out.type, row[i]) : 0;
            follow = follow && row[i] >= 0 && row[i] == row[0] + i;
        }
        for (int64_t t = 0; t < here; t += 8) {
            __m256 r[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                r[i] = row[i] >= 0 ? _mm256_load_ps(sums + (first + i) * TOKENS + t) : _mm256_setzero_ps();
            }
            transpose(r);
            for (int i = 0; i < 8 && t + i < here; ++i) {
                const __m256 value = out.bias ? _mm256_add_ps(r[i], _mm256_load_ps(bias)) : r[i];
                store_eight(out, token + t + i, row, follow, value);
            }
        }
    }
}

}  // namespace
}  // namespace budwood::with_avx2
