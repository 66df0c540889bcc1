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

// The next values of a row at the columns that `word` says; moves on behind them.
template <bool SAFE>
INLINE __m512i spread32(uint32_t word, const uint16_t*& at, const uint16_t* end) {
    const __m512i spread = _mm512_maskz_expand_epi16(word, read32<SAFE>(at, end));
    at += __builtin_popcount(word);
    return spread;
}

// bfloat16 values, bfloat16 activations: exact products, float32 sums.
struct Dot {
    using Value = uint16_t;
    using X = uint16_t;
    template <bool SAFE, int M>
    static INLINE void step(uint32_t word, const Value*& at, const Value* end, const X* x, int64_t ldx, __m512* sums) {
        const __m512i spread = spread32<SAFE>(word, at, end);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i input = _mm512_loadu_si512(x + m * ldx);
            sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)spread, (__m512bh)input);
        }
    }
};

template <int M>
INLINE void add32(__m512 low, __m512 high, const float* x, int64_t ldx, __m512* sums) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        sums[m] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + m * ldx), sums[m]);
        sums[m] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + m * ldx + 16), sums[m]);
    }
}

struct Bfloat16 {
    using Value = uint16_t;
    using X = float;
    template <bool SAFE, int M>
    static INLINE void step(uint32_t word, const Value*& at, const Value* end, const X* x, int64_t ldx, __m512* sums) {
        const __m512i spread = spread32<SAFE>(word, at, end);
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(spread));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(spread, 1));
        add32<M>(_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)), x, ldx,
                 sums);
    }
};

struct Float16 {
    using Value = uint16_t;
    using X = float;
    template <bool SAFE, int M>
    static INLINE void step(uint32_t word, const Value*& at, const Value* end, const X* x, int64_t ldx, __m512* sums) {
        const __m512i spread = spread32<SAFE>(word, at, end);
        add32<M>(_mm512_cvtph_ps(_mm512_castsi512_si256(spread)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(spread, 1)), x,
                 ldx, sums);
    }
};

struct Float32 {
    using Value = float;
    using X = float;
    template <bool SAFE, int M>
    static INLINE void step(uint32_t word, const Value*& at, const Value* end, const X* x, int64_t ldx, __m512* sums) {
        const __m512 low = _mm512_maskz_expand_ps(__mmask16(word), read16<SAFE>(at, end));
        at += __builtin_popcount(word & 0xffff);
        const __m512 high = _mm512_maskz_expand_ps(__mmask16(word >> 16), read16<SAFE>(at, end));
        at += __builtin_popcount(word >> 16);
        add32<M>(low, high, x, ldx, sums);
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
    const typename Step::X* x = static_cast<const typename Step::X*>(in.data);
    const Value *at0 = at[0], *at1 = at[1];
    const int64_t whole = a.in / 32;
    int64_t word = from;
    const int64_t ahead0 = ahead[0], ahead1 = ahead[1];
    for (; word < (to < whole ? to : whole); ++word) {
        _mm_prefetch(reinterpret_cast<const char*>(at0) + ahead0, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at1) + ahead1, _MM_HINT_T0);
        Step::template step<SAFE, M>(word_at(mask[0], word), at0, end, x + 32 * word, in.stride, sums0);
        Step::template step<SAFE, M>(word_at(mask[1], word), at1, end, x + 32 * word, in.stride, sums1);
    }
    if (word < to) {
        Step::template step<true, M>(last_word(a, mask[0]), at0, end, x + 32 * word, in.stride, sums0);
        Step::template step<true, M>(last_word(a, mask[1]), at1, end, x + 32 * word, in.stride, sums1);
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
    const int64_t even = a.in / 64 * 2;
    for (int64_t word = 0; word < even; word += 2) {
        _mm_prefetch(reinterpret_cast<const char*>(at0) + AHEAD, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at1) + AHEAD, _MM_HINT_T0);
        Step::template step<false, 1>(word_at(mask[0], word), at0, end, x + 32 * word, 0, sums0);
        Step::template step<false, 1>(word_at(mask[1], word), at1, end, x + 32 * word, 0, sums1);
        Step::template step<false, 1>(word_at(mask[0], word + 1), at0, end, x + 32 * word + 32, 0, other0);
        Step::template step<false, 1>(word_at(mask[1], word + 1), at1, end, x + 32 * word + 32, 0, other1);
    }
    sums0[0] = _mm512_add_ps(sums0[0], other0[0]);
    sums1[0] = _mm512_add_ps(sums1[0], other1[0]);
    at[0] = at0;
    at[1] = at1;
    pair<Step, false, 1>(a, mask, at, in, even, (a.in + 31) / 32, FURTHER, sums0, sums1);
}

template <class Step, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    using Value = typename Step::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const int64_t words = (a.in + 31) / 32, half = (last - first + 1) / 2, room = (a.stride + 127) / 64 * 64;
    // Activations of as many columns as stay near the first cache; sums are put aside between such blocks.
    int64_t block = words;
    constexpr int64_t cache = 40 << 10, line = 32 * sizeof(typename Step::X);
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
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        store(out, m, row0, _mm512_reduce_add_ps(sums0[m]));
                        if (row1 != row0) store(out, m, row1, _mm512_reduce_add_ps(sums1[m]));
                    }
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
    __m512i packed;
    if (SAFE) {
        const int64_t left = end - at;
        packed = _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : left <= 0 ? 0ull : (1ull << left) - 1, at);
    } else {
        packed = _mm512_loadu_si512(at);
        asm("" : "+v"(packed));  // vpexpand straight from memory is many times slower than from a register
    }
    at += __builtin_popcountll(bits);
    return _mm512_maskz_expand_epi8(bits, packed);
}

