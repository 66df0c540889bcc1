// AVX2, matrices in tiles and many rows of x: strips become lists of weights and columns, a segment at a time, which are
// multiplied with transposed x as in avx2_sparse.cpp.
#include "avx2_sparse.h"
#include "avx2_tiles.h"

namespace budwood::tiles {
namespace {

using with_avx2::COLUMNS;
using with_avx2::List;
using with_avx2::PART;
using with_avx2::PASS;
using with_avx2::ROOM;
using with_avx2::TOKENS;

constexpr int BLOCKS = SEGMENT / COLUMNS;  // of columns in a segment
constexpr int STRIPS = 8;                  // whose sums are kept at a time

// Appends those of eight weights in a row that are not zero.
INLINE void append(List& list, __m256 weights, int column, const with_avx2::Tables& tables) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(weights, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    const __m128i order = with_avx2::eight_bytes(tables.columns[mask]);
    const __m128i columns = _mm_add_epi16(_mm_cvtepu8_epi16(order), _mm_set1_epi16(short(column)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(list.entries + list.count), _mm_slli_epi16(columns, 8));
    _mm256_storeu_ps(list.weights + list.count, _mm256_permutevar8x32_ps(weights, _mm256_cvtepu8_epi32(order)));
    list.count += __builtin_popcount(unsigned(mask));
}

// The weights of a vector whose code is `column`, zeros in place of the others.
INLINE __m256 with_code(__m256 weight, __m256i code, int column) {
    const __m256i equal = _mm256_cmpeq_epi32(_mm256_and_si256(code, _mm256_set1_epi32(3)), _mm256_set1_epi32(column));
    return _mm256_and_ps(weight, _mm256_castsi256_ps(equal));
}

// The weights that four rows of a strip have in lanes in one segment: lists[block][row of the strip].
template <int TYPE, int HALF>
INLINE void fill_half(List (*lists)[STRIPS * STRIP], const Head& h, const char* strip, int64_t segment,
                      const with_avx2::Tables& tables) {
    const int tiles = int(std::min<int64_t>(h.tiles - 8 * segment, 8)), groups = 8 * tiles;
    const char* first = strip + tile_offset(h, TYPE, 8 * segment);
    const int ring = int(h.group / 4);  // groups of four that rotate together
    alignas(32) float second[4][GROUP_COUNT][4];  // ROTATED, of second slots: [column][group of the slot][row]
    for (int t = 0; h.kind == ROTATED && t < tiles; ++t) {
        UNROLLED(k, 4) {
            __m256 weight;
            __m256i code;
            lanes<TYPE>(first + t * tile_bytes(TYPE), 4 * k + 2 * HALF + 1, weight, code);
            UNROLLED(c, 4) _mm256_store_ps(second[c][8 * t + 2 * k], with_code(weight, code, c));
        }
    }
    __m256 scale[4];
    for (int t = 0; t < tiles; ++t) {
        const char* scales = strip + scales_offset(h, TYPE, segment * SEGMENT + t * TILE);
        UNROLLED(r, 4) {
            float own = 1;
            if (TYPE == INT8) own = at<float>(scales, 0)[4 * HALF + r];
            if (TYPE == INT4 || TYPE == SHORTS) own = from_bfloat16(at<uint16_t>(scales, 0)[4 * HALF + r]);
            scale[r] = _mm256_set1_ps(own / WEIGHT_SCALE[TYPE]);
        }
        UNROLLED(k, 4) {
            const int group = 8 * t + 2 * k;
            __m256 weight, other;
            __m256i code, other_code;
            lanes<TYPE>(first + t * tile_bytes(TYPE), 4 * k + 2 * HALF, weight, code);
            lanes<TYPE>(first + t * tile_bytes(TYPE), 4 * k + 2 * HALF + 1, other, other_code);
            __m256 by_column[4];  // [group, group + 1][row]
            UNROLLED(c, 4) {
                __m256 more;
                if (h.kind == GROUPS) {
                    more = with_code(other, other_code, c);
                } else {
                    const int begin = group / ring * ring, size = std::min(groups - begin, ring);
                    const int one = group + AWAY[ROTATED][c], two = one + 1, end = begin + size;
                    more = joined(_mm_load_ps(second[c][one < end ? one : one - size]),
                                  _mm_load_ps(second[c][two < end ? two : two - size]));
                }
                by_column[c] = _mm256_or_ps(with_code(weight, code, c), more);
            }
            const __m256 a = _mm256_unpacklo_ps(by_column[0], by_column[1]), b = _mm256_unpackhi_ps(by_column[0], by_column[1]);
            const __m256 c = _mm256_unpacklo_ps(by_column[2], by_column[3]), d = _mm256_unpackhi_ps(by_column[2], by_column[3]);
            const __m256 by_row[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee),
                                      _mm256_shuffle_ps(b, d, 0x44), _mm256_shuffle_ps(b, d, 0xee)};
            UNROLLED(r, 4) {
                List& list = lists[4 * group / COLUMNS][4 * HALF + r];
                append(list, _mm256_mul_ps(by_row[r], scale[r]), 4 * group % COLUMNS, tables);
            }
        }
    }
}

template <int TYPE>
void fill(List (*lists)[STRIPS * STRIP], const Head& h, const char* strip, int64_t segment, const with_avx2::Tables& tables) {
    fill_half<TYPE, 0>(lists, h, strip, segment, tables);
    fill_half<TYPE, 1>(lists, h, strip, segment, tables);
}

// Appends the weights of late tiles.
void fill_late(List (*lists)[STRIPS * STRIP], const Head& h, int64_t strip, int64_t segment) {
    const int64_t each = SEGMENT / h.group, last = std::min((segment + 1) * each, round_up(h.in, h.group) / h.group);
    for (int64_t group = segment * each; group < last; ++group) {
        const char* scales = strip_of(h, strip) + scales_offset(h, SHORTS, group * h.group);
        for (int k = 0; k < h.late * 2 * 32; ++k) {
            const char* tile = late_of(h, strip, group) + k / 64 * LATE_BYTES;
            const int byte = k % 32, half = k / 32 % 2, row = byte % 16 / 2;
            const int value = at<uint8_t>(tile, byte)[0] >> 4 * half & 15;
            if (!value) continue;
            const int64_t column = group * h.group % SEGMENT + at<uint8_t>(tile, 32 + 32 * half + byte)[0];
            List& list = lists[column / COLUMNS][row];
            list.weights[list.count] = float((value ^ 8) - 8) * from_bfloat16(at<uint16_t>(scales, 0)[row]);
            list.entries[list.count++] = uint16_t(column % COLUMNS * TOKENS * sizeof(float));
        }
    }
}

void multiply(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    const Head& h = head_of(a);
    const auto& bytes = with_avx2::tables_of_bytes();
    const auto fill_strip = a.type == FLOAT32 ? fill<FLOAT32> : a.type == BFLOAT16 ? fill<BFLOAT16>
                          : a.type == FLOAT16 ? fill<FLOAT16> : a.type == INT8 ? fill<INT8>
                          : type_of(h) == SHORTS ? fill<SHORTS> : fill<INT4>;
    const int64_t token_tiles = (in.rows + TOKENS - 1) / TOKENS, segments = segments_of(a);
    const int64_t all_blocks = (a.in + COLUMNS - 1) / COLUMNS;
    constexpr int ROWS = STRIPS * STRIP;
    float* sums = static_cast<float*>(scratch(1, size_t(ROWS) * PASS * sizeof(float)));  // [tile][row][token]
    auto lists = static_cast<List(*)[ROWS]>(scratch(2, sizeof(List) * ROWS * BLOCKS));
    for (int64_t begin = first; begin < last; begin += STRIPS) {
        const int strips = int(std::min<int64_t>(last - begin, STRIPS)), rows = STRIP * strips;
        for (int64_t pass = 0; pass < token_tiles; pass += PASS / TOKENS) {
            const int64_t here = std::min<int64_t>(token_tiles - pass, PASS / TOKENS);
            int32_t next[ROWS] = {}, columns[ROWS] = {};  // entry of each row, column of the one before
            for (int64_t segment = 0; segment < segments; ++segment) {
                for (int block = 0; block < BLOCKS; ++block) {
                    for (int r = 0; r < rows; ++r) lists[block][r].count = 0;
                }
                for (int s = 0; s < strips; ++s) {
                    auto of_strip = reinterpret_cast<List(*)[ROWS]>(&lists[0][STRIP * s]);
                    fill_strip(of_strip, h, strip_of(h, begin + s), segment, bytes);
                    if (h.late) fill_late(of_strip, h, begin + s, segment);
                    for (int i = 0; i < STRIP; ++i) {
                        for (int32_t& j = next[STRIP * s + i]; j < entries_of(h, begin + s)[i]; ++j) {
                            const uint8_t* entry = entry_of(h, begin + s, j);
                            const int column = columns[STRIP * s + i] + entry[i];
                            List& list = lists[column % SEGMENT / COLUMNS][STRIP * s + i];
                            if (column >= (segment + 1) * SEGMENT || list.count >= ROOM) break;
                            columns[STRIP * s + i] = column;
                            if (entry[i] == SKIP) continue;
                            list.weights[list.count] = load(entry + STRIP, h.extra_type, i);
                            list.entries[list.count++] = uint16_t(column % COLUMNS * TOKENS * sizeof(float));
                        }
                    }
                }
                const int64_t blocks = std::min<int64_t>(all_blocks - segment * BLOCKS, BLOCKS);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t index = segment * BLOCKS + block;
                    const char* part = table + size_t(index * token_tiles + pass) * PART;
                    const int64_t each = (int64_t(PART / 64) + rows - 1) / rows;
                    for (int64_t tile = 0; tile < here; ++tile, part += PART) {
                        for (int r = 0; r < rows; ++r) {
                            if (tile + 1 < here) {  // prefetch the next part while this one is used
                                for (int64_t line = 0; line < each; ++line) {
                                    _mm_prefetch(part + PART + (r * each + line) * 64, _MM_HINT_T1);
                                }
                            }
                            with_avx2::micro(lists[block][r], part, sums + (tile * ROWS + r) * TOKENS, index == 0);
                        }
                    }
                }
            }
            for (int64_t tile = 0; tile < here; ++tile) {
                with_avx2::store_tile(out, sums + tile * ROWS * TOKENS, rows, (pass + tile) * TOKENS, in.rows,
                                      [&](int r) { return int64_t(rows_of(h, begin)[r]); });
            }
        }
    }
}

size_t table_bytes(const Matrix& a, const Input& in) { return with_avx2::by_sparse.bytes(a, in); }
int64_t table_parts(const Matrix& a, const Input& in) { return with_avx2::by_sparse.parts(a, in); }
void tabulate(const Input& in, char* table, int64_t first, int64_t last) {
    with_avx2::by_sparse.tabulate(in, table, first, last);
}

}  // namespace

const Many by_sparse = {table_bytes, table_parts, tabulate, multiply};

}  // namespace budwood::tiles
