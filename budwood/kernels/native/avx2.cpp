// AVX2 with FMA and F16C: everything in float32.
//
// Few rows: eight columns at a time, the values spread to their columns by a shuffle that the mask's byte selects.
// Many rows: for each row of the matrix a list of its weights and their columns, multiplied with x turned around.
#include "kernels.h"

#include <immintrin.h>

namespace budwood {
namespace {

#define INLINE inline __attribute__((always_inline))

// For every byte of places, how the next values come to the eight columns it speaks of, and zeros to the others. The first
// three are what vpshufb takes, where a negative index gives a zero.
struct Spread {
    alignas(32) int8_t wide[256][32];     // 16 bits -> the upper half of 32
    alignas(16) int8_t halves[256][16];   // 16 bits -> 16 bits
    alignas(8) int8_t bytes[256][8];      // 8 bits -> 8 bits
    alignas(32) int32_t floats[256][8];   // 32 bits -> 32 bits; negative where none does
};

struct Tables {
    static constexpr int8_t NONE = INT8_MIN;
    Spread by[2];  // Coding
    alignas(16) int8_t behind[9][16];    // in front of the upper eight come so many
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

const Tables& tables_of_bytes() {
    static const Tables tables;  // made when first needed: never before the processor is known to have AVX2
    return tables;
}

INLINE __m128i sixteen_bytes(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
INLINE __m128i eight_bytes(const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); }

// Eight values in a row as float32, and the next values spread to the eight columns of a byte.
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

constexpr int AHEAD = 1024, NEARBY = 192;  // bytes to fetch before they are needed

// A row's mask, one byte for eight columns, with room to read on; what lies beyond the row is unset.
INLINE const uint8_t* mask_bytes(const Matrix& a, int64_t row, uint8_t* room, const Tables& tables) {
    const uint8_t* places = a.places + row * a.stride;
    if (a.coding == NIBBLES) {
        for (int64_t byte = 0; byte < a.stride; ++byte) room[byte] = tables.unfolded[places[byte]];
    } else if (a.in % 8 == 0) {
        return places;
    } else {
        std::memcpy(room, places, size_t(a.stride));
    }
    if (a.in % 8) room[a.stride - 1] &= uint8_t((1u << (a.in % 8)) - 1);
    return room;
}

// How many values the first `bytes` of a word of places stand for.
template <int CODING>
INLINE int64_t count_of(uint32_t word, int bytes) {
    if (CODING == NIBBLES) return 4 * bytes;
    return __builtin_popcount(bytes < 4 ? word & ((1u << (8 * bytes)) - 1) : word);
}

template <int TYPE, int CODING, int M, int R>
INLINE void rows_of(const Matrix& a, const int64_t* rows, bool safe, const Input& in, float (*sums)[M], const Tables& tables) {
    using Value = typename Values<TYPE>::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const Value* end = values + a.count;
    const float* x = static_cast<const float*>(in.data);
    const Spread& table = tables.by[CODING];
    const int64_t words = safe ? 0 : a.in / LANE;
    const Value* at[R];
    const uint8_t* places[R];
    __m256 s[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        at[r] = values + a.starts[rows[r]];
        places[r] = a.places + rows[r] * a.stride;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_ps();
    }
    for (int64_t word = 0; word < words; ++word, x += LANE * M) {
        uint32_t here[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            std::memcpy(&here[r], places[r] + 4 * word, 4);
            _mm_prefetch(reinterpret_cast<const char*>(at[r]) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int byte = 0; byte < LANE / 8; ++byte) {
            __m256 weights[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Value* from = at[r] + count_of<CODING>(here[r], byte);
                weights[r] = Values<TYPE>::spread(from, table, here[r] >> (8 * byte) & 255);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 inputs = _mm256_loadu_ps(x + LANE * m + 8 * byte);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[r][m] = _mm256_fmadd_ps(weights[r], inputs, s[r][m]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) at[r] += count_of<CODING>(here[r], LANE / 8);
    }
    // What is left of the rows; all of them near the end of the values, where no whole vector may be read.
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        for (int64_t byte = 4 * words; byte < a.stride; ++byte) {
            const int64_t column = 8 * byte, columns = a.in - column, left = end - at[r];
            uint32_t bits = places[r][byte];
            if (CODING == NIBBLES) bits = tables.unfolded[bits];
            if (columns < 8) bits &= (1u << columns) - 1;
            Value room[8] = {};
            if (left > 0) std::memcpy(room, at[r], size_t(left < 8 ? left : 8) * sizeof(Value));
            const __m256 weights = Values<TYPE>::spread(room, tables.by[BITMASK], bits);
            at[r] += __builtin_popcount(bits);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float* inputs = static_cast<const float*>(in.data) + place(M, m, column);
                s[r][m] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(inputs), s[r][m]);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m] = sum_of(s[r][m]);
    }
}

template <int TYPE, int CODING, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M == 1 ? 4 : M <= 6 ? 2 : 1;  // streams of memory, as many as the sums leave registers for
    const Tables& tables = tables_of_bytes();
    const int64_t part = (last - first + R - 1) / R;
    for (int64_t i = 0; i < part; ++i) {
        int64_t rows[R];
        bool safe = false;
        for (int r = 0; r < R; ++r) {
            rows[r] = first + r * part + i < last ? first + r * part + i : first + i;
            safe = safe || a.starts[rows[r] + 1] + 8 > a.count;
        }
        float sums[R][M];
        rows_of<TYPE, CODING, M, R>(a, rows, safe, in, sums, tables);
        for (int r = 0; r < R; ++r) {
            if (r && rows[r] == rows[0]) continue;
            for (int m = 0; m < M; ++m) store(out, m, rows[r], sums[r][m]);
        }
    }
}

template <int TYPE>
void few_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) {
        a.coding == NIBBLES ? few_rows<TYPE, NIBBLES, rows()>(a, in, out, first, last)
                            : few_rows<TYPE, BITMASK, rows()>(a, in, out, first, last);
    });
}

