// AVX-512, bfloat16: panels of the matrix are multiplied by dot products of pairs of columns, zeros included.
#include "avx512_panels.h"

namespace budwood::with_avx512 {
namespace {

constexpr int64_t PIECES = 8;  // of columns at a time: of 32 rows of x they stay in the L1 cache
constexpr int TOKENS = 2 * SIDE;

// R rows of a tile with V tiles of x: pieces of DEPTH columns each.
template <int V, int R>
INLINE void multiply(const uint16_t* weights, const uint16_t* x, int64_t tile_of_x, int64_t pieces, float* sums, bool begin) {
    __m512 s[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) s[r][v] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * TOKENS + SIDE * v);
    }
    for (int64_t piece = 0; piece < pieces; ++piece, weights += TILE, x += TILE) {
#pragma GCC unroll 2
        for (int pair = 0; pair < DEPTH / 2; ++pair) {
            __m512i inputs[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) inputs[v] = _mm512_load_si512(x + v * tile_of_x + 2 * SIDE * pair);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, weights + r * DEPTH + 2 * pair, 4);
                const __m512i weight = _mm512_set1_epi32(two);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) s[r][v] = _mm512_dpbf16_ps(s[r][v], (__m512bh)weight, (__m512bh)inputs[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) _mm512_store_ps(sums + r * TOKENS + SIDE * v, s[r][v]);
    }
}

struct Unit {
    static constexpr int TILES = TOKENS / SIDE;
    static constexpr int64_t PANEL = 256 << 10;
    float* sums;  // [rows of the panel][TOKENS]

    explicit Unit(int rows) : sums(static_cast<float*>(scratch(2, size_t(rows) * TOKENS * sizeof(float)))) {}

    int64_t visits(int rows, int64_t depth, int64_t tiles) const {
        return (rows + SIDE - 1) / SIDE * ((tiles + TILES - 1) / TILES) * ((depth + PIECES - 1) / PIECES);
    }

    // V tiles of x; R rows so that sums fill half of the registers.
    template <int V>
    void meet_some(const Panel& panel, const Input& in, const uint16_t* x, int64_t tile, const Output& out, Ahead& ahead) {
        constexpr int R = SIDE / V;
        const int64_t depth = depth_of(in), tile_of_x = depth * TILE;
        for (int64_t piece = 0; piece < depth; piece += PIECES) {
            const int64_t pieces = depth - piece < PIECES ? depth - piece : PIECES;
            const uint16_t* inputs = x + tile * tile_of_x + piece * TILE;
            for (int r = 0; r < panel.rows; r += R) {
                const uint16_t* weights = panel.tiles + (r / SIDE * depth + piece) * TILE + r % SIDE * DEPTH;
                multiply<V, R>(weights, inputs, tile_of_x, pieces, sums + r * TOKENS, piece == 0);
                if (r % SIDE == 0) ahead.fetch();
            }
        }
        for (int v = 0; v < V; ++v) {
            write(out, sums + SIDE * v, TOKENS, panel.row, panel.rows, (tile + v) * SIDE, in.rows);
        }
    }

    void meet(const Panel& panel, const Input& in, const uint16_t* x, int64_t tile, const Output& out, Ahead& ahead) {
        tiles_of(in) - tile == 1 ? meet_some<1>(panel, in, x, tile, out, ahead) : meet_some<2>(panel, in, x, tile, out, ahead);
    }
};

void many(const Matrix& a, const Input& in, const char* table, const Output& out, int64_t first, int64_t last) {
    panels<Unit>(a, in, reinterpret_cast<const uint16_t*>(table), out, first, last);
}

}  // namespace

const Many by_panels = {panel_table_bytes, panel_tables, panel_tabulate, many};

}  // namespace budwood::with_avx512
