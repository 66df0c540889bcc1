// Tiles: a layout in memory for AVX2, with eight rows of a matrix side by side. The file's tensors follow from it exactly.
//
// A strip is eight rows: tiles of 32 columns, then the extras of its rows. A tile is 16 vectors of 8 lanes; a lane holds one
// weight and a code, the column of its group of four. A group has two lanes in each row, slots 2 g and 2 g + 1 of 16. A vector
// has two neighbouring groups of four rows, so that one load of eight activations serves it, and `vpermilps` selects by code.
//
// GROUPS (2:4, perhaps with recovered weights): both lanes select from their own group of columns.
// ROTATED (any other mask): the second lane of group j selects column i from group j - AWAY[i], within a SEGMENT of columns. So
// each weight fits two lanes of different groups, which places most of them.
// Extras are what has no lane: lists of (columns since the entry before, value), eight rows side by side. An entry with a
// distance of SKIP has no weight. Rows are sorted by their number of entries.
//
// bfloat16 and float32 hold the code in the upper two bits of the exponent, which are 01 for all magnitudes from 2^-62 up to
// 2; others are extras. float16 and int8 have 16 codes for each lane in front of a tile.
//
// int4: a tile is three words for each lane, of five fields of 6 bits: the code in the lower two, the weight above. The
// upper two bits of the words are the sixteenth field. ROTATED rotates within the columns of a scale. A DENSE matrix has no
// codes: a lane is a row, and four words of it have eight columns each.
//
// int4 for AVX-512 (SHORTS): a tile is 32 words of 16 bits, each with four weights of a row, then as many bytes, each with the
// codes of the four. Words 2 l and 2 l + 1 are row l % 8, groups l / 8 * 4 to l / 8 * 4 + 3, first and second slots. What finds
// no slot there goes to `late` tiles, so many for the columns of each scale, behind the others of a segment: 32 bytes of weights,
// then 64 of columns within those of the scale. Byte 2 l + i of the weights has slots l / 8 * 2 + i and 4 more of row l % 8, in
// its lower and upper half; the columns of the former are in front of those of the latter.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))

