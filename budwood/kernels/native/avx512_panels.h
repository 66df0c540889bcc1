// Products of many rows of x with an expanded matrix: rows are expanded to dense a panel at a time,
// which stays in the L2 cache, and multiplied by AVX-512 or AMX. This saves memory bandwidth.
#pragma once

#include "avx512_turned.h"

namespace budwood::with_avx512 {
namespace {

constexpr int SIDE = 16;                // rows of a tile: of the matrix, or of x
constexpr int DEPTH = 32;               // columns of a tile
constexpr int64_t TILE = SIDE * DEPTH;  // elements, 1 KB
constexpr int BLOCK = 2 * SIDE;         // rows of a panel: a multiple of this,
constexpr int BLOCKS = 8;               // at most this multiple
constexpr int LINES = 5;                // of SEGMENT columns with half the weights kept

int64_t depth_of(const Input& in) { return in.stride / DEPTH; }
int64_t tiles_of(const Input& in) { return (in.rows + SIDE - 1) / SIDE; }

// Columns of a row from a piece on, as set bits.
INLINE uint32_t columns_of(const Matrix& a, const uint8_t* mask, int64_t piece) {
    const int64_t left = a.in - piece * DEPTH;
    uint32_t word = 0;
    if (left >= DEPTH) {
        std::memcpy(&word, mask + 4 * piece, 4);
    } else if (left > 0) {
        std::memcpy(&word, mask + 4 * piece, size_t((left + 7) / 8));
        word &= (1u << left) - 1;
    }
    return word;
}

// One row's part of a tile, for values of 16 bits.
template <bool SAFE>
struct Spread16 {
    const uint16_t* end;
    explicit Spread16(const Matrix& a) : end(static_cast<const uint16_t*>(a.values) + a.count) {}
    INLINE void operator()(const Matrix& a, int64_t, int64_t, uint32_t word, int64_t at, uint16_t* to) const {
        const uint16_t* values = static_cast<const uint16_t*>(a.values) + at;
        _mm512_store_si512(to, expand(__mmask32(word), read32<SAFE>(values, end)));
    }
};

// The same for int8: times the scale, rounded as unpacking rounds.
struct Spread8 {
    explicit Spread8(const Matrix&) {}
    INLINE void operator()(const Matrix& a, int64_t row, int64_t piece, uint32_t word, int64_t at, uint16_t* to) const {
        const float scale = a.scales[row * segments_of(a) + piece * DEPTH / SEGMENT];
        __m256i halves[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __mmask16 here = __mmask16(word >> (16 * half));
            const int count = __builtin_popcount(here);
            const __m512 values = read_values(a.values, INT8, at, __mmask16((1u << count) - 1));
            const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(scale), values);
            halves[half] = (__m256i)_mm512_cvtneps_pbh(expand(here, scaled));
            at += count;
        }
        _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
    }
};

// The next values of SIDE rows, and what of them to prefetch.
struct Rows {
    int64_t row;
    int count;  // fewer than SIDE at the end of a matrix
    bool safe;  // near the end of the values no whole vector may be read
    const uint8_t* masks[SIDE];
    int64_t at[SIDE];
    const char* soon[SIDE];  // to prefetch, LINES of it

