// AVX-512, many rows of x, limited by arithmetic. A table holds for every group of four columns the six pairs of
// activations for two kept weights; a pair of weights is one dot-product instruction with the entry its places
// select, so half the multiplications of a dense product are skipped. In float32 an entry is one column.
#include "avx512_turned.h"

namespace budwood::with_avx512 {
namespace {

constexpr int COLUMNS = 64;    // of x in one part of the table, so that it stays in the L1 cache
constexpr int GROUPS = COLUMNS / 4;
constexpr int PASS = 512;      // rows of x whose sums are kept at a time
constexpr int LINES = 2;       // prefetch distance
constexpr int ROWS = 256;      // of the matrix whose sums are kept at a time

// Rows of x are processed in tiles of one, two or four vectors of sixteen.
int vectors_for(int64_t rows) { return rows <= 16 ? 1 : rows <= 32 ? 2 : 4; }
size_t part_bytes(const Input& in) { return size_t(in.bfloat16 ? 6 * GROUPS : COLUMNS) * vectors_for(in.rows) * 64; }
int64_t blocks_of(const Matrix& a) { return (a.in + COLUMNS - 1) / COLUMNS; }
int64_t tiles_of(const Input& in) { return (in.rows + 16 * vectors_for(in.rows) - 1) / (16 * vectors_for(in.rows)); }

template <int V>
constexpr int SHIFT = V == 1 ? 6 : V == 2 ? 7 : 8;  // bytes of an entry of the table, as a power of two

// R rows in one block: for each of `count` weights (or pairs of weights) of a row its index in the table. The
// first BASE come sixteen to a vector, from which they are broadcast; the others of a row one by one.
template <int R>
struct List {
    uint32_t weights[16 * R];  // [row][16]
    uint16_t entries[16 * R];  // [16][row]
};
template <int R>
struct Rest {
    uint32_t weights[R];
    uint16_t entries[R];
};

// Nibble of mask -> the two columns of its pair, completed where fewer are kept, and the number of the pair.
alignas(16) const uint8_t FIRST_TWO[16] = {3, 3, 3, 3, 5, 5, 6, 3, 9, 9, 10, 3, 12, 5, 6, 3};
alignas(16) const uint8_t PAIR[16] = {0, 0, 0, 0, 1, 1, 3, 0, 2, 2, 4, 0, 5, 1, 3, 0};

INLINE __m512i lookup(const uint8_t* table, __m512i keys) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), keys);
}

// Eight masks of 64 columns: which columns go as pairs, and the numbers of the pairs, sixteen bytes a row.
INLINE void choose_pairs(const uint64_t* masks, uint64_t* chosen, uint8_t* numbers) {
    const __m512i nibble = _mm512_set1_epi8(15), bytes = _mm512_loadu_si512(masks);
    const __m512i low = _mm512_and_si512(bytes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    _mm512_storeu_si512(chosen, _mm512_or_si512(lookup(FIRST_TWO, low), _mm512_slli_epi16(lookup(FIRST_TWO, high), 4)));
    const __m512i even = lookup(PAIR, low), odd = lookup(PAIR, high);
    const __m512i first = _mm512_unpacklo_epi8(even, odd), second = _mm512_unpackhi_epi8(even, odd);  // rows 0 2 4 6, 1 3 5 7
    const __m512i take = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), rest = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(numbers, _mm512_permutex2var_epi64(first, take, second));
    _mm512_storeu_si512(numbers + 64, _mm512_permutex2var_epi64(first, rest, second));
}

// Sixteen bytes of each of R rows -> [16][R]: the first of every row, then the second of every row...
template <int R>
INLINE void interleave(const uint8_t* const* rows, __m128i* mixed) {
    __m128i by_four[R / 4][4];  // four bytes of four rows each
#pragma GCC unroll 2
    for (int four = 0; four < R / 4; ++four) {
        __m128i n[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) n[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 * four + r]));
        const __m128i a = _mm_unpacklo_epi8(n[0], n[1]), b = _mm_unpackhi_epi8(n[0], n[1]);
        const __m128i c = _mm_unpacklo_epi8(n[2], n[3]), d = _mm_unpackhi_epi8(n[2], n[3]);
        by_four[four][0] = _mm_unpacklo_epi16(a, c), by_four[four][1] = _mm_unpackhi_epi16(a, c);
        by_four[four][2] = _mm_unpacklo_epi16(b, d), by_four[four][3] = _mm_unpackhi_epi16(b, d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        mixed[i] = R == 4   ? by_four[0][i % 4]
                   : i % 2 ? _mm_unpackhi_epi32(by_four[0][i / 2 % 4], by_four[R / 4 - 1][i / 2 % 4])
                           : _mm_unpacklo_epi32(by_four[0][i / 2 % 4], by_four[R / 4 - 1][i / 2 % 4]);
    }
}

