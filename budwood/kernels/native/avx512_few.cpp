// AVX-512, few rows of x, limited by memory: values are expanded to their columns in a register (vpexpand) and
// multiplied there. Two rows of the matrix from the two halves of a thread's range are read together, so that each
// thread keeps two distant streams going.
#include "avx512_few.h"

namespace budwood::with_avx512 {
namespace {

template <bool SAFE>
INLINE __m512 read16(const float* at, const float* end) {
    if (!SAFE) return _mm512_loadu_ps(at);
    const int64_t left = end - at;
    const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    return _mm512_maskz_loadu_ps(some, at);
}

// A step expands the next values of a row to the 32 columns of `word`, and advances past them; then it multiplies
// those of two rows with the same columns of M rows of x.

// bfloat16 values, bfloat16 activations: exact products, float32 sums.
struct Dot {
    using Value = uint16_t;
    using X = uint16_t;
    using Weights = __m512i;
    template <bool SAFE>
    static INLINE Weights spread(uint32_t word, const Value*& at, const Value* end) {
        const __m512i spread = expand(__mmask32(word), read32<SAFE>(at, end));
        at += __builtin_popcount(word);
        return spread;
    }
    template <int M>
    static INLINE void add(Weights one, Weights two, const X* x, __m512* sums1, __m512* sums2) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i input = _mm512_loadu_si512(x + LANE * m);
            sums1[m] = _mm512_dpbf16_ps(sums1[m], (__m512bh)one, (__m512bh)input);
            sums2[m] = _mm512_dpbf16_ps(sums2[m], (__m512bh)two, (__m512bh)input);
        }
    }
};

// Everything else in float32.
struct Wide {
    using X = float;
    struct Weights {
        __m512 low, high;
    };
    template <int M>
    static INLINE void add(Weights one, Weights two, const X* x, __m512* sums1, __m512* sums2) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512 low = _mm512_loadu_ps(x + LANE * m), high = _mm512_loadu_ps(x + LANE * m + 16);
            sums1[m] = _mm512_fmadd_ps(one.high, high, _mm512_fmadd_ps(one.low, low, sums1[m]));
            sums2[m] = _mm512_fmadd_ps(two.high, high, _mm512_fmadd_ps(two.low, low, sums2[m]));
        }
    }
};

struct Bfloat16 : Wide {
    using Value = uint16_t;
    template <bool SAFE>
    static INLINE Weights spread(uint32_t word, const Value*& at, const Value* end) {
        const __m512i spread = Dot::spread<SAFE>(word, at, end);
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(spread));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(spread, 1));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
    }
};

struct Float16 : Wide {
    using Value = uint16_t;
    template <bool SAFE>
    static INLINE Weights spread(uint32_t word, const Value*& at, const Value* end) {
        const __m512i spread = Dot::spread<SAFE>(word, at, end);
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(spread)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(spread, 1))};
    }
};

struct Float32 : Wide {
    using Value = float;
    template <bool SAFE>
    static INLINE Weights spread(uint32_t word, const Value*& at, const Value* end) {
        const __m512 low = expand(__mmask16(word), read16<SAFE>(at, end));
        at += __builtin_popcount(word & 0xffff);
        const __m512 high = expand(__mmask16(word >> 16), read16<SAFE>(at, end));
        at += __builtin_popcount(word >> 16);
        return {low, high};
    }
};

INLINE uint32_t word_at(const uint8_t* mask, int64_t word) {
    uint32_t bits;
    std::memcpy(&bits, mask + 4 * word, 4);
    return bits;
}

// The bits of the last columns where `in` does not divide by 32.
INLINE uint32_t last_word(const Matrix& a, const uint8_t* mask) {
    const int64_t word = a.in / 32, columns = a.in % 32;
    uint32_t bits = 0;
    std::memcpy(&bits, mask + 4 * word, size_t((columns + 7) / 8));
    return bits & ((1u << columns) - 1);
}
constexpr int64_t FURTHER[2] = {AHEAD, AHEAD};