namespace budwood::tiles {

enum Kind : int32_t { GROUPS = 0, ROTATED = 1 };

constexpr int TILE = 32, STRIP = 8, SLOTS = 16;  // columns, rows, slots of one row
constexpr int GROUP_COUNT = SEGMENT / 4;         // groups of a whole segment
constexpr int SORTED = 64;                       // rows that are sorted by their number of entries
constexpr int SKIP = 255;                        // columns: the distance of an entry that has no weight
constexpr int LATE = 8, LATE_BYTES = 96;         // slots of one row in a late tile; its size
constexpr int LINE = 64;                         // bytes: alignment of strips
constexpr int AWAY[2][4] = {{}, {0, 1, 3, 7}};
constexpr int CODE = 13, WIDE_CODE = 29;  // the bits of the code in bfloat16 and in float32

// The beginning of a packed matrix; offsets are bytes from here. It contains no pointer and may be moved.
struct Head {
    int64_t bytes, out, in, count, more_count, tiles, strips;
    int64_t rows, entries;        // int32 [STRIP * strips]: the row or -1; its number of entries
    int64_t starts, more_starts;  // int32 [out + 1]: as in Matrix, for the inverse
    int64_t begins, data;         // int64 [strips + 1]: offsets of the strips; the first of them
    int32_t type, coding, kind, extra_type;
    int64_t group;  // columns with one scale, within which ROTATED rotates
    int32_t shorts;  // whether INT4 values are SHORTS
    int32_t late;    // tiles for each group
};

namespace {

template <class T>
inline T* at(const void* base, int64_t offset) {
    return reinterpret_cast<T*>(const_cast<char*>(static_cast<const char*>(base)) + offset);
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : type == INT8 || type == INT4 ? 1 : 2; }
constexpr bool has_code_words(int32_t type) { return type == FLOAT16 || type == INT8; }
constexpr bool has_scales(int32_t type) { return type >= INT8; }
constexpr int32_t WHOLE = 5, SHORTS = 6;  // types besides those of `kernels.h`: INT4 in DENSE matrices, and for AVX-512

constexpr int tile_bytes(int32_t type) {
    return type == FLOAT32 ? 512 : type == BFLOAT16 ? 256 : type == FLOAT16 ? 288 : type == INT8 ? 160 : type == WHOLE ? 128 : 96;
}
constexpr int64_t entry_bytes(int32_t type) { return type == FLOAT32 ? 40 : 24; }  // 8 distances in 8 bits, 8 values

// Offsets in a strip. With integer values the scales of a segment are in front of its tiles: 8 in float32 with int8 values,
// 8 in bfloat16 for each of its groups with int4 ones. Late tiles of its groups are behind them.
constexpr int64_t scale_bytes(int32_t type, int64_t group) {
    return type == INT8 ? 32 : has_scales(type) ? SEGMENT / group * 16 : 0;
}
inline int64_t late_bytes(const Head& h) { return h.late ? SEGMENT / h.group * h.late * LATE_BYTES : 0; }
inline int64_t tile_offset(const Head& h, int32_t type, int64_t tile) {
    return (tile / 8 + 1) * scale_bytes(type, h.group) + tile / 8 * late_bytes(h) + tile * tile_bytes(type);
}
inline int64_t scales_offset(const Head& h, int32_t type, int64_t column) {
    const int64_t segment = column / SEGMENT, inside = type == INT8 ? 0 : column % SEGMENT / h.group * 16;
    return segment * (scale_bytes(type, h.group) + late_bytes(h) + 8 * tile_bytes(type)) + inside;
}
inline int64_t late_offset(const Head& h, int32_t type, int64_t column) {
    const int64_t segment = column / SEGMENT, tiles = std::min<int64_t>(h.tiles - 8 * segment, 8);
    return tile_offset(h, type, 8 * segment) + tiles * tile_bytes(type) + column % SEGMENT / h.group * h.late * LATE_BYTES;
}
inline int64_t extras_offset(const Head& h, int32_t type) {
    return round_up(h.tiles, 8) / 8 * (scale_bytes(type, h.group) + late_bytes(h)) + h.tiles * tile_bytes(type);
}

inline const Head& head_of(const Matrix& a) { return *static_cast<const Head*>(a.values); }
inline const int64_t* begins_of(const Head& h) { return at<int64_t>(&h, h.begins); }
inline char* strip_of(const Head& h, int64_t strip) { return at<char>(&h, begins_of(h)[strip]); }
inline const int32_t* rows_of(const Head& h, int64_t strip) { return at<int32_t>(&h, h.rows) + STRIP * strip; }
inline const int32_t* entries_of(const Head& h, int64_t strip) { return at<int32_t>(&h, h.entries) + STRIP * strip; }
inline int32_t type_of(const Head& h) { return h.coding == DENSE ? WHOLE : h.shorts ? SHORTS : h.type; }
// The late tiles of a group.
inline char* late_of(const Head& h, int64_t strip, int64_t group) {
    return strip_of(h, strip) + late_offset(h, SHORTS, group * h.group);
}
inline uint8_t* entry_of(const Head& h, int64_t strip, int64_t index) {
    return at<uint8_t>(strip_of(h, strip), extras_offset(h, type_of(h)) + index * entry_bytes(h.extra_type));
}

// The number of groups of four that rotate together: the last ones may be fewer. ring: the whole number.
inline int groups_in(int64_t tiles, int64_t ring, int64_t index) { return int(std::min<int64_t>(tiles * 8 - index * ring, ring)); }

}  // namespace

// Vector v of a tile as float32, times WEIGHT_SCALE, and codes in the lowest two bits of each lane.
constexpr float WEIGHT_SCALE[] = {0x1p-64f, 0x1p-64f, 1, 0x1p24f, 4, 1, 1};

// kind: a Kind, and what else is chosen for a matrix, in one number for the caller to keep.
int64_t plan(const Matrix& a, bool shorts, int32_t& kind, int32_t* entries);
bool pack(const Matrix& a, int32_t kind, const int32_t* entries, void* to);
void forget();  // what `plan` has kept for a `pack` that did not come
void unpack(const void* from, void* values, uint8_t* places, float* scales, uint8_t* more_counts, uint8_t* more_columns,
            void* more_values);

}  // namespace budwood::tiles