// Numbers of pairs, sixteen bytes for each of R rows -> their places in the table, [group][row].
template <int V, int R>
INLINE void place_pairs(const uint8_t* numbers, const int* order, uint16_t* entries) {
    const uint8_t* rows[R];
    for (int k = 0; k < R; ++k) rows[k] = numbers + 16 * order[k];
    __m128i mixed[R];
    interleave<R>(rows, mixed);
    constexpr short S = R == 4 ? 6 : 0;  // from one group to the next; eight rows fill half a vector each
    const __m256i steps = R == 4 ? _mm256_setr_epi16(0, 0, 0, 0, S, S, S, S, 2 * S, 2 * S, 2 * S, 2 * S, 3 * S, 3 * S, 3 * S, 3 * S)
                                 : _mm256_setr_epi16(0, 0, 0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 6, 6);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        const __m256i base = _mm256_add_epi16(steps, _mm256_set1_epi16(short(6 * (16 / R) * i)));
        const __m256i places = _mm256_slli_epi16(_mm256_add_epi16(_mm256_cvtepu8_epi16(mixed[i]), base), SHIFT<V>);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries + 16 * i), places);
    }
}

// Columns, sixteen bytes for each of R rows -> their places in the table, [column][row].
template <int V, int R>
INLINE void place_columns(const uint8_t* const* rows, uint16_t* entries) {
    __m128i mixed[R];
    interleave<R>(rows, mixed);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        const __m256i places = _mm256_slli_epi16(_mm256_cvtepu8_epi16(mixed[i]), SHIFT<V>);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries + 16 * i), places);
    }
}

// The weights of the chosen columns, two by two; sixteen pairs, and one more vector is overwritten.
template <bool SAFE>
INLINE void list_pairs(const Matrix& a, uint64_t mask, uint64_t chosen, int64_t at, uint32_t* weights) {
    const uint16_t* values = static_cast<const uint16_t*>(a.values);
    if (!(chosen & ~mask)) {  // as in every row of 2:4 with recovered weights
        const uint64_t stay = _pext_u64(chosen, mask);  // of the values in memory
        const __m512i first = _mm512_maskz_compress_epi16(uint32_t(stay), read32<SAFE>(values + at, values + a.count));
        const __m512i second = _mm512_maskz_compress_epi16(uint32_t(stay >> 32), read32<SAFE>(values + at + 32, values + a.count));
        _mm512_storeu_si512(weights, first);
        _mm512_storeu_si512(reinterpret_cast<uint16_t*>(weights) + __builtin_popcount(uint32_t(stay)), second);
        return;
    }
    const uint32_t low = uint32_t(mask), high = uint32_t(mask >> 32);
    const int64_t middle = at + __builtin_popcount(low);
    const __m512i first = expand(__mmask32(low), read32<SAFE>(values + at, values + a.count));
    const __m512i second = expand(__mmask32(high), read32<SAFE>(values + middle, values + a.count));
    const __m512i left = _mm512_maskz_compress_epi16(uint32_t(chosen), first);
    const __m512i right = _mm512_maskz_compress_epi16(uint32_t(chosen >> 32), second);
    _mm512_storeu_si512(weights, _mm512_inserti64x4(left, _mm512_castsi512_si256(right), 1));
}

// `count` values from `at` on as float32; whole vectors are written.
INLINE void list_singles(const Matrix& a, int64_t row, int64_t block, int count, int64_t at, float* weights) {
    const float scale = a.type == INT8 ? a.scales[row * segments_of(a) + block * COLUMNS / SEGMENT] : 1;
    for (int i = 0; i < count; i += 16) {
        const __mmask16 some = count - i >= 16 ? 0xffff : __mmask16((1u << (count - i)) - 1);
        const __m512 values = _mm512_mul_ps(_mm512_set1_ps(scale), read_values(a.values, a.type, at + i, some));
        _mm512_storeu_ps(weights + i, values);
    }
}

struct Iota {
    uint8_t bytes[64];
    constexpr Iota() : bytes() {
        for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i);
    }
};

template <bool PAIRS>
INLINE __m512 add(__m512 sum, __m512i weight, __m512i entry) {
    return PAIRS ? _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)entry)
                 : _mm512_fmadd_ps(_mm512_castsi512_ps(weight), _mm512_castsi512_ps(entry), sum);
}