// int8: sixteen columns at a time, multiplied with activations that are 16-bit integers with a scale for every SEGMENT of
// columns, as the values have one. The sums of a segment are exact.
template <int CODING, int M, int R>
INLINE void int8_rows(const Matrix& a, const int64_t* rows, bool safe, const Input& in, float (*sums)[M], const Tables& tables) {
    const int8_t* values = static_cast<const int8_t*>(a.values);
    const int16_t* x = static_cast<const int16_t*>(in.data);
    const Spread& table = tables.by[CODING];
    const int64_t segments = segments_of(a), words = safe ? 0 : a.in / LANE;
    const int8_t* at[R];
    const uint8_t* places[R];
    __m256 totals[R][M];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
        at[r] = values + a.starts[rows[r]];
        places[r] = a.places + rows[r] * a.stride;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) totals[r][m] = _mm256_setzero_ps();
    }
    for (int64_t segment = 0; segment < segments; ++segment) {
        __m256i s[R][M];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_si256();
        }
        const int64_t end = (segment + 1) * (SEGMENT / LANE);
        int64_t word = segment * (SEGMENT / LANE);
        for (; word < (end < words ? end : words); ++word) {
            uint32_t here[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                std::memcpy(&here[r], places[r] + 4 * word, 4);
                _mm_prefetch(reinterpret_cast<const char*>(at[r]) + AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                __m256i weights[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    const uint32_t one = here[r] >> (16 * half) & 255, two = here[r] >> (16 * half + 8) & 255;
                    const __m128i each = _mm_unpacklo_epi64(eight_bytes(table.bytes[one]), eight_bytes(table.bytes[two]));
                    const __m128i to = _mm_add_epi8(each, sixteen_bytes(tables.behind[count_of<CODING>(one, 1)]));
                    const int8_t* from = at[r] + count_of<CODING>(here[r], 2 * half);
                    weights[r] = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sixteen_bytes(from), to));
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m256i inputs =
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (word * M + m) * LANE + 16 * half));
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) s[r][m] = _mm256_add_epi32(s[r][m], _mm256_madd_epi16(weights[r], inputs));
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) at[r] += count_of<CODING>(here[r], LANE / 8);
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            // What is left of the row; all of it near the end of the values.
            for (int64_t byte = 4 * word; byte < a.stride && byte < 4 * end; ++byte) {
                const int64_t column = 8 * byte, columns = a.in - column, left = values + a.count - at[r];
                uint32_t bits = places[r][byte];
                if (CODING == NIBBLES) bits = tables.unfolded[bits];
                if (columns < 8) bits &= (1u << columns) - 1;
                int8_t room[8] = {};
                if (left > 0) std::memcpy(room, at[r], size_t(left < 8 ? left : 8));
                const __m128i spread = _mm_shuffle_epi8(eight_bytes(room), eight_bytes(tables.by[BITMASK].bytes[bits]));
                const __m256i weights = _mm256_zextsi128_si256(_mm_cvtepi8_epi16(spread));
                at[r] += __builtin_popcount(bits);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m256i inputs = _mm256_zextsi128_si256(sixteen_bytes(x + place(M, m, column)));
                    s[r][m] = _mm256_add_epi32(s[r][m], _mm256_madd_epi16(weights, inputs));
                }
            }
            const float scale = a.scales[rows[r] * segments + segment];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 both = _mm256_set1_ps(scale * in.scales[m * segments + segment]);
                totals[r][m] = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(s[r][m]), totals[r][m]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) sums[r][m] = sum_of(totals[r][m]);
        each_more(a, rows[r], [&](int64_t column, float value) {
            for (int m = 0; m < M; ++m) {
                sums[r][m] += value * in.scales[m * segments + column / SEGMENT] * float(x[place(M, m, column)]);
            }
        });
    }
}

