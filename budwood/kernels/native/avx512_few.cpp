// AVX-512, few rows of x, where memory is the limit: values are spread to their columns in a register (vpexpand) and
// multiplied there. Two rows of the matrix from the two halves of a thread's range are read together, so that each
// thread keeps two distant streams going.
#include "avx512.h"

namespace budwood::with_avx512 {
namespace {

template <bool SAFE>
INLINE __m512 read16(const float* at, const float* end) {
    if (!SAFE) return _mm512_loadu_ps(at);
    const int64_t left = end - at;
    const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    return _mm512_maskz_loadu_ps(some, at);
}

// A step spreads the next values of a row to the 32 columns that `word` names, and moves on behind them; then it multiplies
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

// The same, with unset bits behind the row up to a multiple of 64.
INLINE const uint8_t* padded_mask(const Matrix& a, int64_t row, uint8_t* room) {
    const uint8_t* mask = mask_bytes(a, row, room);
    if (a.in % 64 == 0) return mask;
    if (mask != room) std::memcpy(room, mask, size_t(a.stride));
    if (a.in % 8) room[a.stride - 1] &= uint8_t((1u << (a.in % 8)) - 1);
    std::memset(room + a.stride, 0, 8);
    return room;
}

// Places are a stream beside the values, a short piece of each row: it is fetched some rows ahead.
INLINE void prefetch_places(const Matrix& a, int64_t row) {
    const int64_t ahead = 4096 / a.stride < 2 ? 2 : 4096 / a.stride;
    const char* at = reinterpret_cast<const char*>(a.places + (row + ahead) * a.stride);
    for (int64_t byte = 0; byte < a.stride; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

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

constexpr int AHEAD = 2048;  // bytes to fetch before they are needed
constexpr int64_t FURTHER[2] = {AHEAD, AHEAD};

// Words [from, to) of two rows with M rows of x. ahead: how many bytes further the values lie that are fetched meanwhile.
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

// One row of x, two words at a time: two chains of sums a row.
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

// What two rows give with M rows of x.
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

template <class Step, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    using Value = typename Step::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const int64_t words = (a.in + 31) / 32, half = (last - first + 1) / 2, room = (a.stride + 127) / 64 * 64;
    // Activations of as many columns as stay near the first cache; sums are put aside between such blocks.
    int64_t block = words;
    constexpr int64_t cache = 40 << 10, line = LANE * sizeof(typename Step::X);
    if (M > 1) {
        const int64_t blocks = (words * line * M + cache - 1) / cache;
        block = (words + blocks - 1) / blocks;
    }
    constexpr int CHUNK = 32;  // pairs of rows between two looks at the same activations
    uint8_t* folded = a.coding == NIBBLES ? static_cast<uint8_t*>(scratch(0, size_t(2 * CHUNK * room))) : nullptr;
    alignas(64) float aside[CHUNK][2][M][16];
    const uint8_t* mask[CHUNK][2];
    const Value* at[CHUNK][2];
    const int64_t chunk = block < words ? CHUNK : 1;
    const auto partner = [&](int64_t row) { return row + half < last ? row + half : row; };  // an odd one out meets itself
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
                // In a block, what comes next is another row's.
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
                // Reading whole vectors must not leave the values behind the last row.
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

// int8: the activations are 16-bit integers with a scale for every SEGMENT of columns, as the values have one. Their
// products are summed exactly; each segment's sum is multiplied by both scales. What a 16-bit integer loses of an
// activation is less than a thousandth of what bfloat16 did.
template <bool SAFE>
INLINE __m512i spread_bytes(uint64_t bits, const int8_t*& at, const int8_t* end) {
    const int64_t left = SAFE ? end - at : 64;
    const __m512i packed = left >= 64 ? _mm512_loadu_si512(at)
                                      : _mm512_maskz_loadu_epi8(left <= 0 ? 0ull : (1ull << left) - 1, at);
    at += __builtin_popcountll(bits);
    return expand(__mmask64(bits), packed);
}

template <bool SAFE, int M>
INLINE void int8_segment(const uint8_t* const mask[2], const int8_t*& at0, const int8_t*& at1, const int8_t* end,
                         const int16_t* x, int steps, __m512i* sums0, __m512i* sums1) {
    for (int step = 0; step < steps; ++step, x += 2 * LANE * M) {
        uint64_t bits[2];
        std::memcpy(&bits[0], mask[0] + 8 * step, 8);
        std::memcpy(&bits[1], mask[1] + 8 * step, 8);
        const __m512i one = spread_bytes<SAFE>(bits[0], at0, end), two = spread_bytes<SAFE>(bits[1], at1, end);
        const __m512i low0 = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(one));
        const __m512i high0 = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(one, 1));
        const __m512i low1 = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(two));
        const __m512i high1 = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(two, 1));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i low = _mm512_loadu_si512(x + LANE * m), high = _mm512_loadu_si512(x + LANE * (M + m));
            sums0[m] = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums0[m], low0, low), high0, high);
            sums1[m] = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums1[m], low1, low), high1, high);
        }
    }
}

