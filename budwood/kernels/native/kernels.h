// What the translation units share. One of them exists per instruction set; `entry.cpp` chooses among them.
//
// Everything works on the union bitmask: the kept values, row by row, and a bit (or for 2:4 a nibble per group of
// four) for their positions. It is the layout of the file, so nothing is repacked on loading; except on AVX2, into tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace budwood {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4 };
enum Coding : int32_t { BITMASK = 0, NIBBLES = 1, TILES = 2, DENSE = 3 };

constexpr int SEGMENT = 256;  // columns that share a scale of int8 values
constexpr int FEW = 8;        // rows of x of the kernel for few rows; more of them use a table
constexpr int LANE = 32;      // columns of activations that are contiguous, for few rows

// One packed matrix [out, in]. Filled by the caller (Python, ctypes): the order of the fields is the interface.
// TILES: `values` points to a tiles::Head, and out, in, type and coding are all that is read besides. INT4 is only multiplied
// in tiles; DENSE, which has no places, too.
struct Matrix {
    const void* values;          // [count] of `type`, row-major; INT4: a code in each byte
    const uint8_t* places;       // [out, stride]: BITMASK one bit a column, NIBBLES two 2-bit places a group of four
    const int32_t* starts;       // [out + 1]: where each row's values begin
    const float* scales;         // INT8: [out, ceil(in / SEGMENT)]; INT4: [out, ceil(in / group)]
    const uint8_t* more_counts;  // with int8 values, recovered weights: the number in each segment of a row,
    const uint8_t* more_columns;  // their columns inside it,
    const void* more_values;      // and values of `more_type`, row-major
    const int32_t* more_starts;  // [out + 1], or null
    int64_t out, in, count, stride;
    int32_t type, coding, more_type;
    int32_t group;               // INT4: columns with one scale, 64 or 128
};

// Activations, in the dtype that the path multiplies in: [rows, stride], padded with zeros. Few rows are
// [stride / LANE][rows][LANE]: what is multiplied together is contiguous, which avoids cache conflicts.
struct Input {
    const void* data;
    int64_t rows, stride;
    bool bfloat16;        // else float32, or
    const float* scales;  // where not null, 16-bit integers: one scale for each row and SEGMENT of columns
    bool twice;           // of these, row 2 r + 1 is what row 2 r leaves of row r of x
};

constexpr float FINER = 65000;  // the scale of row 2 r over that of row 2 r + 1: what is left is at most half of an integer

// Where products are written: y[row of x][row of the matrix], plus bias.
struct Output {
    void* y;
    const void* bias;  // [out] of `type`, or null
    int64_t stride;
    int32_t type;
};

