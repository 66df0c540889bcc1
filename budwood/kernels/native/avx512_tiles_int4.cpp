// AVX-512, matrices of 4-bit values in tiles and few rows of x; those of other values as on AVX2.
//
// The dot product of bfloat16 takes pairs: weights from a table of sixteen by `vpermw`, and x by the same instruction from the
// 32 columns of a tile. x of other types is the sum of two or three bfloat16 numbers, exactly.
#include "avx2_tiles_few.h"

#include <cmath>

namespace budwood {

namespace tiles {
namespace {

constexpr int64_t AHEAD = 2048, AHEAD_LATE = 1024;  // bytes to prefetch

// A constant that stays in a register: gcc makes constants anew in every turn of a loop.
INLINE __m512i in_register(__m512i constant) {
    asm("" : "+v"(constant));
    return constant;
}

INLINE __m512i table_of(uint16_t (*entry)(int word)) {
    alignas(64) uint16_t table[32];
    for (int word = 0; word < 32; ++word) table[word] = entry(word);
    return in_register(_mm512_load_si512(table));
}

// Four bits in two's complement -> bfloat16; `vpermw` reads five bits of an index, so every number is there twice.
INLINE __m512i numbers() {
    alignas(32) static const uint16_t table[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                   0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    return in_register(_mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table))));
}

// x of one tile: [TERMS][M][32 columns], and behind it, if ROTATES, the rotated view of the same.
template <int M, int TERMS>
constexpr int64_t PER_TILE = int64_t(M) * TERMS * TILE;

// sums[strip][m] += products with `tiles` tiles of two strips, times the scales. Lane l is row l % 8.
template <bool ROTATES, int M, int TERMS>
INLINE void multiply_shorts(const char* const* from, const char* const* scales, int64_t tiles, const uint16_t* x,
                            __m512 (*sums)[M]) {
    constexpr int PARTS = M == 1 ? 2 : 1;  // so that additions need not wait for each other
    constexpr int64_t STEP = PER_TILE<M, TERMS>, VIEWS = ROTATES ? 2 : 1;
    const __m512i values = numbers(), codes_only = in_register(_mm512_set1_epi16(3));
    // The first column of a word's group: x is the first view for even words, and the second one for odd ones.
    const __m512i begins[4] = {
        table_of([](int word) { return uint16_t(word / 16 * 16 + 0 + (ROTATES ? word % 2 * 32 : 0)); }),
        table_of([](int word) { return uint16_t(word / 16 * 16 + 4 + (ROTATES ? word % 2 * 32 : 0)); }),
        table_of([](int word) { return uint16_t(word / 16 * 16 + 8 + (ROTATES ? word % 2 * 32 : 0)); }),
        table_of([](int word) { return uint16_t(word / 16 * 16 + 12 + (ROTATES ? word % 2 * 32 : 0)); }),
    };
    __m512 s[2][PARTS][M];
    UNROLLED(r, 2) UNROLLED(part, PARTS) UNROLLED(m, M) s[r][part][m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < tiles; ++i, x += VIEWS * STEP) {
        UNROLLED(r, 2) {
            const char* tile = from[r] + i * tile_bytes(SHORTS);
            _mm_prefetch(tile + AHEAD, _MM_HINT_T0);
            _mm_prefetch(tile + AHEAD + LINE, _MM_HINT_T0);
            const __m512i words = _mm512_loadu_si512(tile);
            const __m512i codes = _mm512_cvtepu8_epi16(_mm256_load_si256(at<const __m256i>(tile, 64)));
            UNROLLED(k, 4) {
                const __m512bh weights = __m512bh(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * k), values));
                // (codes & 3) | begins
                const __m512i columns =
                    _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 2 * k), codes_only, begins[k], 0xea);
                UNROLLED(m, M) UNROLLED(term, TERMS) {
                    const __m512i* view = at<const __m512i>(x, (term * M + m) * TILE * 2);
                    const __m512i inputs =
                        ROTATES ? _mm512_permutex2var_epi16(_mm512_load_si512(view), columns,
                                                            _mm512_load_si512(at<const __m512i>(view, STEP * 2)))
                                : _mm512_permutexvar_epi16(columns, _mm512_load_si512(view));
                    __m512& sum = s[r][k % PARTS][m];
                    sum = _mm512_dpbf16_ps(sum, weights, __m512bh(inputs));
                }
            }
        }
    }
    UNROLLED(r, 2) {
        const __m512 scale = _mm512_broadcast_f32x8(group_scales(scales[r]));
        UNROLLED(part, PARTS) UNROLLED(m, M) sums[r][m] = _mm512_fmadd_ps(s[r][part][m], scale, sums[r][m]);
    }
}

