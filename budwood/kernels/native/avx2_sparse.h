// What the AVX2 kernels for many rows of x share: the table of x in parts, and the product of a list of weights with a part.
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

}  // namespace
}  // namespace budwood::with_avx2