// Words [from, to) of two rows with M rows of x. ahead: prefetch distance in bytes.
template <class Step, bool SAFE, int M>
INLINE void pair(const Matrix& a, const uint8_t* const mask[2], const typename Step::Value* at[2], const Input& in,
                 int64_t from, int64_t to, const int64_t ahead[2], __m512* sums0, __m512* sums1) {
    using Value = typename Step::Value;
    const Value* end = static_cast<const Value*>(a.values) + a.count;
    const typename Step::X* x = static_cast<const typename Step::X*>(in.data) + LANE * M * from;
    const Value *at0 = at[0], *at1 = at[1];
    const int64_t whole = a.in / LANE;
    int64_t word = from;
    const int64_t ahead0 = ahead[0], ahead1 = ahead[1];
    for (; word < (to < whole ? to : whole); ++word, x += LANE * M) {
        _mm_prefetch(reinterpret_cast<const char*>(at0) + ahead0, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at1) + ahead1, _MM_HINT_T0);
        const auto one = Step::template spread<SAFE>(word_at(mask[0], word), at0, end);
        const auto two = Step::template spread<SAFE>(word_at(mask[1], word), at1, end);
        Step::template add<M>(one, two, x, sums0, sums1);
    }
    if (word < to) {
        const auto one = Step::template spread<true>(last_word(a, mask[0]), at0, end);
        const auto two = Step::template spread<true>(last_word(a, mask[1]), at1, end);
        Step::template add<M>(one, two, x, sums0, sums1);
    }
    at[0] = at0;
    at[1] = at1;
}

// One row of x, two words at a time: two chains of sums per row.
template <class Step>
INLINE void pair_of_one(const Matrix& a, const uint8_t* const mask[2], const typename Step::Value* at[2], const Input& in,
                        __m512* sums0, __m512* sums1) {
    using Value = typename Step::Value;
    const Value* end = static_cast<const Value*>(a.values) + a.count;
    const typename Step::X* x = static_cast<const typename Step::X*>(in.data);
    const Value *at0 = at[0], *at1 = at[1];
    __m512 other0[1] = {_mm512_setzero_ps()}, other1[1] = {_mm512_setzero_ps()};
    const int64_t even = a.in / (2 * LANE) * 2;
    for (int64_t word = 0; word < even; word += 2) {
        _mm_prefetch(reinterpret_cast<const char*>(at0) + AHEAD, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at1) + AHEAD, _MM_HINT_T0);
        const auto one = Step::template spread<false>(word_at(mask[0], word), at0, end);
        const auto two = Step::template spread<false>(word_at(mask[1], word), at1, end);
        Step::template add<1>(one, two, x + LANE * word, sums0, sums1);
        const auto three = Step::template spread<false>(word_at(mask[0], word + 1), at0, end);
        const auto four = Step::template spread<false>(word_at(mask[1], word + 1), at1, end);
        Step::template add<1>(three, four, x + LANE * (word + 1), other0, other1);
    }
    sums0[0] = _mm512_add_ps(sums0[0], other0[0]);
    sums1[0] = _mm512_add_ps(sums1[0], other1[0]);
    at[0] = at0;
    at[1] = at1;
    pair<Step, false, 1>(a, mask, at, in, even, (a.in + LANE - 1) / LANE, FURTHER, sums0, sums1);
}

