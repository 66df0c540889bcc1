// Tiles: a layout in memory for AVX2, with eight rows of a matrix side by side. The file's tensors follow from it exactly.
//
// A strip is eight rows: tiles of 32 columns, then the extras of its rows. A tile is 16 vectors of 8 lanes; a lane holds one
// weight and a code, the column of its group of four. A group has two lanes in each row, slots 2 g and 2 g + 1 of 16. A vector
// has two neighbouring groups of four rows, so that one load of eight activations serves it, and `vpermilps` selects by code.
//
// GROUPS (2:4, perhaps with recovered weights): both lanes select from their own group of columns.
// ROTATED (any other mask): the second lane of group j selects column i from group j - AWAY[i], within a SEGMENT of columns. So
// each weight fits two lanes of different groups, which places most of them.
// Extras are what has no lane: lists of (column, value), eight rows side by side. Rows are sorted by their number of extras.
//
// bfloat16 and float32 hold the code in the upper two bits of the exponent, which are 01 for all magnitudes from 2^-62 up to
// 2; others are extras. float16 and int8 have 16 codes for each lane in front of a tile.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))

namespace budwood::tiles {

enum Kind : int32_t { GROUPS = 0, ROTATED = 1 };

constexpr int TILE = 32, STRIP = 8, SLOTS = 16;  // columns, rows, slots of one row
constexpr int GROUP_COUNT = SEGMENT / 4;         // groups of a whole segment
constexpr int SORTED = 64;                       // rows that are sorted by their number of extras
constexpr int LINE = 64;                         // bytes: alignment of strips
constexpr int AWAY[2][4] = {{}, {0, 1, 3, 7}};
constexpr int CODE = 13, WIDE_CODE = 29;  // the bits of the code in bfloat16 and in float32

// The beginning of a packed matrix; offsets are bytes from here. It contains no pointer and may be moved.
struct Head {
    int64_t bytes, out, in, count, more_count, tiles, strips;
    int64_t rows, extras;         // int32 [STRIP * strips]: the row or -1; its number of extras
    int64_t starts, more_starts;  // int32 [out + 1]: as in Matrix, for the inverse
    int64_t begins, data;         // int64 [strips + 1]: offsets of the strips; the first of them
    int32_t type, coding, kind, extra_type;
};

namespace {

template <class T>
inline T* at(const void* base, int64_t offset) {
    return reinterpret_cast<T*>(const_cast<char*>(static_cast<const char*>(base)) + offset);
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }
constexpr bool has_code_words(int32_t type) { return type == FLOAT16 || type == INT8; }

constexpr int tile_bytes(int32_t type) { return type == FLOAT32 ? 512 : type == BFLOAT16 ? 256 : type == FLOAT16 ? 288 : 160; }
constexpr int64_t extra_bytes(int32_t type) { return type == FLOAT32 ? 48 : 32; }  // 8 columns in 16 bits, 8 values

// Offsets in a strip. With int8 values, 8 scales are in front of the tiles of each segment.
constexpr int64_t tile_offset(int32_t type, int64_t tile) {
    return (type == INT8 ? (tile / 8 + 1) * 32 : 0) + tile * tile_bytes(type);
}
constexpr int64_t scales_offset(int64_t segment) { return segment * (32 + 8 * tile_bytes(INT8)); }
constexpr int64_t extras_offset(int32_t type, int64_t tiles) {
    return (type == INT8 ? round_up(tiles, 8) / 8 * 32 : 0) + tiles * tile_bytes(type);
}

inline const Head& head_of(const Matrix& a) { return *static_cast<const Head*>(a.values); }
inline const int64_t* begins_of(const Head& h) { return at<int64_t>(&h, h.begins); }
inline char* strip_of(const Head& h, int64_t strip) { return at<char>(&h, begins_of(h)[strip]); }
inline const int32_t* rows_of(const Head& h, int64_t strip) { return at<int32_t>(&h, h.rows) + STRIP * strip; }
inline const int32_t* extras_of(const Head& h, int64_t strip) { return at<int32_t>(&h, h.extras) + STRIP * strip; }
inline char* extra_entry(const Head& h, int64_t strip, int64_t index) {
    return strip_of(h, strip) + extras_offset(h.type, h.tiles) + index * extra_bytes(h.extra_type);
}

// The number of groups of a segment: the last one may have fewer.
inline int groups_in(int64_t tiles, int64_t segment) {
    return int(std::min<int64_t>(tiles * 8 - segment * GROUP_COUNT, GROUP_COUNT));
}

}  // namespace

// Vector v of a tile as float32, times WEIGHT_SCALE, and codes in the lowest two bits of each lane.
constexpr float WEIGHT_SCALE[] = {0x1p-64f, 0x1p-64f, 1, 0x1p24f};

int64_t plan(const Matrix& a, int32_t& kind, int32_t* extras);
bool pack(const Matrix& a, int32_t kind, const int32_t* extras, void* to);
void unpack(const void* from, void* values, uint8_t* places, float* scales, uint8_t* more_counts, uint8_t* more_columns,
            void* more_values);

}  // namespace budwood::tiles
