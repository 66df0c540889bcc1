// AMX, many rows of x: rows of the matrix are spread to their columns a panel at a time, which stays in the second cache,
// and multiplied there as if they were dense. The unit multiplies zeros faster than anything else finds the rest.
#include "avx512_turned.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cpuid.h>

namespace budwood {
namespace with_amx {
namespace {

using with_avx512::expand;
using with_avx512::mask_bytes;
using with_avx512::read32;
using with_avx512::read_values;
using with_avx512::sixteen;
using with_avx512::transpose;
using with_avx512::write;

constexpr int SIDE = 16;                 // rows of a tile: of the matrix, or of x
constexpr int DEPTH = 32;                // columns of a tile
constexpr int64_t TILE = SIDE * DEPTH;   // elements, 1 KB
constexpr int64_t PANEL = 512 << 10;     // bytes of the matrix, spread
constexpr int BLOCK = 2 * SIDE;          // rows and tokens of one visit: four tiles of sums
constexpr int BLOCKS = 8;                // at most in a panel
constexpr int64_t PIECES = SEGMENT / DEPTH;  // spread at a time where x has few rows
constexpr int64_t NARROW = 2;            // tiles of x that are few, whose sums stay in the unit
constexpr int LINES = 5;                 // what PIECES pieces of half the weights take

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    Shapes() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SIDE;
    }
};

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

// Where SIDE rows go on, and what of them to fetch.
struct Rows {
    int64_t row;
    int count;  // fewer than SIDE at the end of a matrix
    bool safe;  // near the end of the values no whole vector may be read
    const uint8_t* masks[SIDE];
    int64_t at[SIDE];
    const char* soon[SIDE];  // what to fetch meanwhile, LINES of it

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

// SIDE rows -> tiles [piece][row][DEPTH], tile by tile: written row by row, their lines would push each other out.
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

// Pieces [first, last) of up to SIDE rows; what is not there is zero. What lies beside int8 values follows separately.
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

// Bytes of the matrix that lie ahead, fetched while a panel is worked with.
struct Ahead {
    const char* at;
    const char* end;
    int64_t step;
    void fetch() {
        for (int64_t i = 0; i < step && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// Sums [BLOCK][BLOCK] of BLOCK rows and two tiles of x (or one): begun anew or gone on with, and stored at the end.
template <bool TWO>
INLINE void multiply(const uint16_t* upper, const uint16_t* lower, const uint16_t* x, const uint16_t* y, int64_t pieces,
                     float* sums, bool begin, bool end, Ahead& ahead) {
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
        _tile_loadd(4, upper + piece * TILE, 64);
        _tile_loadd(6, x + piece * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + piece * TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (TWO) {
            _tile_loadd(7, y + piece * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        ahead.fetch();
    }
    if (!end) return;
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(1, sums + SIDE, BLOCK * 4);
    _tile_stored(2, sums + SIDE * BLOCK, BLOCK * 4);
    _tile_stored(3, sums + SIDE * BLOCK + SIDE, BLOCK * 4);
}

// The tile of x at `tile` and the next one, where there is one.
INLINE void visit(const uint16_t* upper, const uint16_t* lower, const uint16_t* x, int64_t depth, int64_t tile, int64_t tiles,
                  int64_t pieces, float* sums, bool begin, bool end, Ahead& ahead) {
    const uint16_t* left = x + tile * depth * TILE;
    tile + 1 < tiles ? multiply<true>(upper, lower, left, left + depth * TILE, pieces, sums, begin, end, ahead)
                     : multiply<false>(upper, lower, left, left, pieces, sums, begin, end, ahead);
}

// Sums of BLOCK rows and two tiles -> y.
INLINE void write_block(const Output& out, const float* sums, int64_t row, int rows, int64_t tile, const Input& in) {
    for (int half = 0; half < 2 && (tile + half) * SIDE < in.rows; ++half) {
        write(out, sums + half * SIDE, BLOCK, row, rows < BLOCK ? rows : BLOCK, (tile + half) * SIDE, in.rows);
    }
}

// Few rows of x: what is spread of a BLOCK never leaves the first cache.
void narrow(const Matrix& a, const Input& in, const uint16_t* x, const Output& out, int64_t first, int64_t last) {
    const int64_t depth = depth_of(in), tiles = tiles_of(in), value_bytes = a.type == INT8 ? 1 : 2;
    const int64_t mask_bytes = (a.stride + 127) / 64 * 64;
    const char* values = static_cast<const char*>(a.values);
    alignas(64) uint16_t block[2][PIECES * TILE];
    alignas(64) float sums[BLOCK * BLOCK];
    uint8_t* room = static_cast<uint8_t*>(scratch(0, size_t(BLOCK * mask_bytes)));
    Ahead nothing = {nullptr, nullptr, 0};
    for (int64_t row = first; row < last; row += BLOCK) {
        Rows halves[2];
        More more[BLOCK];
        for (int h = 0; h < 2; ++h) {
            halves[h].begin(a, row + h * SIDE, last - row - h * SIDE, room + h * SIDE * mask_bytes);
        }
        for (int r = 0; a.type == INT8 && r < BLOCK && row + r < last; ++r) more[r] = More(a, row + r);
        for (int64_t piece = 0; piece < depth; piece += PIECES) {
            const bool end = piece + PIECES >= depth;
            const int64_t pieces = end ? depth - piece : PIECES;
            for (int h = 0; h < 2; ++h) {
                Rows& rows = halves[h];
                for (int r = 0; r < rows.count; ++r) {
                    const int64_t next = row + BLOCK + h * SIDE + r;
                    const int64_t to_come = end ? a.starts[next < last ? next : last] : rows.at[r] + pieces * DEPTH / 2;
                    rows.soon[r] = values + to_come * value_bytes;
                }
                spread<true>(a, rows, piece, piece + pieces, block[h]);
                for (int r = 0; a.type == INT8 && r < rows.count; ++r) {
                    More& its = more[h * SIDE + r];
                    its.upto(a, (piece + pieces) * DEPTH);
                    for (; its.next < its.stop; ++its.next) {
                        const int column = a.more_columns[its.next];
                        const float value = load(a.more_values, a.more_type, its.next);
                        block[h][column / DEPTH * TILE + r * DEPTH + column % DEPTH] = to_bfloat16(value);
                    }
                }
            }
            visit(block[0], block[1], x + piece * TILE, depth, 0, tiles, pieces, sums, piece == 0, end, nothing);
        }
        write_block(out, sums, row, int(last - row < BLOCK ? last - row : BLOCK), 0, in);
    }
}

// Many rows of x: a panel of the matrix, spread, meets all of them.
void wide(const Matrix& a, const Input& in, const uint16_t* x, const Output& out, int64_t first, int64_t last) {
    const int64_t depth = depth_of(in), tiles = tiles_of(in), blocks = PANEL / (2 * BLOCK * depth * DEPTH);
    const int at_once = int(blocks < 1 ? BLOCK : blocks > BLOCKS ? BLOCKS * BLOCK : blocks * BLOCK);
    uint16_t* panel = static_cast<uint16_t*>(scratch(1, size_t(at_once * depth * DEPTH) * 2));
    uint8_t* room = static_cast<uint8_t*>(scratch(0, size_t(SIDE * ((a.stride + 127) / 64 * 64))));
    const char* values = static_cast<const char*>(a.values);
    const int64_t value_bytes = a.type == INT8 ? 1 : 2;
    alignas(64) float sums[BLOCK * BLOCK];
    for (int64_t row = first; row < last; row += at_once) {
        const int rows = int(last - row < at_once ? last - row : at_once);
        spread_panel(a, row, rows, depth, room, panel);
        const int64_t next = row + rows, after = next + at_once < last ? next + at_once : last;
        Ahead ahead = {values + a.starts[next] * value_bytes, values + a.starts[after] * value_bytes, 0};
        const int64_t visits = (rows + BLOCK - 1) / BLOCK * ((tiles + 1) / 2) * depth;
        ahead.step = ((ahead.end - ahead.at) / 64 + visits - 1) / visits;
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            for (int r = 0; r < rows; r += BLOCK) {
                const uint16_t* upper = panel + r / SIDE * depth * TILE;
                visit(upper, upper + depth * TILE, x, depth, tile, tiles, depth, sums, true, true, ahead);
                write_block(out, sums, row + r, rows - r, tile, in);
            }
        }
    }
}

// x as tiles [tile of rows][piece][pair of columns][row of x]: what the unit multiplies by.
size_t table_bytes(const Matrix& a, const Input& in) {
    return in.bfloat16 ? size_t(tiles_of(in) * depth_of(in) * TILE) * 2 : with_avx512::table_bytes(a, in);
}
int64_t tables(const Matrix& a, const Input& in) { return in.bfloat16 ? tiles_of(in) : with_avx512::tables(a, in); }

void tabulate(const Input& in, char* table, int64_t first, int64_t last) {
    if (!in.bfloat16) return with_avx512::tabulate(in, table, first, last);
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

void many(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    if (!in.bfloat16) return with_avx512::many(a, in, table, out, first, last);
    const uint16_t* x = reinterpret_cast<const uint16_t*>(table);
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    tiles_of(in) <= NARROW ? narrow(a, in, x, out, first, last) : wide(a, in, x, out, first, last);
    _tile_release();
}

}  // namespace
}  // namespace with_amx

// Whether processor and system let this process use the unit; asks the system for it.
bool amx_allowed() {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return false;
#endif
}

const Path amx = {
    "amx",
    true,
    true,
    with_avx512::few,
    with_avx512::integers,
    with_amx::table_bytes,
    with_amx::tables,
    with_amx::tabulate,
    with_amx::many,
    with_avx512::dense,
};

}  // namespace budwood