// Every function has its own copy in every file: a single one could be the copy that was compiled
// for instructions that this CPU lacks.
namespace {

inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | (fraction << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24, exact
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_float16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000) {                       // subnormal: adding this constant rounds at the right place
        float magnitude, shifted;
        std::memcpy(&magnitude, &bits, 4);
        shifted = magnitude + 0.5f;
        std::memcpy(&bits, &shifted, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}

// The index of a column of a row, in the layout for few rows.
inline int64_t place(int64_t rows, int64_t row, int64_t column) {
    return (column / LANE * rows + row) * LANE + column % LANE;
}

inline float load(const void* data, int32_t type, int64_t index) {
    switch (type) {
        case FLOAT32: return static_cast<const float*>(data)[index];
        case BFLOAT16: return from_bfloat16(static_cast<const uint16_t*>(data)[index]);
        case FLOAT16: return from_float16(static_cast<const uint16_t*>(data)[index]);
        default: return float(static_cast<const int8_t*>(data)[index]);
    }
}

inline void store(const Output& out, int64_t token, int64_t row, float value) {
    if (out.bias) value += load(out.bias, out.type, row);
    const int64_t index = token * out.stride + row;
    switch (out.type) {
        case FLOAT32: static_cast<float*>(out.y)[index] = value; break;
        case BFLOAT16: static_cast<uint16_t*>(out.y)[index] = to_bfloat16(value); break;
        default: static_cast<uint16_t*>(out.y)[index] = to_float16(value);
    }
}

// Two places in a nibble, p | q << 2, as set bits of a nibble.
inline uint32_t covered(uint32_t nibble) { return (1u << (nibble & 3)) | (1u << (nibble >> 2)); }

// 32 columns of a row as set bits; `word` counts from the row's beginning. Columns beyond the row are unset.
inline uint32_t mask_word(const Matrix& a, int64_t row, int64_t word) {
    const uint8_t* at = a.places + row * a.stride + 4 * word;
    const int64_t left = a.stride - 4 * word;
    uint32_t bits = 0;
    std::memcpy(&bits, at, left < 4 ? size_t(left) : 4);
    if (a.coding == NIBBLES) {
        uint32_t unfolded = 0;
        for (int group = 0; group < 8; ++group) unfolded |= covered((bits >> (4 * group)) & 15) << (4 * group);
        bits = unfolded;
    }
    const int64_t columns = a.in - 32 * word;
    return columns < 32 ? bits & ((1u << columns) - 1) : bits;
}

// Calls use(number of rows, known to the compiler): sums then live in registers.
template <class Use>
inline void by_rows(int64_t rows, Use use) {
    switch (rows) {
        case 1: return use(std::integral_constant<int, 1>());
        case 2: return use(std::integral_constant<int, 2>());
        case 3: return use(std::integral_constant<int, 3>());
        case 4: return use(std::integral_constant<int, 4>());
        case 5: return use(std::integral_constant<int, 5>());
        case 6: return use(std::integral_constant<int, 6>());
        case 7: return use(std::integral_constant<int, 7>());
        default: return use(std::integral_constant<int, FEW>());
    }
}

inline int64_t segments_of(const Matrix& a) { return (a.in + SEGMENT - 1) / SEGMENT; }

// Calls use(column, value) for every recovered weight of a row with int8 values; never beyond the row.
template <class Use>
inline void each_more(const Matrix& a, int64_t row, Use use) {
    if (!a.more_starts) return;
    int64_t next = a.more_starts[row];
    const int64_t end = a.more_starts[row + 1];
    for (int64_t segment = 0; segment < segments_of(a); ++segment) {
        for (int n = a.more_counts[row * segments_of(a) + segment]; n && next < end; --n, ++next) {
            const int64_t column = segment * SEGMENT + a.more_columns[next];
            if (column < a.in) use(column, load(a.more_values, a.more_type, next));
        }
    }
}

// The recovered weights of a row, block of columns by block; blocks divide a segment. Never beyond the row.
struct More {
    int64_t row = 0, segment = 0, next = 0, stop = 0, end = 0;  // [next, stop): those of the block; end: of the segment
    int64_t last = 0;                                           // of the row
    bool any = false;
    More() = default;
    More(const Matrix& a, int64_t row) : row(row), any(a.more_starts != nullptr) {
        if (any) next = stop = end = a.more_starts[row], last = a.more_starts[row + 1];
    }
    void upto(const Matrix& a, int64_t column) {  // the block that ends before `column`
        if (!any) return;
        while (segment * SEGMENT < column && segment < segments_of(a)) {
            end += a.more_counts[row * segments_of(a) + segment++];
        }
        if (end > last) end = last;
        const int64_t within = column - (segment - 1) * SEGMENT;
        while (stop < end && a.more_columns[stop] < within) ++stop;
    }
    int64_t in_block(int64_t room) const { return stop - next < room ? stop - next : room; }
};

}  // namespace

// A kernel for many rows of x: `tabulate` makes a table of `bytes` from x, its parts [first, last) of `parts`, and
// `multiply` computes rows [first, last) of the matrix from it.
struct Many {
    size_t (*bytes)(const Matrix&, const Input&);
    int64_t (*parts)(const Matrix&, const Input&);
    void (*tabulate)(const Input&, char* table, int64_t first, int64_t last);
    void (*multiply)(const Matrix&, const Input&, const char* table, const Output&, int64_t first, int64_t last);
};

// The attention of one new token of each sequence to the keys and values of all tokens, its own included. Filled by the
// caller (Python, ctypes): the order of the fields is the interface. Strides are in values; a key, a value and a query are
// contiguous. Heads [h * heads / shared, (h + 1) * heads / shared) share key and value h.
struct Attention {
    const void *query, *key, *value;  // [batch, heads, width], [batch, shared, tokens, width] twice
    const uint8_t* seen;              // [batch, tokens], 0 for tokens that are not attended to; or null: all are
    void* out;                        // [batch, heads, width], contiguous
    int64_t batch, heads, shared, tokens, width;
    int64_t query_strides[2], key_strides[3], value_strides[3], seen_strides[2];
    float scale;   // of the products of query and key
    int32_t type;  // of all tensors but `seen`
};

// Its kernel. The tokens are split into pieces of a fixed size, so that the sums do not depend on the number of threads.
struct Attends {
    int64_t (*pieces)(const Attention&);  // 0 where it cannot compute this
    int64_t (*bytes)(const Attention&);  // that the sums of the pieces take
    void (*add)(const Attention&, void* sums, int64_t first, int64_t last);         // pieces [first, last)
    void (*join)(const Attention&, const void* sums, int64_t first, int64_t last);  // heads of all sequences
};

// Rows divided by the root of their mean square (and epsilon), times a weight. Families differ in how: the quotient is
// rounded to the dtype before it is multiplied, or only the product is, or the weight counts from one.
enum Form : int32_t { ROUNDED_FIRST = 0, ROUNDED_LAST = 1, FROM_ONE = 2 };

struct Norm {
    const void *x, *weight;  // [rows, width], [width], of `type`, contiguous
    void* y;                 // [rows, width], of `type`
    int64_t rows, width;
    float epsilon;
    int32_t type, form;
};

// Kernels for matrices in tiles. What they split among threads are strips: `border` is the first after a share.
struct Tiled {
    int64_t (*bytes)(const Matrix&);
    int64_t (*border)(const Matrix&, int part, int parts);
    // One thread's part of the products of several matrices of one type and width, for up to FEW rows of x.
    void (*few)(const Matrix*, int32_t count, const void* x, int32_t type, int64_t rows, const Output*, int part, int parts);
    const Many* sparse;
    bool shorts;  // INT4 values are packed as SHORTS, see tiles.h, which other paths do not take
};

// The kernels of one instruction set; null where there is none.
struct Path {
    const char* name;
    bool multiplies_bfloat16;  // takes bfloat16 activations unconverted, where the values are bfloat16 too
    // Rows [first, last) of the matrix for up to FEW rows of x.
    void (*few)(const Matrix&, const Input&, const Output&, int64_t first, int64_t last);
    // Few rows of x as 16-bit integers, which `few` then takes where the values are int8; segments [first, last).
    void (*integers)(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last);
    const Many* sparse;  // skips zeros
    const Many* panels;  // bfloat16 activations with bfloat16 values, or int8 ones that are rounded as unpacking rounds
    // A dense bfloat16 matrix [out, in].
    void (*dense)(const uint16_t* weight, int64_t in, const Input&, const Output&, int64_t first, int64_t last);
    const Tiled* tiled;
    bool prefers_tiles;  // for values of all types, and not only for INT4
    const Attends* attends;  // null where torch's attention is fast
    bool (*norm)(const Norm&);  // false where it cannot compute this
};

extern const Path scalar;
#ifdef BUDWOOD_X86
extern const Tiled tiled_with_avx2, tiled_with_avx512;
extern const Path avx2;
extern const Path avx512;
#endif
#ifdef BUDWOOD_AMX
extern const Path amx;
bool amx_allowed();
#endif

// Memory that a thread keeps between calls; 64-byte aligned.
void* scratch(int slot, size_t bytes);

}  // namespace budwood