template <int CODING, int M>
void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M <= 3 ? 2 : 1;
    const Tables& tables = tables_of_bytes();
    const int64_t part = (last - first + R - 1) / R;
    for (int64_t i = 0; i < part; ++i) {
        int64_t rows[R];
        bool safe = false;
        for (int r = 0; r < R; ++r) {
            rows[r] = first + r * part + i < last ? first + r * part + i : first + i;
            safe = safe || a.starts[rows[r] + 1] + 16 > a.count;
        }
        float sums[R][M];
        int8_rows<CODING, M, R>(a, rows, safe, in, sums, tables);
        for (int r = 0; r < R; ++r) {
            if (r && rows[r] == rows[0]) continue;
            for (int m = 0; m < M; ++m) store(out, m, rows[r], sums[r][m]);
        }
    }
}

void few_int8_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) {
        a.coding == NIBBLES ? few_int8<NIBBLES, rows()>(a, in, out, first, last)
                            : few_int8<BITMASK, rows()>(a, in, out, first, last);
    });
}

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    switch (a.type) {
        case FLOAT32: return few_of<FLOAT32>(a, in, out, first, last);
        case BFLOAT16: return few_of<BFLOAT16>(a, in, out, first, last);
        case FLOAT16: return few_of<FLOAT16>(a, in, out, first, last);
        default: return few_int8_of(a, in, out, first, last);
    }
}

// x -> 16-bit integers, 32767 for the largest of a SEGMENT. A segment that holds something infinite gives NaN.
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    int16_t* all = static_cast<int16_t*>(const_cast<void*>(to.data));
    float* scales = const_cast<float*>(to.scales);
    const __m256i magnitude = _mm256_set1_epi32(INT32_MAX);
    for (int64_t segment = first; segment < last; ++segment) {
        const int64_t column = segment * SEGMENT, end = in - column < SEGMENT ? in : column + SEGMENT;
        for (int64_t row = 0; row < to.rows; ++row) {
            __m256 values[SEGMENT / 8];
            __m256i largest = _mm256_setzero_si256();  // of the bits: NaN above infinity above everything else
            for (int i = 0; i < SEGMENT / 8; ++i) {
                values[i] = widened(x, type, row * in + column + 8 * i, row * in + end);
                largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude));
            }
            alignas(32) int32_t each[8];
            _mm256_store_si256(reinterpret_cast<__m256i*>(each), largest);
            int32_t bits = 0;
            for (int i = 0; i < 8; ++i) bits = each[i] > bits ? each[i] : bits;
            float most;
            std::memcpy(&most, &bits, 4);
            const bool finite = bits < 0x7f800000;
            const float inverse = 32767 / most;
            const bool usable = finite && inverse <= 3.4028234e38f;  // else zeros, or too small for its inverse
            for (int i = 0; i < SEGMENT / 8; ++i) {
                const __m256i rounded = usable ? _mm256_cvtps_epi32(_mm256_mul_ps(values[i], _mm256_set1_ps(inverse)))
                                               : _mm256_set1_epi32(finite ? 0 : 1);
                const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(all + place(to.rows, row, column + 8 * i)), narrow);
            }
            scales[row * (to.stride / SEGMENT) + segment] = finite ? most / 32767 : __builtin_nanf("");
        }
    }
}