// R rows with one part of the table.
template <bool PAIRS, int V, int R>
INLINE void micro(const List<R>* lists, int count, const Rest<R>* rest, int beyond, const char* table, float* const* sums,
                  bool fresh) {
    __m512 s[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) s[r][v] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums[r] + 16 * v);
    }
    const __m512i one = _mm512_set1_epi32(1);
    for (; count > 0; count -= 16, ++lists) {
        __m512i w[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) w[r] = _mm512_loadu_si512(lists->weights + 16 * r);
        __m512i index = _mm512_setzero_si512();
        const uint16_t* e = lists->entries;
        for (int i = 0; i < (PAIRS ? 16 : count < 16 ? count : 16); ++i, e += R) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m512i weight = _mm512_permutexvar_epi32(index, w[r]);
                const char* at = table + e[r];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) s[r][v] = add<PAIRS>(s[r][v], weight, _mm512_load_si512(at + 64 * v));
            }
            index = _mm512_add_epi32(index, one);
        }
    }
    for (int i = 0; i < beyond; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i weight = _mm512_set1_epi32(int32_t(rest[i].weights[r]));
            const char* at = table + rest[i].entries[r];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) s[r][v] = add<PAIRS>(s[r][v], weight, _mm512_load_si512(at + 64 * v));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_store_ps(sums[r] + 16 * v, s[r][v]);
    }
}

