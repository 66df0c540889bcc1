// AVX2 with FMA and F16C: everything in float32.
//
// Few rows: eight columns at a time, the values spread to their columns by a permutation that the mask's byte selects.
// Many rows: for each row of the matrix a list of its weights and their columns, multiplied with x turned around.
#include "kernels.h"

#include <immintrin.h>

namespace budwood {
namespace {

#define INLINE inline __attribute__((always_inline))

// For every byte of mask: which of the next values goes to each of eight columns; negative where none does. And the
// other way: the columns that are set, in order.
struct Tables {
    alignas(32) int32_t spread[256][8];
    alignas(8) uint8_t columns[256][8];
    uint8_t unfolded[256];
    Tables() {
        for (int byte = 0; byte < 256; ++byte) {
            int next = 0;
            for (int column = 0; column < 8; ++column) columns[byte][column] = 0;
            for (int column = 0; column < 8; ++column) {
                const bool set = byte >> column & 1;
                spread[byte][column] = set ? next : INT32_MIN;
                if (set) columns[byte][next++] = uint8_t(column);
            }
            unfolded[byte] = uint8_t(covered(byte & 15) | covered(byte >> 4) << 4);
        }
    }
};

const Tables& tables_of_bytes() {
    static const Tables tables;  // made when first needed: never before the processor is known to have AVX2
    return tables;
}

template <int TYPE>
struct Values;

template <>
struct Values<BFLOAT16> {
    using Value = uint16_t;
    static INLINE __m256 eight(const Value* at) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
};

template <>
struct Values<FLOAT16> {
    using Value = uint16_t;
    static INLINE __m256 eight(const Value* at) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
};

template <>
struct Values<FLOAT32> {
    using Value = float;
    static INLINE __m256 eight(const Value* at) { return _mm256_loadu_ps(at); }
};

template <>
struct Values<INT8> {
    using Value = int8_t;
    static INLINE __m256 eight(const Value* at) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
    }
};

// Eight values from `at`, none beyond `end`.
template <int TYPE>
INLINE __m256 ending(const typename Values<TYPE>::Value* at, const typename Values<TYPE>::Value* end) {
    typename Values<TYPE>::Value room[8] = {};
    const int64_t left = end - at;
    if (left > 0) std::memcpy(room, at, size_t(left < 8 ? left : 8) * sizeof(room[0]));
    return Values<TYPE>::eight(room);
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

template <int TYPE, bool SAFE, int M, int R>
INLINE void rows_of(const Matrix& a, const int64_t* rows, const uint8_t* const* mask, const Input& in, float (*sums)[M],
                    const Tables& tables) {
    using Value = typename Values<TYPE>::Value;
    const Value* values = static_cast<const Value*>(a.values);
    const Value* end = values + a.count;
    const float* x = static_cast<const float*>(in.data);
    const Value* at[R];
    __m256 s[R][M];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
        at[r] = values + a.starts[rows[r]];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_ps();
    }
    const int64_t segments = segments_of(a);
    for (int64_t byte = 0; byte < a.stride; ++byte) {
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(at[r]) + AHEAD, _MM_HINT_T0);
            const uint32_t bits = mask[r][byte];
            const __m256i to = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.spread[bits]));
            const __m256 packed = SAFE ? ending<TYPE>(at[r], end) : Values<TYPE>::eight(at[r]);
            __m256 weights = _mm256_permutevar8x32_ps(packed, to);
            weights = _mm256_blendv_ps(weights, _mm256_setzero_ps(), _mm256_castsi256_ps(to));
            if (TYPE == INT8) {
                weights = _mm256_mul_ps(weights, _mm256_broadcast_ss(a.scales + rows[r] * segments + byte / (SEGMENT / 8)));
            }
            at[r] += __builtin_popcount(bits);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                s[r][m] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + place(M, m, 8 * byte)), s[r][m]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m] = sum_of(s[r][m]);
    }
}

template <int TYPE, int M>
void few_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M <= 3 ? 2 : 1;  // two streams of memory where the sums leave registers for it
    const Tables& tables = tables_of_bytes();
    const int64_t part = (last - first + R - 1) / R, room = (a.stride + 63) / 64 * 64;
    uint8_t* masks = static_cast<uint8_t*>(scratch(0, size_t(R * room)));
    const float* x = static_cast<const float*>(in.data);
    for (int64_t i = 0; i < part; ++i) {
        int64_t rows[R];
        const uint8_t* mask[R];
        bool safe = false;
        for (int r = 0; r < R; ++r) {
            rows[r] = first + r * part + i < last ? first + r * part + i : first + i;
            mask[r] = mask_bytes(a, rows[r], masks + r * room, tables);
            safe = safe || a.starts[rows[r] + 1] + 8 > a.count;
        }
        float sums[R][M];
        safe ? rows_of<TYPE, true, M, R>(a, rows, mask, in, sums, tables)
             : rows_of<TYPE, false, M, R>(a, rows, mask, in, sums, tables);
        for (int r = 0; r < R; ++r) {
            if (r && rows[r] == rows[0]) continue;
            each_more(a, rows[r], [&](int64_t column, float value) {
                for (int m = 0; m < M; ++m) sums[r][m] += value * x[place(M, m, column)];
            });
            for (int m = 0; m < M; ++m) store(out, m, rows[r], sums[r][m]);
        }
    }
}

template <int TYPE>
void few_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) { few_rows<TYPE, rows()>(a, in, out, first, last); });
}

void few(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    switch (a.type) {
        case FLOAT32: return few_of<FLOAT32>(a, in, out, first, last);
        case BFLOAT16: return few_of<BFLOAT16>(a, in, out, first, last);
        case FLOAT16: return few_of<FLOAT16>(a, in, out, first, last);
        default: return few_of<INT8>(a, in, out, first, last);
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
#pragma GCC unroll 2
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

INLINE __m256 widened(const Matrix& a, int64_t at) {
    if (at + 8 > a.count) {
        alignas(32) float room[8] = {};
        for (int64_t i = 0; i < 8 && at + i < a.count; ++i) room[i] = load(a.values, a.type, at + i);
        return _mm256_load_ps(room);
    }
    switch (a.type) {
        case FLOAT32: return Values<FLOAT32>::eight(static_cast<const float*>(a.values) + at);
        case BFLOAT16: return Values<BFLOAT16>::eight(static_cast<const uint16_t*>(a.values) + at);
        case FLOAT16: return Values<FLOAT16>::eight(static_cast<const uint16_t*>(a.values) + at);
        default: return Values<INT8>::eight(static_cast<const int8_t*>(a.values) + at);
    }
}

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
    for (int i = 0; i < count; i += 8) _mm256_storeu_ps(list.weights + i, widened(a, at + i));
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

const Path avx2 = {"avx2", false, few, nullptr, &by_sparse, nullptr, dense};

}  // namespace budwood
