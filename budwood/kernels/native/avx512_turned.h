// What products with many rows of x share: sixteen rows of it transposed, and sums transposed back into rows of y.
#pragma once

#include "avx512.h"

namespace budwood::with_avx512 {
namespace {

// Sixteen rows of sixteen 32-bit elements, transposed.
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Rows of x from `token`, 64 bytes from `column`; zeros beyond the rows there are (columns are padded already).
INLINE void sixteen(const Input& in, int64_t token, int64_t column, size_t width, __m512i r[16]) {
    const char* data = static_cast<const char*>(in.data);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        r[i] = token + i < in.rows ? _mm512_loadu_si512(data + (size_t(token + i) * in.stride + column) * width)
                                   : _mm512_setzero_si512();
    }
}

// Sums [rows][tokens] of sixteen tokens -> y [token][row].
void write(const Output& out, const float* sums, int64_t stride, int64_t row, int rows, int64_t token, int64_t tokens) {
    for (int from = 0; from < rows; from += 16) {
        const int some = rows - from < 16 ? rows - from : 16;
        const __mmask16 there = some == 16 ? 0xffff : __mmask16((1u << some) - 1);
        const int64_t first = row + from;
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            r[i] = i < some ? _mm512_load_si512(sums + (from + i) * stride) : _mm512_setzero_si512();
        }
        transpose(r);
        __m512 bias = _mm512_setzero_ps();
        if (out.bias) {
            alignas(64) float wide[16] = {};
            for (int i = 0; i < some; ++i) wide[i] = load(out.bias, out.type, first + i);
            bias = _mm512_load_ps(wide);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (token + i >= tokens) break;
            const __m512 y = _mm512_add_ps(_mm512_castsi512_ps(r[i]), bias);
            const int64_t index = (token + i) * out.stride + first;
            if (out.type == FLOAT32) {
                _mm512_mask_storeu_ps(static_cast<float*>(out.y) + index, there, y);
            } else {
                const __m256i half = out.type == BFLOAT16 ? (__m256i)_mm512_cvtneps_pbh(y) : _mm512_cvtps_ph(y, 0);
                _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + index, there, half);
            }
        }
    }
}

}  // namespace
}  // namespace budwood::with_avx512