// The same for `late` late tiles of a group, whose x is that of the four tiles from `x` on.
template <bool ROTATES, int M, int TERMS>
INLINE void multiply_late(const char* const* from, const char* const* scales, int64_t late, const uint16_t* x, __m512 (*sums)[M]) {
    constexpr int64_t STEP = PER_TILE<M, TERMS> * (ROTATES ? 2 : 1);
    const __m512i values = numbers();
    __m512 s[2][M];
    UNROLLED(r, 2) UNROLLED(m, M) s[r][m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < late; ++i) {
        UNROLLED(r, 2) {
            const char* tile = from[r] + i * LATE_BYTES;
            _mm_prefetch(tile + AHEAD_LATE, _MM_HINT_T0);
            _mm_prefetch(tile + AHEAD_LATE + LINE, _MM_HINT_T0);
            const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at<const __m256i>(tile, 0)));
            UNROLLED(half, 2) {
                const __m512bh weights = __m512bh(_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * half), values));
                const __m512i columns = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at<const __m256i>(tile, 32 + 32 * half)));
                const __mmask32 upper = _mm512_test_epi16_mask(columns, _mm512_set1_epi16(64));
                UNROLLED(m, M) UNROLLED(term, TERMS) {
                    const auto view = [&](int t) { return _mm512_load_si512(x + t * STEP + (term * M + m) * TILE); };
                    const __m512i low = _mm512_permutex2var_epi16(view(0), columns, view(1));
                    const __m512i high = _mm512_permutex2var_epi16(view(2), columns, view(3));
                    s[r][m] = _mm512_dpbf16_ps(s[r][m], weights, __m512bh(_mm512_mask_mov_epi16(low, upper, high)));
                }
            }
        }
    }
    UNROLLED(r, 2) {
        const __m512 scale = _mm512_broadcast_f32x8(group_scales(scales[r]));
        UNROLLED(m, M) sums[r][m] = _mm512_fmadd_ps(s[r][m], scale, sums[r][m]);
    }
}

// The same of a DENSE matrix, whose rows are lanes: word `word` of two lines has columns word / 16 * 8 + word % 2 * 4 and on.
template <int M, int TERMS>
INLINE void multiply_both(const char* const* from, const char* const* scales, int64_t tiles, const uint16_t* x, __m512 (*sums)[M]) {
    constexpr int PARTS = M == 1 ? 2 : 1;
    const __m512i values = numbers();
    const __m512i first = table_of([](int word) { return uint16_t(word / 16 * 8 + word % 2 * 4); });
    __m512i columns[8];
    UNROLLED(k, 8) columns[k] = in_register(_mm512_add_epi16(first, _mm512_set1_epi16(k / 4 * 16 + k % 4)));
    __m512 s[2][PARTS][M];
    UNROLLED(r, 2) UNROLLED(part, PARTS) UNROLLED(m, M) s[r][part][m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < tiles; ++i, x += PER_TILE<M, TERMS>) {
        UNROLLED(k, 8) {
            __m512bh weights[2];
            UNROLLED(r, 2) {
                const char* half = from[r] + i * tile_bytes(WHOLE) + k / 4 * 64;
                if (k % 4 == 0) _mm_prefetch(half + AHEAD, _MM_HINT_T0);
                const __m512i words = _mm512_srli_epi16(_mm512_loadu_si512(half), 4 * (k % 4));
                weights[r] = __m512bh(_mm512_permutexvar_epi16(words, values));
            }
            UNROLLED(m, M) UNROLLED(term, TERMS) {
                const __m512i view = _mm512_load_si512(at<const __m512i>(x, (term * M + m) * TILE * 2));
                const __m512bh inputs = __m512bh(_mm512_permutexvar_epi16(columns[k], view));
                UNROLLED(r, 2) s[r][k % PARTS][m] = _mm512_dpbf16_ps(s[r][k % PARTS][m], weights[r], inputs);
            }
        }
    }
    UNROLLED(r, 2) {
        const __m512 scale = _mm512_broadcast_f32x8(group_scales(scales[r]));
        UNROLLED(part, PARTS) UNROLLED(m, M) sums[r][m] = _mm512_fmadd_ps(s[r][part][m], scale, sums[r][m]);
    }
}