    void begin(const Matrix& a, int64_t first, int64_t rows, uint8_t* room) {
        row = first, count = int(rows < 0 ? 0 : rows < SIDE ? rows : SIDE);
        const int64_t bytes = (a.stride + 127) / 64 * 64;
        for (int r = 0; r < count; ++r) {
            masks[r] = mask_bytes(a, row + r, room + r * bytes);
            at[r] = a.starts[row + r];
        }
        safe = count < SIDE || a.starts[row + SIDE] + DEPTH > a.count;
    }
};

// SIDE rows -> tiles [piece][row][DEPTH], tile by tile: written row by row, their lines would evict each other.
template <class Use, bool WHOLE, bool FETCH>
INLINE void spread_tiles(const Matrix& a, Rows& rows, int64_t first, int64_t last, uint16_t* to) {
    const Use use(a);
    const int count = WHOLE ? SIDE : rows.count;
    for (int64_t piece = first; piece < last; ++piece, to += TILE) {
        const bool inside = (piece + 1) * DEPTH <= a.in;
#pragma GCC unroll 16
        for (int r = 0; r < count; ++r) {
            uint32_t word;
            if (inside) {
                std::memcpy(&word, rows.masks[r] + 4 * piece, 4);
            } else {
                word = columns_of(a, rows.masks[r], piece);
            }
            use(a, rows.row + r, piece, word, rows.at[r], to + r * DEPTH);
            rows.at[r] += __builtin_popcount(word);
            if (FETCH && piece - first < LINES) _mm_prefetch(rows.soon[r] + 64 * (piece - first), _MM_HINT_T0);
        }
        if (!WHOLE) std::memset(to + count * DEPTH, 0, size_t(SIDE - count) * DEPTH * 2);
    }
}

// Pieces [first, last) of up to SIDE rows; what is not there is zero. Weights recovered besides int8 values are added separately.
template <bool FETCH>
void spread(const Matrix& a, Rows& rows, int64_t first, int64_t last, uint16_t* to) {
    if (a.type == INT8) {
        rows.count == SIDE ? spread_tiles<Spread8, true, FETCH>(a, rows, first, last, to)
                           : spread_tiles<Spread8, false, false>(a, rows, first, last, to);
    } else if (rows.safe) {
        spread_tiles<Spread16<true>, false, false>(a, rows, first, last, to);
    } else {
        spread_tiles<Spread16<false>, true, FETCH>(a, rows, first, last, to);
    }
}

// Rows [row, row + rows) of the matrix -> tiles [row / SIDE][piece][SIDE][DEPTH], zeros up to a whole BLOCK.
void spread_panel(const Matrix& a, int64_t row, int rows, int64_t depth, uint8_t* room, uint16_t* panel) {
    for (int r = 0; r < (rows + BLOCK - 1) / BLOCK * BLOCK; r += SIDE, panel += depth * TILE) {
        Rows some;
        some.begin(a, row + r, rows - r, room);
        spread<false>(a, some, 0, depth, panel);
        if (a.type != INT8) continue;
        for (int k = 0; k < some.count; ++k) {
            each_more(a, row + r + k, [&](int64_t column, float value) {
                panel[column / DEPTH * TILE + k * DEPTH + column % DEPTH] = to_bfloat16(value);
            });
        }
    }
}

// Bytes of the matrix ahead, prefetched while a panel is used.
struct Ahead {
    const char* at;
    const char* end;
    int64_t step;
    void fetch() {
        for (int64_t i = 0; i < step && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// x as tiles [tile of rows][piece][pair of columns][row of x].
size_t panel_table_bytes(const Matrix&, const Input& in) { return size_t(tiles_of(in) * depth_of(in) * TILE) * 2; }
int64_t panel_tables(const Matrix&, const Input& in) { return tiles_of(in); }

void panel_tabulate(const Input& in, char* table, int64_t first, int64_t last) {
    const int64_t depth = depth_of(in);
    for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t piece = 0; piece < depth; ++piece) {
            __m512i r[SIDE];
            sixteen(in, tile * SIDE, piece * DEPTH, 2, r);
            transpose(r);
            char* to = table + size_t(tile * depth + piece) * TILE * 2;
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; ++i) _mm512_store_si512(to + 64 * i, r[i]);
        }
    }
}

// A panel, its rows of the matrix, and their part of y.
struct Panel {
    const uint16_t* tiles;
    int64_t row;
    int rows;
};

// Panels of Unit::PANEL bytes; each is multiplied with Unit::TILES tiles of x at a time.
template <class Unit>
void panels(const Matrix& a, const Input& in, const uint16_t* x, const Output& out, int64_t first, int64_t last) {
    const int64_t depth = depth_of(in), tiles = tiles_of(in), blocks = Unit::PANEL / (2 * BLOCK * depth * DEPTH);
    const int at_once = int(blocks < 1 ? BLOCK : blocks > BLOCKS ? BLOCKS * BLOCK : blocks * BLOCK);
    uint16_t* room_for_tiles = static_cast<uint16_t*>(scratch(1, size_t(at_once * depth * DEPTH) * 2));
    uint8_t* room = static_cast<uint8_t*>(scratch(0, size_t(SIDE * ((a.stride + 127) / 64 * 64))));
    const char* values = static_cast<const char*>(a.values);
    const int64_t value_bytes = a.type == INT8 ? 1 : 2;
    Unit unit(at_once);
    for (int64_t row = first; row < last; row += at_once) {
        const Panel panel = {room_for_tiles, row, int(last - row < at_once ? last - row : at_once)};
        spread_panel(a, row, panel.rows, depth, room, room_for_tiles);
        const int64_t next = row + panel.rows, after = next + at_once < last ? next + at_once : last;
        Ahead ahead = {values + a.starts[next] * value_bytes, values + a.starts[after] * value_bytes, 0};
        const int64_t visits = unit.visits(panel.rows, depth, tiles);
        ahead.step = ((ahead.end - ahead.at) / 64 + visits - 1) / visits;
        for (int64_t tile = 0; tile < tiles; tile += Unit::TILES) unit.meet(panel, in, x, tile, out, ahead);
    }
}

}  // namespace
}  // namespace budwood::with_avx512
