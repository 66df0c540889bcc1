// What the kernels for few rows of x share: prefetching, and the sums at the end of a row.
#pragma once

#include "avx512.h"

namespace budwood::with_avx512 {
namespace {

constexpr int AHEAD = 2048;  // bytes: prefetch distance

// Places are a second stream, a short piece of each row: prefetched some rows ahead.
INLINE void prefetch_places(const Matrix& a, int64_t row) {
    const int64_t ahead = 4096 / a.stride < 2 ? 2 : 4096 / a.stride;
    const char* at = reinterpret_cast<const char*>(a.places + (row + ahead) * a.stride);
    for (int64_t byte = 0; byte < a.stride; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

// The sum of each of N vectors, N <= 16: they are added crosswise, all at once.
template <int N>
INLINE __m512 sums_of(const __m512* vectors) {
    __m512 v[16], u[8], w[4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = i < N ? vectors[i] : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        u[i] = 2 * i < N ? _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]))
                         : _mm512_setzero_ps();
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d one = _mm512_castps_pd(u[2 * i]), two = _mm512_castps_pd(u[2 * i + 1]);
        w[i] = 4 * i < N ? _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, two)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, two)))
                         : _mm512_setzero_ps();
    }
    const auto halved = [](__m512 one, __m512 two) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x88), _mm512_shuffle_f32x4(one, two, 0xdd));
    };
    return halved(halved(w[0], w[1]), N <= 8 ? _mm512_setzero_ps() : halved(w[2], w[3]));
}

// The products of two rows with M rows of x.
template <int M>
INLINE void store_pair(const Output& out, int64_t row0, int64_t row1, const __m512* sums0, const __m512* sums1) {
    __m512 all[2 * M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) all[m] = sums0[m], all[M + m] = sums1[m];
    alignas(64) float results[16];
    _mm512_store_ps(results, sums_of<2 * M>(all));
    for (int m = 0; m < M; ++m) {
        store(out, m, row0, results[m]);
        if (row1 != row0) store(out, m, row1, results[M + m]);
    }
}

}  // namespace

void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last);

}  // namespace budwood::with_avx512