struct Inputs {
    const uint16_t* x;
    Views wide;  // in float32, for extras
};

// Strips [first, last), two at a time from distant parts; the last one twice where their number is odd.
template <int TYPE, bool ROTATES, int M, int TERMS>
void multiply_in_pairs(const Head& h, const Inputs& in, const Output& out, int64_t first, int64_t last) {
    const int64_t pairs = (last - first + 1) / 2, step = h.group / TILE;
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t strips[2] = {first + pair, std::min(first + pairs + pair, last - 1)};
        __m512 sums[2][M];
        UNROLLED(r, 2) UNROLLED(m, M) sums[r][m] = _mm512_setzero_ps();
        UNROLLED(r, 2) prefetch_head(h, strips[r] + 2);
        const uint16_t* x = in.x;
        for (int64_t tile = 0; tile < h.tiles; tile += step, x += step * PER_TILE<M, TERMS> * (ROTATES ? 2 : 1)) {
            const char *from[2], *scales[2];
            UNROLLED(r, 2) {
                from[r] = strip_of(h, strips[r]) + tile_offset(h, TYPE, tile);
                scales[r] = strip_of(h, strips[r]) + scales_offset(h, TYPE, tile * TILE);
            }
            const int64_t tiles = std::min(h.tiles - tile, step);
            if constexpr (TYPE == WHOLE) multiply_both<M, TERMS>(from, scales, tiles, x, sums);
            else multiply_shorts<ROTATES, M, TERMS>(from, scales, tiles, x, sums);
            if (TYPE == SHORTS && h.late) {
                UNROLLED(r, 2) from[r] = late_of(h, strips[r], tile / step);
                multiply_late<ROTATES, M, TERMS>(from, scales, h.late, x, sums);
            }
        }
        for (int r = 0; r < 2; ++r) {
            const int64_t rows = std::min<int64_t>(STRIP, h.out - STRIP * strips[r]);
            __m256 extra[M];
            add_extras<M>(h, strips[r], in.wide, extra);
            UNROLLED(m, M) {
                const __m256 low = _mm512_castps512_ps256(sums[r][m]), high = _mm512_extractf32x8_ps(sums[r][m], 1);
                store_strip(out, m, _mm256_add_ps(_mm256_add_ps(low, high), extra[m]), rows_of(h, strips[r]), rows);
            }
        }
    }
}

// Sixteen numbers as the sum of bfloat16 ones. What is left of infinity and of NaN is zero.
template <int TERMS>
INLINE void split(__m512 value, uint16_t* to, int64_t stride) {
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i bits = _mm512_castps_si512(value);
    value = _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000)));  // stays NaN when cut
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    UNROLLED(term, TERMS) {
        const __m512i high = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(int(0xffff0000)));
        _mm256_store_si256(at<__m256i>(to, 2 * term * stride), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
        value = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(high));
    }
}

// x [M, in] as PER_TILE says.
template <int M, int TERMS>
void arrange_pairs(const void* x, int32_t type, int64_t in, bool rotates, uint16_t* to) {
    const int64_t step = PER_TILE<M, TERMS> * (rotates ? 2 : 1);
    for (int m = 0; m < M; ++m) {
        for (int64_t c = 0; c < round_up(in, 4 * TILE); c += 16) {  // zeros for late tiles
            const __m256 low = with_avx2::widened(x, type, m * in + c, (m + 1) * in);
            const __m256 high = c + 8 < in ? with_avx2::widened(x, type, m * in + c + 8, (m + 1) * in) : _mm256_setzero_ps();
            const __m512 sixteen = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
            split<TERMS>(sixteen, to + c / TILE * step + m * TILE + c % TILE, M * TILE);
        }
    }
}

