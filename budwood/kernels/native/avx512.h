// What the AVX-512 files share: reading values and masks.
#pragma once

#include "kernels.h"

#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))

namespace budwood::with_avx512 {

// The next values of a row: up to 32 from `at`, none beyond `end`.
template <bool SAFE>
INLINE __m512i read32(const uint16_t* at, const uint16_t* end) {
    if (!SAFE) return _mm512_loadu_si512(at);
    const int64_t left = end - at;
    const __mmask32 some = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    return _mm512_maskz_loadu_epi16(some, at);
}

// Expands the first values to the lanes of `where`, zeros between. vpexpand waits for the former contents of its destination,
// although none remain; a zero there breaks the dependency: 3.5 cycles for a word of 32 columns, not 6.4 (Zen 4).
// From a register: straight from memory it is many times slower.
#define EXPAND(instruction, vector)                              \
    vector spread;                                               \
    asm("vpxord %0, %0, %0\n\t" instruction " %1, %0%{%2%}%{z%}" \
        : "=&v"(spread)                                          \
        : "v"(values), "Yk"(where));                             \
    return spread

INLINE __m512i expand(__mmask32 where, __m512i values) { EXPAND("vpexpandw", __m512i); }
INLINE __m512i expand(__mmask64 where, __m512i values) { EXPAND("vpexpandb", __m512i); }
INLINE __m512 expand(__mmask16 where, __m512 values) { EXPAND("vexpandps", __m512); }

#undef EXPAND

// Sixteen values from `index` on, those of `some`, as float32.
INLINE __m512 read_values(const void* values, int32_t type, int64_t index, __mmask16 some) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(values) + index);
    if (type == INT8) {
        const __m128i raw = _mm_maskz_loadu_epi8(some, static_cast<const int8_t*>(values) + index);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
    }
    const __m256i raw = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(values) + index);
    if (type == FLOAT16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Nibbles of places -> nibbles of set bits, 64 bytes at a time. `to` has room for whole vectors.
INLINE void unfold(const uint8_t* places, int64_t bytes, uint8_t* to) {
    alignas(16) static const uint8_t set[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(set)));
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t byte = 0; byte < bytes; byte += 64) {
        const __mmask64 some = bytes - byte >= 64 ? ~0ull : (1ull << (bytes - byte)) - 1;
        const __m512i packed = _mm512_maskz_loadu_epi8(some, places + byte);
        const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, nibble));
        const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble));
        _mm512_storeu_si512(to + byte, _mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
    }
}

// A row's mask as bytes that may be read as words: in place, unless it must be converted first.
INLINE const uint8_t* mask_bytes(const Matrix& a, int64_t row, uint8_t* room) {
    const uint8_t* places = a.places + row * a.stride;
    if (a.coding == BITMASK) return places;
    unfold(places, a.stride, room);
    return room;
}

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last);
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last);
void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last);

extern const Many by_sparse;
extern const Many by_panels;

}  // namespace budwood::with_avx512