// --------------------------------------------------------------------------------------------------- many rows of x

constexpr int COLUMNS = 64, TOKENS = 64, LANES = TOKENS / 8;  // of x in one part of the table: 16 KB, in the first cache
constexpr int PASS = 512, ROWS = 128;                          // rows of x, of the matrix, whose sums are kept at a time
constexpr size_t PART = size_t(COLUMNS) * TOKENS * sizeof(float);

int64_t blocks_of(const Matrix& a) { return (a.in + COLUMNS - 1) / COLUMNS; }
int64_t tiles_of(const Input& in) { return (in.rows + TOKENS - 1) / TOKENS; }
int64_t tables(const Matrix& a, const Input& in) { return blocks_of(a) * tiles_of(in); }
size_t table_bytes(const Matrix& a, const Input& in) { return size_t(tables(a, in)) * PART; }

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

// Parts lie block by block, in them tile by tile: [column][token].
void tabulate(const Input& in, char* table, int64_t first, int64_t last) {
    const int64_t tiles = tiles_of(in);
    const float* x = static_cast<const float*>(in.data);
    for (int64_t part = first; part < last; ++part) {
        const int64_t block = part / tiles, tile = part % tiles;
        float* to = reinterpret_cast<float*>(table + size_t(part) * PART);
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t token = tile * TOKENS + 8 * lane;
            for (int piece = 0; piece < COLUMNS; piece += 8) {
                __m256 r[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    r[i] = token + i < in.rows ? _mm256_loadu_ps(x + (token + i) * in.stride + block * COLUMNS + piece)
                                               : _mm256_setzero_ps();
                }
                transpose(r);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) _mm256_store_ps(to + (piece + i) * TOKENS + 8 * lane, r[i]);
            }
        }
    }
}

// What one row does in one block: its weights, and the bytes from the table's beginning to their columns.
struct List {
    float weights[COLUMNS + 40];
    uint16_t entries[COLUMNS + 40];
    int count;
};

INLINE void fill(List& list, const Matrix& a, int64_t row, int64_t block, const uint8_t* mask, int64_t& at,
                 const Tables& tables) {
    const int64_t left = a.stride - block * (COLUMNS / 8), bytes = left < COLUMNS / 8 ? left : COLUMNS / 8;
    int count = 0;
    for (int64_t byte = 0; byte < bytes; ++byte) {
        const uint32_t bits = mask[block * (COLUMNS / 8) + byte];
        const __m128i columns = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tables.columns[bits])));
        const __m128i entries = _mm_slli_epi16(_mm_add_epi16(columns, _mm_set1_epi16(short(8 * byte))), 8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(list.entries + count), entries);
        count += __builtin_popcount(bits);
    }
    for (int i = 0; i < count; i += 8) _mm256_storeu_ps(list.weights + i, widened(a.values, a.type, at + i, a.count));
    if (a.type == INT8) {
        const float scale = a.scales[row * segments_of(a) + block * COLUMNS / SEGMENT];
        for (int i = 0; i < count; ++i) list.weights[i] *= scale;
    }
    at += count;
    list.count = count;
}

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

