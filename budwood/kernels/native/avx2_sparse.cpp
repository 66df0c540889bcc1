// AVX2, many rows of x: for each row of the matrix a list of its weights and their columns, multiplied with transposed x;
// everything in float32.
#include "avx2_sparse.h"

namespace budwood::with_avx2 {
namespace {

constexpr int ROWS = 128;  // of the matrix, whose sums are kept at a time

int64_t blocks_of(const Matrix& a) { return (a.in + COLUMNS - 1) / COLUMNS; }
int64_t tiles_of(const Input& in) { return (in.rows + TOKENS - 1) / TOKENS; }
int64_t tables(const Matrix& a, const Input& in) { return blocks_of(a) * tiles_of(in); }
size_t table_bytes(const Matrix& a, const Input& in) { return size_t(tables(a, in)) * PART; }

// A row's mask, one byte for eight columns, padded for whole reads; bits beyond the row are unset.
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

// Parts are ordered by block, then by tile: [column][token].
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
                    for (; more[r].next < more[r].stop && list.count < ROOM; ++more[r].next) {
                        list.weights[list.count] = load(a.more_values, a.more_type, more[r].next);
                        list.entries[list.count++] =
                            uint16_t(a.more_columns[more[r].next] % COLUMNS * TOKENS * sizeof(float));
                    }
                }
                const char* part = table + size_t(block * tiles + pass) * PART;
                const int64_t each = (int64_t(PART / 64) + rows - 1) / rows;
                for (int64_t tile = 0; tile < here; ++tile, part += PART) {
                    for (int r = 0; r < rows; ++r) {
                        if (tile + 1 < here) {  // prefetch the next part while this one is used
                            for (int64_t line = 0; line < each; ++line) {
                                _mm_prefetch(part + PART + (r * each + line) * 64, _MM_HINT_T1);
                            }
                        }
                        micro(lists[r], part, sums + (tile * ROWS + r) * TOKENS, block == 0);
                    }
                }
            }
            for (int64_t tile = 0; tile < here; ++tile) {
                store_tile(out, sums + tile * ROWS * TOKENS, rows, (pass + tile) * TOKENS, in.rows,
                           [&](int r) { return row + r; });
            }
        }
    }
}

}  // namespace

const Many by_sparse = {table_bytes, tables, tabulate, many};

}  // namespace budwood::with_avx2