// The rotated views behind the first ones, within `ring` columns each. A group of four columns is a word of 64 bits.
template <int M, int TERMS>
void rotate_pairs(int64_t in, int64_t ring, uint16_t* x) {
    const int64_t step = 2 * PER_TILE<M, TERMS>, whole = round_up(in, TILE);
    for (int64_t begin = 0; begin < whole; begin += ring) {
        const int groups = int(std::min<int64_t>(whole - begin, ring)) / 4;
        for (int row = 0; row < M * TERMS; ++row) {
            const auto group = [&](int g) { return at<uint64_t>(x + (begin / TILE + g / 8) * step, (row * TILE + g % 8 * 4) * 2); };
            for (int g = 0; g < groups; ++g) {
                uint64_t word = 0;
                for (int k = 0; k < 4; ++k) {
                    uint64_t seen;
                    int from = g - AWAY[ROTATED][k];
                    while (from < 0) from += groups;
                    std::memcpy(&seen, group(from), 8);
                    word |= seen & 0xffffull << 16 * k;
                }
                std::memcpy(group(g) + PER_TILE<M, TERMS> / 4, &word, 8);
            }
        }
    }
}

template <int M, int TERMS>
void few_pairs(const Matrix* matrices, int32_t count, const void* x, int32_t type, const Output* outputs, int part, int parts) {
    const int64_t in = matrices[0].in, tiles = round_up(in, TILE) / TILE;
    bool extras = false;
    for (int32_t i = 0; i < count; ++i) extras = extras || has_extras(head_of(matrices[i]));
    const Views wide = extras ? arranged<M>(x, type, in, 1, false, true) : Views();
    // Late tiles read four tiles from any on, and use no more than there are.
    uint16_t* pairs = static_cast<uint16_t*>(scratch(5, size_t((2 * round_up(tiles, 4) + 8) * PER_TILE<M, TERMS> * 2)));
    int64_t ring = -1;  // of the views that are there
    for (int32_t i = 0; i < count; ++i) {
        const Head& h = head_of(matrices[i]);
        const bool rotates = h.kind == ROTATED;
        if (const int64_t wanted = rotates ? h.group : 0; wanted != ring) {
            arrange_pairs<M, TERMS>(x, type, in, rotates, pairs);
            if (rotates) rotate_pairs<M, TERMS>(in, wanted, pairs);
            ring = wanted;
        }
        const int64_t first = border(matrices[i], part, parts), last = border(matrices[i], part + 1, parts);
        const auto multiply = type_of(h) == WHOLE ? multiply_in_pairs<WHOLE, false, M, TERMS>
                              : rotates           ? multiply_in_pairs<SHORTS, true, M, TERMS>
                                                  : multiply_in_pairs<SHORTS, false, M, TERMS>;
        if (first < last) multiply(h, {pairs, wide}, outputs[i], first, last);
    }
}

void few_int4_with_avx512(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows,
                          const Output* outputs, int part, int parts) {
    constexpr int64_t HALF = 4;  // rows of float32 at a time: more are no faster, as every weight is multiplied three times
    if (type_of(head_of(matrices[0])) == INT4) return few_int4(matrices, count, x, type, rows, outputs, part, parts);
    if (type == FLOAT32 && rows > HALF) {
        for (int32_t i = 0; i < count; ++i) {
            Output rest = outputs[i];
            rest.y = static_cast<float*>(rest.y) + HALF * rest.stride;
            few_int4_with_avx512(matrices + i, 1, x, type, HALF, outputs + i, part, parts);
            few_int4_with_avx512(matrices + i, 1, static_cast<const float*>(x) + HALF * matrices[0].in, type, rows - HALF, &rest,
                                 part, parts);
        }
        return;
    }
    by_rows(rows, [&](auto m) {
        if (type == BFLOAT16) return few_pairs<m(), 1>(matrices, count, x, type, outputs, part, parts);
        if (type == FLOAT16) return few_pairs<m(), 2>(matrices, count, x, type, outputs, part, parts);
        if constexpr (m() <= HALF) few_pairs<m(), 3>(matrices, count, x, type, outputs, part, parts);
    });
}

void few_with_avx512(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs,
                     int part, int parts) {
    few_of_any(few_int4_with_avx512, matrices, count, x, type, rows, outputs, part, parts);
}

}  // namespace
}  // namespace tiles

const Tiled tiled_with_avx512 = {tiles::bytes, tiles::border, tiles::few_with_avx512, &tiles::by_sparse, true};

}  // namespace budwood