void many(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    const Tables& bytes = tables_of_bytes();
    const int64_t tiles = tiles_of(in), blocks = blocks_of(a), room = (a.stride + 63) / 64 * 64;
    const int64_t value_bytes = a.type == FLOAT32 ? 4 : a.type == INT8 ? 1 : 2;
    float* sums = static_cast<float*>(scratch(1, size_t(ROWS) * PASS * sizeof(float)));  // [tile][row][token]
    List* lists = static_cast<List*>(scratch(2, sizeof(List) * ROWS));
    uint8_t* masks = static_cast<uint8_t*>(scratch(0, size_t(ROWS * room)));
    for (int64_t row = first; row < last; row += ROWS) {
        const int rows = int(last - row < ROWS ? last - row : ROWS);
        const uint8_t* mask[ROWS];
        for (int r = 0; r < rows; ++r) mask[r] = mask_bytes(a, row + r, masks + r * room, bytes);
        for (int64_t pass = 0; pass < tiles; pass += PASS / TOKENS) {
            const int64_t here = tiles - pass < PASS / TOKENS ? tiles - pass : PASS / TOKENS;
            int64_t at[ROWS];
            More more[ROWS];
            for (int r = 0; r < rows; ++r) {
                at[r] = a.starts[row + r];
                more[r] = More(a, row + r);
            }
            for (int64_t block = 0; block < blocks; ++block) {
                for (int r = 0; r < rows; ++r) {
                    _mm_prefetch(static_cast<const char*>(a.values) + at[r] * value_bytes + NEARBY, _MM_HINT_T0);
                    List& list = lists[r];
                    fill(list, a, row + r, block, mask[r], at[r], bytes);
                    more[r].upto(a, (block + 1) * COLUMNS);
                    for (; more[r].next < more[r].stop; ++more[r].next) {
                        list.weights[list.count] = load(a.more_values, a.more_type, more[r].next);
                        list.entries[list.count++] =
                            uint16_t(a.more_columns[more[r].next] % COLUMNS * TOKENS * sizeof(float));
                    }
                }
                const char* part = table + size_t(block * tiles + pass) * PART;
                const int64_t each = (int64_t(PART / 64) + rows - 1) / rows;
                for (int64_t tile = 0; tile < here; ++tile, part += PART) {
                    for (int r = 0; r < rows; ++r) {
                        if (tile + 1 < here) {  // the next part comes nearer while this one is worked with
                            for (int64_t line = 0; line < each; ++line) {
                                _mm_prefetch(part + PART + (r * each + line) * 64, _MM_HINT_T1);
                            }
                        }
                        micro(lists[r], part, sums + (tile * ROWS + r) * TOKENS, block == 0);
                    }
                }
            }
            for (int64_t tile = 0; tile < here; ++tile) {
                const int64_t token = (pass + tile) * TOKENS;
                for (int64_t t = 0; t < TOKENS && token + t < in.rows; ++t) {
                    for (int r = 0; r < rows; ++r) store(out, token + t, row + r, sums[(tile * ROWS + r) * TOKENS + t]);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------- a matrix that was not pruned

template <int M>
void dense_rows(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M <= 3 ? 4 : 1;
    const int64_t part = (last - first + R - 1) / R;
    const float* inputs = static_cast<const float*>(x.data);
    for (int64_t i = 0; i < part; ++i) {
        int64_t row[R];
        const uint16_t* at[R];
        __m256 s[R][M];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            row[r] = first + r * part + i < last ? first + r * part + i : last - 1;
            at[r] = weight + row[r] * in;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_ps();
        }
        int64_t column = 0;
        for (; column + 8 <= in; column += 8) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(at[r] + column) + AHEAD, _MM_HINT_T0);
                const __m256 w = Values<BFLOAT16>::eight(at[r] + column);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    s[r][m] = _mm256_fmadd_ps(w, _mm256_loadu_ps(inputs + place(M, m, column)), s[r][m]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
                float sum = sum_of(s[r][m]);
                for (int64_t c = column; c < in; ++c) sum += from_bfloat16(at[r][c]) * inputs[place(M, m, c)];
                store(out, m, row[r], sum);
            }
        }
    }
}

void dense(const uint16_t* weight, int64_t in, const Input& x, const Output& out, int64_t first, int64_t last) {
    by_rows(x.rows, [&](auto rows) { dense_rows<rows()>(weight, in, x, out, first, last); });
}

}  // namespace

static const Many by_sparse = {table_bytes, tables, tabulate, many};

const Path avx2 = {"avx2", false, few, integers, &by_sparse, nullptr, dense};

}  // namespace budwood