// Recovered weights of a pair of rows: where each row's are, segment by segment.
struct Recovered {
    const uint8_t* counts[2];
    int64_t next[2];
    Recovered(const Matrix& a, int64_t row0, int64_t row1) : counts{}, next{} {
        if (!a.more_starts) return;
        const int64_t segments = segments_of(a), rows[2] = {row0, row1};
        for (int r = 0; r < 2; ++r) counts[r] = a.more_counts + rows[r] * segments, next[r] = a.more_starts[rows[r]];
    }
};

// What the recovered weights of both rows in one segment give, sixteen of each at a time: their activations are picked from
// the 256 of the segment by four lookups.
template <int M>
INLINE void add_recovered(const Matrix& a, Recovered& recovered, int64_t segment, const int16_t* x, const float* scales,
                          int64_t segments, __m512* total0, __m512* total1) {
    int left[2] = {recovered.counts[0][segment], recovered.counts[1][segment]};
    while (left[0] > 0 || left[1] > 0) {
        __m128i columns[2];
        __m512 weights[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            const __mmask16 some = left[r] >= 16 ? 0xffff : left[r] <= 0 ? 0 : __mmask16((1u << left[r]) - 1);
            columns[r] = _mm_maskz_loadu_epi8(some, a.more_columns + recovered.next[r]);
            weights[r] = read_values(a.more_values, a.more_type, recovered.next[r], some);
            recovered.next[r] += left[r] < 16 ? (left[r] > 0 ? left[r] : 0) : 16;
            left[r] -= 16;
        }
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_set_m128i(columns[1], columns[0]));
        const __mmask32 odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), upper = _mm512_movepi16_mask(_mm512_slli_epi16(at, 8));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512i found[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int16_t* from = x + LANE * (2 * M * i + m);
                found[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + LANE * M));
            }
            const __m512i lower = _mm512_mask_blend_epi16(odd, found[0], found[1]);
            const __m512i picked = _mm512_mask_blend_epi16(upper, lower, _mm512_mask_blend_epi16(odd, found[2], found[3]));
            const __m512 one = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(picked)));
            const __m512 two = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(picked, 1)));
            const __m512 scale = _mm512_set1_ps(scales[m * segments]);
            total0[m] = _mm512_fmadd_ps(_mm512_mul_ps(weights[0], scale), one, total0[m]);
            total1[m] = _mm512_fmadd_ps(_mm512_mul_ps(weights[1], scale), two, total1[m]);
        }
    }
}

// Fetches what `add_recovered` will need of a later row: three short pieces, too short for the processor to see them coming.
INLINE void prefetch_recovered(const Matrix& a, int64_t row) {
    const int64_t later = row + 8;
    if (!a.more_starts || later >= a.out) return;
    const int64_t first = a.more_starts[later], count = a.more_starts[later + 1] - first, bytes = a.more_type == FLOAT32 ? 4 : 2;
    _mm_prefetch(reinterpret_cast<const char*>(a.more_counts) + later * segments_of(a), _MM_HINT_T0);
    for (int64_t byte = 0; byte < count; byte += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(a.more_columns) + first + byte, _MM_HINT_T0);
    }
    for (int64_t byte = 0; byte < count * bytes; byte += 64) {
        _mm_prefetch(static_cast<const char*>(a.more_values) + first * bytes + byte, _MM_HINT_T0);
    }
}