template <bool PAIRS, int V>
void many_of(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    constexpr int R = V == 4 ? 4 : 8, TOKENS = 16 * V, LONGEST = 96;
    const int64_t tiles = tiles_of(in), blocks = blocks_of(a), room = (a.stride + 127) / 64 * 64;
    const size_t bytes = part_bytes(in);
    const int64_t lines = int64_t(bytes / 64), value_bytes = a.type == FLOAT32 ? 4 : a.type == INT8 ? 1 : 2;
    // One row more than there are: for the padding of the last R.
    constexpr int64_t tile_sums = int64_t(ROWS + 1) * TOKENS;
    float* sums = static_cast<float*>(scratch(1, size_t(PASS / TOKENS * tile_sums) * sizeof(float)));
    List<R>* lists = static_cast<List<R>*>(scratch(2, sizeof(List<R>) * (ROWS / R + 1) * (LONGEST / 16)));
    Rest<R>* rests = static_cast<Rest<R>*>(scratch(3, sizeof(Rest<R>) * (ROWS / R + 1) * 32));
    uint8_t* masks = static_cast<uint8_t*>(scratch(0, size_t(ROWS * room)));
    for (int64_t row = first; row < last; row += ROWS) {
        const int rows = int(last - row < ROWS ? last - row : ROWS);
        const uint8_t* mask[ROWS];
        for (int r = 0; r < rows; ++r) mask[r] = mask_bytes(a, row + r, masks + r * room);
        for (int64_t pass = 0; pass < tiles; pass += PASS / TOKENS) {
            const int64_t here = tiles - pass < PASS / TOKENS ? tiles - pass : PASS / TOKENS;
            int64_t at[ROWS];
            More more[ROWS];
            for (int r = 0; r < rows; ++r) {
                at[r] = a.starts[row + r];
                more[r] = More(a, row + r);
            }
            for (int64_t block = 0; block < blocks; ++block) {
                alignas(64) uint64_t bits[ROWS] = {}, chosen[ROWS];
                alignas(64) uint8_t numbers[(ROWS + 1) * 16] = {};
                uint8_t counts[ROWS];
                const char* soon[ROWS][2];
                int begin[LONGEST + 2] = {}, order[ROWS + R];
                const int64_t left = a.in - block * COLUMNS;
                for (int r = 0; r < rows; ++r) {
                    if (left >= COLUMNS) {
                        std::memcpy(&bits[r], mask[r] + 8 * block, 8);
                    } else {
                        std::memcpy(&bits[r], mask[r] + 8 * block, size_t((left + 7) / 8));
                        bits[r] &= (1ull << left) - 1;
                    }
                }
                // Rows are read a line at a time, too seldom for the hardware prefetcher: prefetch what the next blocks need,
                // and near the end what the rows need that come in place of these.
                const int64_t line = LINES + 1 + block - blocks;
                const char* values = static_cast<const char*>(a.values);
                for (int r = 0; r < rows; ++r) {
                    const int64_t next = row + ROWS + r;
                    soon[r][0] = values + at[r] * value_bytes + 64 * (LINES + 1);
                    soon[r][1] = line >= 0 && next < last ? values + a.starts[next] * value_bytes + 64 * line
                                                          : reinterpret_cast<const char*>(mask[r]) + 8 * block + 64;
                }
                // Rows of similar length together: a count that seldom changes is predicted well.
                if (PAIRS) {
                    for (int r = 0; r < rows; r += 8) choose_pairs(bits + r, chosen + r, numbers + 16 * r);
                    for (int r = 0; r < rows; ++r) counts[r] = uint8_t(__builtin_popcountll(bits[r] & ~chosen[r]));
                } else {
                    for (int r = 0; r < rows; ++r) {
                        more[r].upto(a, (block + 1) * COLUMNS);
                        const int64_t held = __builtin_popcountll(bits[r]);
                        counts[r] = uint8_t(held + more[r].in_block(LONGEST - held));
                    }
                }
                for (int r = 0; r < rows; ++r) ++begin[counts[r] + 1];
                for (int c = 1; c <= LONGEST; ++c) begin[c] += begin[c - 1];
                for (int r = 0; r < rows; ++r) order[begin[counts[r]]++] = r;
                for (int i = rows; i < rows + R; ++i) order[i] = ROWS;
                List<R>* list = lists;
                Rest<R>* rest = rests;
                alignas(64) static const Iota iota;
                alignas(64) float weights[LONGEST + 16];
                alignas(64) uint8_t columns[R][LONGEST + 32] = {};
                for (int i = 0; i < rows; i += R) {
                    const int end = i + R < rows ? i + R : rows, longest = counts[order[end - 1]];
                    if (end - i < R) {
                        std::memset(list, 0, sizeof(List<R>) * (PAIRS ? 1 : LONGEST / 16));
                    }
                    for (int k = 0; k < end - i; ++k) {
                        const int r = order[i + k];
                        if (PAIRS) {
                            const bool safe = at[r] + 64 > a.count;
                            safe ? list_pairs<true>(a, bits[r], chosen[r], at[r], list->weights + 16 * k)
                                 : list_pairs<false>(a, bits[r], chosen[r], at[r], list->weights + 16 * k);
                            int n = 0;
                            const uint16_t* values = static_cast<const uint16_t*>(a.values) + at[r];
                            for (uint64_t left_over = bits[r] & ~chosen[r]; left_over; left_over &= left_over - 1, ++n) {
                                const int column = __builtin_ctzll(left_over), inside = column % 4;  // 2 or 3
                                const uint32_t value = values[__builtin_popcountll(bits[r] & ((1ull << column) - 1))];
                                rest[n].weights[k] = value << 16;  // the second of the pair (0, inside)
                                rest[n].entries[k] = uint16_t((column / 4 * 6 + inside - 1) << SHIFT<V>);
                            }
                            for (; n < longest; ++n) rest[n].weights[k] = 0, rest[n].entries[k] = 0;
                            at[r] += __builtin_popcountll(bits[r]);
                            continue;
                        }
                        // Weights and columns of this row, zeros up to the longest row of the R.
                        int n = __builtin_popcountll(bits[r]);
                        list_singles(a, row + r, block, n, at[r], weights);
                        at[r] += n;
                        _mm512_store_si512(columns[k], _mm512_maskz_compress_epi8(bits[r], _mm512_load_si512(iota.bytes)));
                        for (; n < counts[r]; ++n, ++more[r].next) {
                            weights[n] = load(a.more_values, a.more_type, more[r].next);
                            columns[k][n] = uint8_t(a.more_columns[more[r].next] % COLUMNS);
                        }
                        more[r].next = more[r].stop;
                        for (; n < (longest + 15) / 16 * 16; ++n) weights[n] = 0, columns[k][n] = 0;
                        for (int c = 0; c < longest; c += 16) {
                            _mm512_storeu_ps(list[c / 16].weights + 16 * k, _mm512_load_ps(weights + c));
                        }
                    }
                    if (PAIRS) {
                        place_pairs<V, R>(numbers, order + i, list->entries);  // overwrites the weights
                    } else {
                        for (int c = 0; c < longest; c += 16) {
                            const uint8_t* sixteen[R];
                            for (int k = 0; k < R; ++k) sixteen[k] = columns[k] + c;
                            place_columns<V, R>(sixteen, list[c / 16].entries);
                        }
                    }
                    list += PAIRS ? 1 : (longest + 15) / 16;
                    if (PAIRS) {
                        for (int k = end - i; k < R; ++k) {
                            for (int n = 0; n < longest; ++n) rest[n].weights[k] = 0, rest[n].entries[k] = 0;
                        }
                        rest += longest;
                    }
                }
                const char* part = table + size_t(block * tiles + pass) * bytes;
                const int64_t each = (lines * R + rows - 1) / rows;
                for (int64_t tile = 0; tile < here; ++tile, part += bytes) {
                    // Prefetch the next part while this one is used.
                    const char* next = tile + 1 < here ? part + bytes : table + size_t((block + 1) % blocks * tiles + pass) * bytes;
                    const List<R>* its = lists;
                    const Rest<R>* own = rests;
                    for (int i = 0; i < rows; i += R) {
                        const int longest = counts[order[(i + R < rows ? i + R : rows) - 1]];
                        float* to[R];
#pragma GCC unroll 8
                        for (int k = 0; k < R; ++k) to[k] = sums + tile * tile_sums + order[i + k] * TOKENS;
                        const char* lines_here = next + i / R * each * 64;
                        for (int64_t line = 0; line < each; ++line) _mm_prefetch(lines_here + 64 * line, _MM_HINT_T1);
                        for (int k = i; tile == 0 && k < i + R && k < rows; ++k) {
                            _mm_prefetch(soon[k][0], _MM_HINT_T0);
                            _mm_prefetch(soon[k][1], _MM_HINT_T0);
                        }
                        if (PAIRS) {
                            micro<PAIRS, V, R>(its, 16, own, longest, part, to, block == 0);
                            ++its;
                            own += longest;
                        } else {
                            micro<PAIRS, V, R>(its, longest, own, 0, part, to, block == 0);
                            its += (longest + 15) / 16;
                        }
                    }
                }
            }
            for (int64_t tile = 0; tile < here; ++tile) {
                for (int v = 0; v < V; ++v) {
                    const int64_t token = (pass + tile) * TOKENS + 16 * v;
                    if (token < in.rows) write(out, sums + tile * tile_sums + 16 * v, TOKENS, row, rows, token, in.rows);
                }
            }
        }
    }
}