template <class Step, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    using Value = typename Step::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const int64_t words = (a.in + 31) / 32, half = (last - first + 1) / 2, room = (a.stride + 127) / 64 * 64;
    // Activations of as many columns as stay near the L1 cache; sums are saved between such blocks.
    int64_t block = words;
    constexpr int64_t cache = 40 << 10, line = LANE * sizeof(typename Step::X);
    if (M > 1) {
        const int64_t blocks = (words * line * M + cache - 1) / cache;
        block = (words + blocks - 1) / blocks;
    }
    constexpr int CHUNK = 32;  // pairs of rows between two uses of the same activations
    uint8_t* folded = a.coding == NIBBLES ? static_cast<uint8_t*>(scratch(0, size_t(2 * CHUNK * room))) : nullptr;
    alignas(64) float aside[CHUNK][2][M][16];
    const uint8_t* mask[CHUNK][2];
    const Value* at[CHUNK][2];
    const int64_t chunk = block < words ? CHUNK : 1;
    const auto partner = [&](int64_t row) { return row + half < last ? row + half : row; };  // an odd row is its own partner
    for (int64_t start = 0; start < half; start += chunk) {
        const int64_t pairs = half - start < chunk ? half - start : chunk;
        for (int64_t p = 0; p < pairs; ++p) {
            const int64_t row[2] = {first + start + p, partner(first + start + p)};
            for (int r = 0; r < 2; ++r) {
                mask[p][r] = mask_bytes(a, row[r], folded + (2 * p + r) * room);
                at[p][r] = values + a.starts[row[r]];
            }
        }
        for (int64_t from = 0; from < words; from += block) {
            const int64_t to = from + block < words ? from + block : words;
            for (int64_t p = 0; p < pairs; ++p) {
                const int64_t row0 = first + start + p;
                const int64_t row1 = partner(row0);
                __m512 sums0[M], sums1[M];
                // In a block the next values belong to another row.
                int64_t ahead[2] = {AHEAD, AHEAD};
                for (int r = 0; r < 2 && block < words; ++r) ahead[r] = (at[(p + 1) % pairs][r] - at[p][r]) * int64_t(sizeof(Value));
                if (from == 0) {
                    prefetch_places(a, row0);
                    prefetch_places(a, row1);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) sums0[m] = sums1[m] = _mm512_setzero_ps();
                } else {
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        sums0[m] = _mm512_load_ps(aside[p][0][m]);
                        sums1[m] = _mm512_load_ps(aside[p][1][m]);
                    }
                }
                // Whole vectors must not be read beyond the values of the last row.
                const bool safe = a.starts[row1 + 1] + 32 > a.count || a.starts[row0 + 1] + 32 > a.count;
                if (safe) {
                    pair<Step, true, M>(a, mask[p], at[p], in, from, to, ahead, sums0, sums1);
                } else if (M == 1) {
                    pair_of_one<Step>(a, mask[p], at[p], in, sums0, sums1);
                } else {
                    pair<Step, false, M>(a, mask[p], at[p], in, from, to, ahead, sums0, sums1);
                }
                if (to < words) {
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        _mm512_store_ps(aside[p][0][m], sums0[m]);
                        _mm512_store_ps(aside[p][1][m], sums1[m]);
                    }
                } else {
                    store_pair<M>(out, row0, row1, sums0, sums1);
                }
            }
        }
    }
}

template <class Step>
void few_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) { few_rows<Step, rows()>(a, in, out, first, last); });
}

// A dense matrix.
template <int M>
void dense_rows(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    constexpr int STREAMS = M <= 4 ? 4 : 2;
    const int64_t each = (last - first + STREAMS - 1) / STREAMS;
    const uint16_t* inputs = static_cast<const uint16_t*>(x.data);
    for (int64_t i = 0; i < each; ++i) {
        int64_t row[STREAMS];
        const uint16_t* at[STREAMS];
        __m512 sums[STREAMS][M];
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; ++s) {
            row[s] = first + s * each + i < last ? first + s * each + i : last - 1;
            at[s] = weight + row[s] * in;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[s][m] = _mm512_setzero_ps();
        }
        for (int64_t column = 0; column < in; column += 32) {
            const int64_t left = in - column;
            const __mmask32 some = left >= 32 ? ~0u : (1u << left) - 1;
#pragma GCC unroll 4
            for (int s = 0; s < STREAMS; ++s) {
                _mm_prefetch(reinterpret_cast<const char*>(at[s] + column) + AHEAD, _MM_HINT_T0);
                const __m512i w = _mm512_maskz_loadu_epi16(some, at[s] + column);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m512i input = _mm512_loadu_si512(inputs + column * M + LANE * m);
                    sums[s][m] = _mm512_dpbf16_ps(sums[s][m], (__m512bh)w, (__m512bh)input);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; ++s) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) store(out, m, row[s], _mm512_reduce_add_ps(sums[s][m]));
        }
    }
}

}  // namespace

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    if (a.type == INT8) return few_int8(a, in, out, first, last);
    if (in.bfloat16) return few_of<Dot>(a, in, out, first, last);
    if (a.type == BFLOAT16) return few_of<Bfloat16>(a, in, out, first, last);
    if (a.type == FLOAT16) return few_of<Float16>(a, in, out, first, last);
    return few_of<Float32>(a, in, out, first, last);
}

void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    by_rows(x.rows, [&](auto rows) { dense_rows<rows()>(weight, in, x, out, first, last); });
}

}  // namespace budwood::with_avx512