template <int M>
void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    const int8_t* values = static_cast<const int8_t*>(a.values);
    const int8_t* end = values + a.count;
    const int16_t* x = static_cast<const int16_t*>(in.data);
    const int64_t half = (last - first + 1) / 2, segments = segments_of(a), room = (a.stride + 191) / 64 * 64;
    uint8_t* folded = static_cast<uint8_t*>(scratch(0, size_t(2 * room)));
    for (int64_t p = 0; p < half; ++p) {
        const int64_t row0 = first + p, row1 = row0 + half < last ? row0 + half : row0;
        // Read as words, so unset bits are needed behind a row that does not end with one.
        const uint8_t* const masks[2] = {padded_mask(a, row0, folded), padded_mask(a, row1, folded + room)};
        const int8_t *at0 = values + a.starts[row0], *at1 = values + a.starts[row1];
        prefetch_places(a, row0);
        prefetch_places(a, row1);
        prefetch_recovered(a, row0);
        prefetch_recovered(a, row1);
        const bool safe = a.starts[row1 + 1] + 64 > a.count || a.starts[row0 + 1] + 64 > a.count;
        Recovered recovered(a, row0, row1);
        __m512 total0[M], total1[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total0[m] = total1[m] = _mm512_setzero_ps();
        for (int64_t segment = 0; segment < segments; ++segment) {
            const int64_t column = segment * SEGMENT, left = (a.in - column + 63) / 64;
            const int steps = int(left < SEGMENT / 64 ? left : SEGMENT / 64);
            const int16_t* here = x + column * M;
            __m512i sums0[M], sums1[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums0[m] = sums1[m] = _mm512_setzero_si512();
            for (int line = 0; line < 128; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(at0) + AHEAD + line, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(at1) + AHEAD + line, _MM_HINT_T0);
            }
            const uint8_t* const mask[2] = {masks[0] + column / 8, masks[1] + column / 8};
            safe ? int8_segment<true, M>(mask, at0, at1, end, here, steps, sums0, sums1)
                 : int8_segment<false, M>(mask, at0, at1, end, here, steps, sums0, sums1);
            const float scale0 = a.scales[row0 * segments + segment], scale1 = a.scales[row1 * segments + segment];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float scale = in.scales[m * segments + segment];
                total0[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale0 * scale), _mm512_cvtepi32_ps(sums0[m]), total0[m]);
                total1[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale1 * scale), _mm512_cvtepi32_ps(sums1[m]), total1[m]);
            }
            if (a.more_starts) add_recovered<M>(a, recovered, segment, here, in.scales + segment, segments, total0, total1);
        }
        store_pair<M>(out, row0, row1, total0, total1);
    }
}

void few_int8_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) { few_int8<rows()>(a, in, out, first, last); });
}

// A matrix that was never pruned.
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
    if (a.type == INT8) return few_int8_of(a, in, out, first, last);
    if (in.bfloat16) return few_of<Dot>(a, in, out, first, last);
    if (a.type == BFLOAT16) return few_of<Bfloat16>(a, in, out, first, last);
    if (a.type == FLOAT16) return few_of<Float16>(a, in, out, first, last);
    return few_of<Float32>(a, in, out, first, last);
}

// x -> 16-bit integers, 32767 for the largest of a SEGMENT. A segment that holds something infinite gives NaN.
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    int16_t* all = static_cast<int16_t*>(const_cast<void*>(to.data));
    float* scales = const_cast<float*>(to.scales);
    const __m512 sign = _mm512_set1_ps(-0.0f);
    for (int64_t segment = first; segment < last; ++segment) {
        const int64_t column = segment * SEGMENT, count = in - column < SEGMENT ? in - column : SEGMENT;
        for (int64_t row = 0; row < to.rows; ++row) {
            __m512 largest = _mm512_setzero_ps(), values[SEGMENT / 16];
            for (int i = 0; i < SEGMENT / 16; ++i) {
                const int64_t left = count - 16 * i;
                const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
                values[i] = read_values(x, type, row * in + column + 16 * i, some);
                // As integers, so that NaN is larger than infinity and that than everything else.
                largest = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest),
                                                               _mm512_castps_si512(_mm512_andnot_ps(sign, values[i]))));
            }
            const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(largest));
            float most;
            std::memcpy(&most, &bits, 4);
            const bool finite = bits < 0x7f800000;
            const float inverse = 32767 / most;
            const bool usable = finite && inverse <= 3.4028234e38f;  // else zeros, or too small for its inverse
            for (int i = 0; i < SEGMENT / 16; ++i) {
                const __m512i rounded = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(values[i], _mm512_set1_ps(inverse)))
                                               : _mm512_set1_epi32(finite ? 0 : 1);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(all + place(to.rows, row, column + 16 * i)),
                                    _mm512_cvtepi32_epi16(rounded));
            }
            scales[row * (to.stride / SEGMENT) + segment] = finite ? most / 32767 : __builtin_nanf("");
        }
    }
}

void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    by_rows(x.rows, [&](auto rows) { dense_rows<rows()>(weight, in, x, out, first, last); });
}

}  // namespace budwood::with_avx512