// Parts are ordered by block, then by tile: a block is read contiguously.
size_t table_bytes(const Matrix& a, const Input& in) {
    return size_t(blocks_of(a) * tiles_of(in)) * part_bytes(in);
}
int64_t tables(const Matrix& a, const Input& in) { return blocks_of(a) * tiles_of(in); }

void tabulate(const Input& in, char* table, int64_t first, int64_t last) {
    const int64_t tiles = tiles_of(in);
    const int vectors = vectors_for(in.rows);
    for (int64_t part = first; part < last; ++part) {
        const int64_t block = part / tiles, tile = part % tiles;
        char* to = table + size_t(part) * part_bytes(in);
        for (int v = 0; v < vectors; ++v) {
            const int64_t token = (tile * vectors + v) * 16;
            __m512i r[16];
            if (in.bfloat16) {
                for (int piece = 0; piece < COLUMNS / 32; ++piece) {
                    sixteen(in, token, block * COLUMNS + 32 * piece, 2, r);
                    transpose(r);  // r[i]: columns 2 i and 2 i + 1 of sixteen rows
#pragma GCC unroll 8
                    for (int g = 0; g < 8; ++g) {
                        const __m512i ab = r[2 * g], cd = r[2 * g + 1];
                        const __m512i pairs[6] = {
                            ab,
                            _mm512_mask_blend_epi16(0xaaaaaaaa, ab, _mm512_slli_epi32(cd, 16)),
                            _mm512_mask_blend_epi16(0xaaaaaaaa, ab, cd),
                            _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(ab, 16), _mm512_slli_epi32(cd, 16)),
                            _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(ab, 16), cd),
                            cd,
                        };
#pragma GCC unroll 6
                        for (int p = 0; p < 6; ++p) {
                            _mm512_store_si512(to + (((piece * 8 + g) * 6 + p) * vectors + v) * 64, pairs[p]);
                        }
                    }
                }
            } else {
                for (int piece = 0; piece < COLUMNS / 16; ++piece) {
                    sixteen(in, token, block * COLUMNS + 16 * piece, 4, r);
                    transpose(r);
#pragma GCC unroll 16
                    for (int c = 0; c < 16; ++c) _mm512_store_si512(to + ((piece * 16 + c) * vectors + v) * 64, r[c]);
                }
            }
        }
    }
}

void many(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    switch (vectors_for(in.rows)) {
        case 1: return in.bfloat16 ? many_of<true, 1>(a, in, table, out, first, last) : many_of<false, 1>(a, in, table, out, first, last);
        case 2: return in.bfloat16 ? many_of<true, 2>(a, in, table, out, first, last) : many_of<false, 2>(a, in, table, out, first, last);
        default: return in.bfloat16 ? many_of<true, 4>(a, in, table, out, first, last) : many_of<false, 4>(a, in, table, out, first, last);
    }
}

}  // namespace

const Many by_sparse = {table_bytes, tables, tabulate, many};

}  // namespace budwood::with_avx512