template <bool SAFE, int M>
INLINE void int8_segment(const uint8_t* mask, const int8_t*& at, const int8_t* end, const int16_t* x, int64_t ldx, int steps,
                         __m512i* sums) {
    for (int step = 0; step < steps; ++step) {
        uint64_t bits;
        std::memcpy(&bits, mask + 8 * step, 8);
        const __m512i bytes = spread_bytes<SAFE>(bits, at, end);
        const __m512i low = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
        const __m512i high = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const int16_t* input = x + m * ldx + 64 * step;
            sums[m] = _mm512_dpwssd_epi32(sums[m], low, _mm512_loadu_si512(input));
            sums[m] = _mm512_dpwssd_epi32(sums[m], high, _mm512_loadu_si512(input + 32));
        }
    }
}

// What the recovered weights of a row give, sixteen at a time, with the activations as they came.
template <int M>
INLINE void add_more(const Matrix& a, int64_t row, const Input& in, float* result) {
    if (!a.more_starts) return;
    const int64_t first = a.more_starts[row], count = a.more_starts[row + 1] - first, segments = segments_of(a);
    int32_t* columns = static_cast<int32_t*>(scratch(1, size_t(count + 16) * sizeof(int32_t)));
    for (int64_t segment = 0, next = 0; segment < segments; ++segment) {
        const int here = a.more_counts[row * segments + segment];
        for (int i = 0; i < here; i += 16) {
            const __mmask16 some = here - i >= 16 ? 0xffff : __mmask16((1u << (here - i)) - 1);
            const __m128i inside = _mm_maskz_loadu_epi8(some, a.more_columns + first + next + i);
            const __m512i all = _mm512_add_epi32(_mm512_cvtepu8_epi32(inside), _mm512_set1_epi32(int(segment * SEGMENT)));
            _mm512_storeu_si512(columns + next + i, all);
        }
        next += here;
    }
    __m512 sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = count - i >= 16 ? 0xffff : __mmask16((1u << (count - i)) - 1);
        const __m512 weights = read_values(a.more_values, a.more_type, first + i, some);
        const __m512i at = _mm512_loadu_si512(columns + i);
        for (int m = 0; m < M; ++m) {
            const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, in.exact + m * in.stride, 4);
            sums[m] = _mm512_fmadd_ps(weights, x, sums[m]);
        }
    }
    for (int m = 0; m < M; ++m) result[m] += _mm512_reduce_add_ps(sums[m]);
}

// Fetches what `add_more` will need of a later row: three short pieces, too short for the processor to see them coming.
INLINE void prefetch_more(const Matrix& a, int64_t row) {
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
        const uint8_t* mask0 = padded_mask(a, row0, folded);
        const uint8_t* mask1 = padded_mask(a, row1, folded + room);
        const int8_t *at0 = values + a.starts[row0], *at1 = values + a.starts[row1];
        prefetch_places(a, row0);
        prefetch_places(a, row1);
        prefetch_more(a, row0);
        prefetch_more(a, row1);
        const bool safe = a.starts[row1 + 1] + 64 > a.count || a.starts[row0 + 1] + 64 > a.count;
        __m512 total0[M], total1[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total0[m] = total1[m] = _mm512_setzero_ps();
        for (int64_t segment = 0; segment < segments; ++segment) {
            const int64_t column = segment * SEGMENT, left = (a.in - column + 63) / 64;
            const int steps = int(left < SEGMENT / 64 ? left : SEGMENT / 64);
            __m512i sums0[M], sums1[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums0[m] = sums1[m] = _mm512_setzero_si512();
            for (int line = 0; line < 128; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(at0) + AHEAD + line, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(at1) + AHEAD + line, _MM_HINT_T0);
            }
            const uint8_t *m0 = mask0 + column / 8, *m1 = mask1 + column / 8;
            if (safe) {
                int8_segment<true, M>(m0, at0, end, x + column, in.stride, steps, sums0);
                int8_segment<true, M>(m1, at1, end, x + column, in.stride, steps, sums1);
            } else {
                int8_segment<false, M>(m0, at0, end, x + column, in.stride, steps, sums0);
                int8_segment<false, M>(m1, at1, end, x + column, in.stride, steps, sums1);
            }
            const float scale0 = a.scales[row0 * segments + segment], scale1 = a.scales[row1 * segments + segment];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float scale = in.scales[m * segments + segment];
                total0[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale0 * scale), _mm512_cvtepi32_ps(sums0[m]), total0[m]);
                total1[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale1 * scale), _mm512_cvtepi32_ps(sums1[m]), total1[m]);
            }
        }
        const int64_t rows[2] = {row0, row1};
        for (int r = 0; r < (row1 == row0 ? 1 : 2); ++r) {
            float result[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) result[m] = _mm512_reduce_add_ps(r ? total1[m] : total0[m]);
            add_more<M>(a, rows[r], in, result);
            for (int m = 0; m < M; ++m) store(out, m, rows[r], result[m]);
        }
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
                    const __m512i input = _mm512_loadu_si512(inputs + m * x.stride + column);
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

void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    by_rows(x.rows, [&](auto rows) { dense_rows<rows()>(weight, in, x, out, first, last); });
}

}  // namespace budwood::with_avx512
