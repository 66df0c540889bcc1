// AMX: panels of the matrix are multiplied in AMX tiles, which is faster than skipping zeros.
#include "avx512_panels.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cpuid.h>

namespace budwood {
namespace with_amx {
namespace {

using namespace with_avx512;

constexpr int64_t PIECES = SEGMENT / DEPTH;  // expanded at a time for few rows of x
constexpr int64_t NARROW = 2;                // for up to so many tiles of x sums stay in AMX registers

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    Shapes() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SIDE;
    }
};

// Sums [BLOCK][BLOCK] of BLOCK rows and two tiles of x (or one): started or continued, and stored at the end.
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

// Few rows of x: the expanded BLOCK stays in the L1 cache.
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

// Many rows of x: a panel is multiplied with two tiles of them at a time.
struct Unit {
    static constexpr int TILES = 2;
    static constexpr int64_t PANEL = 512 << 10;
    alignas(64) float sums[BLOCK * BLOCK];

    explicit Unit(int) {}

    int64_t visits(int rows, int64_t depth, int64_t tiles) const {
        return (rows + BLOCK - 1) / BLOCK * ((tiles + TILES - 1) / TILES) * depth;
    }

    void meet(const Panel& panel, const Input& in, const uint16_t* x, int64_t tile, const Output& out, Ahead& ahead) {
        const int64_t depth = depth_of(in);
        for (int r = 0; r < panel.rows; r += BLOCK) {
            const uint16_t* upper = panel.tiles + r / SIDE * depth * TILE;
            visit(upper, upper + depth * TILE, x, depth, tile, tiles_of(in), depth, sums, true, true, ahead);
            write_block(out, sums, panel.row + r, panel.rows - r, tile, in);
        }
    }
};

void many(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(table);
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    tiles_of(in) <= NARROW ? narrow(a, in, x, out, first, last) : panels<Unit>(a, in, x, out, first, last);
    _tile_release();
}

}  // namespace
}  // namespace with_amx

// Whether CPU and system let this process use AMX; requests it from the system.
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

static const Many by_tiles = {with_avx512::panel_table_bytes, with_avx512::panel_tables, with_avx512::panel_tabulate, with_amx::many};

const Path amx = {"amx", true, with_avx512::few, with_avx512::integers, &with_avx512::by_sparse, &by_tiles, with_avx512::dense,
                  &tiled_with_avx512, false, nullptr, nullptr};

}  // namespace budwood
