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
        _mm512_store_si512(to, _mm512_maskz_expand_epi16(word, read32<SAFE>(values, end)));
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
            halves[half] = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_expand_ps(here, scaled));
            at += count;
        }
        _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
    }
};

// SIDE rows -> tiles [piece][row][DEPTH], tile by tile: written row by row, their lines would push each other out.
template <class Use>
void spread_tiles(const Matrix& a, int64_t row, const uint8_t* const* masks, int64_t pieces, uint16_t* to) {
    const Use use(a);
    int64_t at[SIDE];
    for (int r = 0; r < SIDE; ++r) at[r] = a.starts[row + r];
    for (int64_t piece = 0; piece < pieces; ++piece, to += TILE) {
        const bool whole = (piece + 1) * DEPTH <= a.in;
#pragma GCC unroll 16
        for (int r = 0; r < SIDE; ++r) {
            uint32_t word;
            if (whole) {
                std::memcpy(&word, masks[r] + 4 * piece, 4);
            } else {
                word = columns_of(a, masks[r], piece);
            }
            use(a, row + r, piece, word, at[r], to + r * DEPTH);
            at[r] += __builtin_popcount(word);
        }
    }
}

// Up to SIDE rows, the same way for the last ones of a matrix: whatever is not there is zero.
template <class Use>
void spread_some(const Matrix& a, int64_t row, int rows, const uint8_t* const* masks, int64_t pieces, uint16_t* to) {
    const Use use(a);
    std::memset(to, 0, size_t(pieces * TILE) * 2);
    for (int r = 0; r < rows; ++r) {
        int64_t at = a.starts[row + r];
        for (int64_t piece = 0; piece * DEPTH < a.in; ++piece) {
            const uint32_t word = columns_of(a, masks[r], piece);
            use(a, row + r, piece, word, at, to + piece * TILE + r * DEPTH);
            at += __builtin_popcount(word);
        }
    }
}

// Rows [row, row + rows) of the matrix -> tiles [row / SIDE][piece][SIDE][DEPTH], zeros up to a whole BLOCK.
void spread_panel(const Matrix& a, int64_t row, int rows, int64_t pieces, uint8_t* room, uint16_t* panel) {
    const int64_t bytes = (a.stride + 127) / 64 * 64;
    for (int r = 0; r < (rows + BLOCK - 1) / BLOCK * BLOCK; r += SIDE, panel += pieces * TILE) {
        const int some = rows - r < SIDE ? (rows > r ? rows - r : 0) : SIDE;
        const uint8_t* masks[SIDE];
        for (int k = 0; k < some; ++k) masks[k] = mask_bytes(a, row + r + k, room + k * bytes);
        const bool safe = some < SIDE || a.starts[row + r + SIDE] + DEPTH > a.count;
        if (a.type == INT8) {
            some == SIDE ? spread_tiles<Spread8>(a, row + r, masks, pieces, panel)
                         : spread_some<Spread8>(a, row + r, some, masks, pieces, panel);
            for (int k = 0; k < some; ++k) {
                each_more(a, row + r + k, [&](int64_t column, float value) {
                    panel[column / DEPTH * TILE + k * DEPTH + column % DEPTH] = to_bfloat16(value);
                });
            }
        } else {
            safe ? spread_some<Spread16<true>>(a, row + r, some, masks, pieces, panel)
                 : spread_tiles<Spread16<false>>(a, row + r, masks, pieces, panel);
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

// Sums [BLOCK][BLOCK] of BLOCK rows and two tiles of x (or one).
template <bool TWO>
INLINE void multiply(const uint16_t* upper, const uint16_t* lower, const uint16_t* x, const uint16_t* y, int64_t pieces,
                     float* sums, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(2);
    if (TWO) {
        _tile_zero(1);
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
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(2, sums + SIDE * BLOCK, BLOCK * 4);
    if (TWO) {
        _tile_stored(1, sums + SIDE, BLOCK * 4);
        _tile_stored(3, sums + SIDE * BLOCK + SIDE, BLOCK * 4);
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
    const int64_t depth = depth_of(in), tiles = tiles_of(in), blocks = PANEL / (2 * BLOCK * depth * DEPTH);
    const int at_once = int(blocks < 1 ? BLOCK : blocks > BLOCKS ? BLOCKS * BLOCK : blocks * BLOCK);
    uint16_t* panel = static_cast<uint16_t*>(scratch(1, size_t(at_once * depth * DEPTH) * 2));
    uint8_t* room = static_cast<uint8_t*>(scratch(0, size_t(SIDE * ((a.stride + 127) / 64 * 64))));
    const uint16_t* x = reinterpret_cast<const uint16_t*>(table);
    const int64_t value_bytes = a.type == INT8 ? 1 : 2;
    alignas(64) float sums[BLOCK * BLOCK];
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    for (int64_t row = first; row < last; row += at_once) {
        const int rows = int(last - row < at_once ? last - row : at_once);
        spread_panel(a, row, rows, depth, room, panel);
        const int64_t next = row + rows, after = next + at_once < last ? next + at_once : last;
        Ahead ahead = {static_cast<const char*>(a.values) + a.starts[next < last ? next : last] * value_bytes,
                       static_cast<const char*>(a.values) + a.starts[after] * value_bytes, 0};
        const int64_t visits = (rows + BLOCK - 1) / BLOCK * ((tiles + 1) / 2) * depth;
        ahead.step = ((ahead.end - ahead.at) / 64 + visits - 1) / visits;
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const bool two = tile + 1 < tiles;
            const uint16_t* left = x + tile * depth * TILE;
            for (int r = 0; r < rows; r += BLOCK) {
                const uint16_t* upper = panel + r / SIDE * depth * TILE;
                const uint16_t* lower = upper + depth * TILE;
                two ? multiply<true>(upper, lower, left, left + depth * TILE, depth, sums, ahead)
                    : multiply<false>(upper, lower, left, left, depth, sums, ahead);
                const int some = rows - r < BLOCK ? rows - r : BLOCK;
                for (int half = 0; half < (two ? 2 : 1); ++half) {
                    write(out, sums + half * SIDE, BLOCK, row + r, some, (tile + half) * SIDE, in.rows);
                }
            }
        }
    }
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
    true,
    with_avx512::few,
    with_amx::table_bytes,
    with_amx::tables,
    with_amx::tabulate,
    with_amx::many,
    with_avx512::dense,
};

}  // namespace budwood
