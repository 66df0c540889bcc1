// AVX2, matrices in tiles and few rows of x: load, shift, mask, permute, multiply-add for eight weights.
#pragma once

#include "avx2_tiles.h"

namespace budwood::tiles {
namespace {

// Factors of x, so that products stay far from the ends of float32.
constexpr float INPUT_SCALE[] = {0x1p32f, 0x1p32f, 1, 0x1p-24f, 0.25f, 0.25f, 0.25f};

constexpr int64_t PREFETCH = 1024, PREFETCH_EXTRAS = 2048;  // bytes

// How M rows of x are multiplied. Either view of x is [block][M][STRIDE], a block of columns at a time (one for M == 1).
template <int M>
struct Blocking {
    static constexpr int COLUMNS = M == 1 ? 65536 : M == 2 ? 1024 : M <= 4 ? 512 : 256, STRIDE = COLUMNS + 8;
    static constexpr int STRIPS = M <= 2 ? 2 : 1;   // at once, from distant parts: memory streams
    static constexpr int PASSES = M <= 4 ? 1 : 2;   // rows 0 to 3 of a strip, then 4 to 7: the sums fill the registers
    static constexpr int GROUP = M == 1 ? 1 : 16;  // times STRIPS: strips for which a block of x stays in the L1 cache
};

struct Views {
    const float *x, *rotated;  // one and the same for GROUPS
    const float* columns;      // [column][width_for(M) rows of x], for extras; null where there are none, or for one row of x
};

constexpr int width_for(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }

// The scales of rows 0 to 3, or 4 to 7, of a strip for both halves of a vector.
template <int TYPE>
INLINE __m256 scales_of_half(const char* scales, int half) {
    if (TYPE == INT8) return _mm256_broadcast_ps(at<const __m128>(scales, 16 * half));
    if (!has_scales(TYPE)) return _mm256_set1_ps(1);
    const __m256 all = group_scales(scales);
    return half ? _mm256_permute2f128_ps(all, all, 0x11) : _mm256_permute2f128_ps(all, all, 0);
}

// `tiles` tiles of R strips: sums[strip][half][m] += products, times the scales of integers.
template <int TYPE, int M, int R, int PASS, int PASSES>
INLINE void multiply_tiles(const char* const* from, const char* const* scales, const int64_t* ahead, int64_t tiles,
                           const float* x, const float* rotated, __m256 (*sums)[2][M]) {
    constexpr int BYTES = tile_bytes(TYPE), HALVES = 2 / PASSES, STRIDE = M == 1 ? 0 : Blocking<M>::STRIDE;
    __m256 s[R][HALVES][M];
    UNROLLED(r, R) UNROLLED(half, HALVES) UNROLLED(m, M) s[r][half][m] = _mm256_setzero_ps();
    for (int64_t i = 0; i < tiles; ++i, x += TILE, rotated += TILE) {
        UNROLLED(r, PASS ? 0 : R) UNROLLED(line, (BYTES + LINE - 1) / LINE) {
            _mm_prefetch(from[r] + i * BYTES + ahead[r] + LINE * line, _MM_HINT_T0);
        }
        UNROLLED(v, 16) {
            const int half = v / 2 % 2;
            if (PASSES == 2 && half != PASS) continue;
            UNROLLED(r, R) {
                __m256 weight;
                __m256i code;
                lanes<TYPE>(from[r] + i * BYTES, v, weight, code);
                UNROLLED(m, M) {
                    const __m256 inputs = _mm256_loadu_ps((v % 2 ? rotated : x) + STRIDE * m + v / 4 * 8);
                    __m256& sum = s[r][PASSES == 2 ? 0 : half][m];
                    sum = _mm256_fmadd_ps(weight, _mm256_permutevar_ps(inputs, code), sum);
                }
            }
        }
    }
    UNROLLED(r, R) UNROLLED(half, HALVES) {
        const int to = PASSES == 2 ? PASS : half;
        const __m256 scale = scales_of_half<TYPE>(scales[r], to);
        UNROLLED(m, M) sums[r][to][m] = _mm256_fmadd_ps(s[r][half][m], scale, sums[r][to][m]);
    }
}

// The same of a DENSE matrix, whose rows are lanes: the sums of even and of odd columns.
template <int M, int R>
INLINE void multiply_whole(const char* const* from, const char* const* scales, const int64_t* ahead, int64_t tiles,
                           const float* x, __m256 (*sums)[2][M]) {
    constexpr int BYTES = tile_bytes(WHOLE), STRIDE = M == 1 ? 0 : Blocking<M>::STRIDE, PARTS = M <= 4 ? 2 : 1;
    __m256 s[R][PARTS][M];
    UNROLLED(r, R) UNROLLED(part, PARTS) UNROLLED(m, M) s[r][part][m] = _mm256_setzero_ps();
    for (int64_t i = 0; i < tiles; ++i, x += TILE) {
        UNROLLED(line, 4) {
            UNROLLED(r, R) {
                if (line % 2) _mm_prefetch(from[r] + i * BYTES + ahead[r] + 32 * line, _MM_HINT_T0);
                const __m256i word = load_line(from[r] + i * BYTES + 32 * line);
                UNROLLED(k, 8) {
                    const __m256 weight = whole_column(word, k);
                    UNROLLED(m, M) {
                        __m256& sum = s[r][k % PARTS][m];
                        sum = _mm256_fmadd_ps(weight, _mm256_broadcast_ss(x + STRIDE * m + 8 * line + k), sum);
                    }
                }
            }
        }
    }
    UNROLLED(r, R) UNROLLED(part, PARTS) UNROLLED(m, M) {
        sums[r][part][m] = _mm256_fmadd_ps(s[r][part][m], group_scales(scales[r]), sums[r][part][m]);
    }
}

// Tiles [first, last) of R strips.
template <int TYPE, int M, int R>
INLINE void multiply_block(const Head& h, const char* const* strips, const int64_t* ahead, int64_t first, int64_t last,
                           const float* x, const float* rotated, __m256 (*sums)[2][M]) {
    const int64_t step = TYPE == INT8 ? SEGMENT / TILE : has_scales(TYPE) ? h.group / TILE : 65536;
    constexpr int PASSES = Blocking<M>::PASSES;
    for (int64_t tile = first; tile < last; tile += step, x += step * TILE, rotated += step * TILE) {
        const char *from[R], *scales[R];
        UNROLLED(r, R) {
            from[r] = strips[r] + tile_offset(h, TYPE, tile);
            scales[r] = strips[r] + scales_offset(h, TYPE, tile * TILE);
        }
        const int64_t tiles = std::min<int64_t>(last - tile, step);
        if constexpr (TYPE == WHOLE) {
            multiply_whole<M, R>(from, scales, ahead, tiles, x, sums);
        } else {
            multiply_tiles<TYPE, M, R, 0, PASSES>(from, scales, ahead, tiles, x, rotated, sums);
            if (PASSES == 2) multiply_tiles<TYPE, M, R, 1, PASSES>(from, scales, ahead, tiles, x, rotated, sums);
        }
    }
}

template <int TYPE>
INLINE __m256 eight(const void* data, int64_t index = 0) {
    return with_avx2::Values<TYPE>::eight(static_cast<const typename with_avx2::Values<TYPE>::Value*>(data) + index);
}

// Two floats from each of four places: half the instructions of loads of single floats, and of a gather less than that on Zen.
INLINE __m256 pairs_from(const float* a, const float* b, const float* c, const float* d) {
    const auto two = [](const float* low, const float* high) {
        return _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(at<const __m128i>(low, 0))), at<const __m64>(high, 0));
    };
    return joined(two(a, b), two(c, d));
}

// `count` entries of each of the eight rows of a strip: sums[m], by row.
template <int TYPE, int M>
INLINE void multiply_extras(const uint8_t* entry, int64_t count, const Views& in, __m256* sums) {
    constexpr int WIDTH = width_for(M);
    __m256 s[8];  // [row of the strip][row of x], four rows of the strip in each half
    UNROLLED(i, WIDTH) s[i] = _mm256_setzero_ps();
    alignas(32) float room[8];
    int64_t columns[STRIP] = {};
    for (int64_t j = 0; j < count; ++j, entry += entry_bytes(TYPE)) {
        UNROLLED(i, STRIP) columns[i] += entry[i];
        const __m256 weights = eight<TYPE>(entry + STRIP);
        _mm_prefetch(entry + PREFETCH_EXTRAS, _MM_HINT_T0);
        // One row of x: the next column takes the place of a second row, and is multiplied by zero.
        const auto inputs = [&](int i) { return M == 1 ? in.x + columns[i] : in.columns + WIDTH * columns[i]; };
        if (WIDTH == 2) {
            const __m256 second = M == 1 ? _mm256_setzero_ps() : weights;
            UNROLLED(k, 2) {
                const __m256 x = pairs_from(inputs(2 * k), inputs(2 * k + 1), inputs(2 * k + 4), inputs(2 * k + 5));
                const __m256 both = k ? _mm256_unpackhi_ps(weights, second) : _mm256_unpacklo_ps(weights, second);
                s[k] = _mm256_fmadd_ps(both, x, s[k]);
            }
        } else if (WIDTH == 4) {
            UNROLLED(i, 4) {
                const __m256 x = joined(_mm_load_ps(inputs(i)), _mm_load_ps(inputs(i + 4)));
                s[i] = _mm256_fmadd_ps(_mm256_permutevar_ps(weights, _mm256_set1_epi32(i)), x, s[i]);
            }
        } else {
            _mm256_store_ps(room, weights);
            UNROLLED(i, 8) s[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(room + i), _mm256_load_ps(inputs(i)), s[i]);
        }
    }
    if constexpr (WIDTH == 2) {
        sums[0] = _mm256_shuffle_ps(s[0], s[1], 0x88);
        if (M == 2) sums[M - 1] = _mm256_shuffle_ps(s[0], s[1], 0xdd);
    } else if constexpr (WIDTH == 4) {
        const __m256 a = _mm256_unpacklo_ps(s[0], s[1]), b = _mm256_unpackhi_ps(s[0], s[1]);
        const __m256 c = _mm256_unpacklo_ps(s[2], s[3]), d = _mm256_unpackhi_ps(s[2], s[3]);
        const __m256 turned[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee), _mm256_shuffle_ps(b, d, 0x44),
                                  _mm256_shuffle_ps(b, d, 0xee)};
        UNROLLED(m, M) sums[m] = turned[m];
    } else {
        transpose(s);
        UNROLLED(m, M) sums[m] = s[m];
    }
}

// The extras of a strip times x: sums[m], by row.
template <int M>
INLINE void add_extras(const Head& h, int64_t strip, const Views& in, __m256* sums) {
    const uint8_t* entry = entry_of(h, strip, 0);
    const int64_t count = *entries_of(h, strip);
    switch (h.extra_type) {
        case FLOAT32: return multiply_extras<FLOAT32, M>(entry, count, in, sums);
        case BFLOAT16: return multiply_extras<BFLOAT16, M>(entry, count, in, sums);
        default: return multiply_extras<FLOAT16, M>(entry, count, in, sums);
    }
}

INLINE __m128i to_bfloat16(__m256 v) {  // to nearest, ties to even
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// The sums of a strip, plus bias, to `count` rows of y.
INLINE void store_strip(const Output& out, int64_t token, __m256 sums, const int32_t* rows, int64_t count) {
    alignas(32) float wide[8] = {};
    alignas(16) uint16_t narrow[8];
    for (int i = 0; out.bias && i < count; ++i) wide[i] = load(out.bias, out.type, rows[i]);
    sums = _mm256_add_ps(sums, _mm256_load_ps(wide));
    if (out.type == FLOAT32) {
        _mm256_store_ps(wide, sums);
        for (int i = 0; i < count; ++i) static_cast<float*>(out.y)[token * out.stride + rows[i]] = wide[i];
    } else {
        const __m128i rounded = out.type == BFLOAT16 ? to_bfloat16(sums) : _mm256_cvtps_ph(sums, 0);
        _mm_store_si128(reinterpret_cast<__m128i*>(narrow), rounded);
        for (int i = 0; i < count; ++i) static_cast<uint16_t*>(out.y)[token * out.stride + rows[i]] = narrow[i];
    }
}

INLINE __m128 folded(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

// Fetches what the head has for a strip: its number of extras ends a loop, which waits for it otherwise.
INLINE void prefetch_head(const Head& h, int64_t strip) {
    _mm_prefetch(entries_of(h, strip), _MM_HINT_T0);
    _mm_prefetch(rows_of(h, strip), _MM_HINT_T0);
    _mm_prefetch(begins_of(h) + strip, _MM_HINT_T0);
}

// Strips first + r * part + i, for r < R and i < part.
template <int TYPE, int M, int R>
void multiply_strips(const Head& h, const Views& in, const Output& out, int64_t first, int64_t part) {
    constexpr int64_t GROUP = Blocking<M>::GROUP, PER = Blocking<M>::COLUMNS / TILE;
    const int64_t* begins = begins_of(h);
    const int64_t blocks = round_up(h.tiles, PER) / PER;
    const __m256 main = _mm256_set1_ps(1 / WEIGHT_SCALE[TYPE] / INPUT_SCALE[TYPE]);
    const __m256 beside = _mm256_set1_ps(1 / INPUT_SCALE[TYPE]);
    __m256 sums[GROUP][R][2][M];
    for (int64_t begin = 0; begin < part; begin += GROUP) {
        const int64_t group = std::min<int64_t>(GROUP, part - begin);
        std::memset(static_cast<void*>(sums), 0, sizeof(sums));
        for (int r = 0; r < R; ++r) prefetch_head(h, first + r * part + begin + 2 * GROUP);
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t i = 0; i < group; ++i) {
                // Prefetched: the same columns of the next strip, or the next block of the first strip.
                const bool again = i + 1 == group && block + 1 < blocks;
                const int64_t next = i + 1 < group ? block : again ? block + 1 : 0;
                const char* strips[R];
                int64_t ahead[R];
                for (int r = 0; r < R; ++r) {
                    const int64_t strip = first + r * part + begin + i;
                    const int64_t to = begins[again ? strip - i : strip + 1] + tile_offset(h, TYPE, next * PER);
                    strips[r] = strip_of(h, strip);
                    ahead[r] = blocks == 1 ? PREFETCH : to - begins[strip] - tile_offset(h, TYPE, block * PER);
                }
                const int64_t column = block * M * Blocking<M>::STRIDE, last = std::min((block + 1) * PER, h.tiles);
                multiply_block<TYPE, M, R>(h, strips, ahead, block * PER, last, in.x + column, in.rotated + column, sums[i]);
            }
        }
        for (int64_t i = 0; i < group * R; ++i) {
            const int64_t strip = first + i % R * part + begin + i / R;
            __m256 extra[M];
            add_extras<M>(h, strip, in, extra);
            const int64_t rows = std::min<int64_t>(STRIP, h.out - STRIP * strip);
            for (int m = 0; m < M; ++m) {
                const __m256 one = sums[i / R][i % R][0][m], two = sums[i / R][i % R][1][m];
                const __m256 sum = TYPE == WHOLE ? _mm256_add_ps(one, two) : joined(folded(one), folded(two));
                const __m256 whole = _mm256_fmadd_ps(sum, main, _mm256_mul_ps(extra[m], beside));
                store_strip(out, m, whole, rows_of(h, strip), rows);
            }
        }
    }
}

template <int M>
INLINE int64_t place_in_view(int64_t column, int m) {
    constexpr int COLUMNS = Blocking<M>::COLUMNS;
    return (column / COLUMNS * M + m) * Blocking<M>::STRIDE + column % COLUMNS;
}

// `rotated` from `view`, within `ring` columns each.
template <int M>
void rotate(int64_t in, int64_t ring, const float* view, float* rotated) {
    const int64_t whole = round_up(in, TILE);
    for (int64_t begin = 0; begin < whole; begin += ring) {
        const int size = int(std::min<int64_t>(whole - begin, ring));
        for (int m = 0; m < M; ++m) {
            const float* segment = view + place_in_view<M>(begin, m);
            float* to = rotated + place_in_view<M>(begin, m);
            for (int c = 0; c < size; c += 4) {
                const auto away = [&](int k) {
                    const int from = c - 4 * AWAY[ROTATED][k];
                    return _mm_load_ps(segment + (from < 0 ? from + size : from));
                };
                const __m128 low = _mm_blend_ps(away(0), away(1), 2), high = _mm_blend_ps(away(2), away(3), 8);
                _mm_store_ps(to + c, _mm_blend_ps(low, high, 12));
            }
        }
    }
}

// x [M, in] as Blocking wants it, times `scale`. `columns` may be null.
template <int TYPE, int M>
void arrange(const void* x, int64_t in, float scale, float* view, float* columns) {
    const int64_t whole = round_up(in, TILE);
    const __m256 by = _mm256_set1_ps(scale);
    for (int m = 0; m < M; ++m) {
        int64_t c = 0;
        for (; c + 8 <= in; c += 8) {
            _mm256_store_ps(view + place_in_view<M>(c, m), _mm256_mul_ps(eight<TYPE>(x, m * in + c), by));
        }
        for (; c < whole; c += 8) {
            const __m256 rest = with_avx2::widened(x, TYPE, m * in + c, (m + 1) * in);
            _mm256_store_ps(view + place_in_view<M>(c, m), _mm256_mul_ps(rest, by));
        }
    }
    if (M == 1) view[whole] = 0;  // extras of the last column read it too
    constexpr int WIDTH = width_for(M);
    for (int64_t c = 0; columns && c < whole; c += 8) {
        __m256 r[8];
        UNROLLED(m, 8) r[m] = m < M ? _mm256_load_ps(view + place_in_view<M>(c, m)) : _mm256_setzero_ps();
        transpose(r);
        UNROLLED(k, 8) {
            float* to = columns + (c + k) * WIDTH;
            if (WIDTH == 2) _mm_storel_pi(at<__m64>(to, 0), _mm256_castps256_ps128(r[k]));
            else if (WIDTH == 4) _mm_store_ps(to, _mm256_castps256_ps128(r[k]));
            else _mm256_store_ps(to, r[k]);
        }
    }
}

// x [M, in] as float32 times `scale`, in memory of this thread with room for `rotated`, which is not made yet.
template <int M>
Views arranged(const void* x, int32_t type, int64_t in, float scale, bool rotates, bool extras) {
    // A block of any Blocking takes at most 264 floats for 256 columns.
    const int64_t whole = round_up(in, 1024) / 256 * 264, columns = M > 1 && extras ? width_for(M) * whole : 0;
    float* view = static_cast<float*>(scratch(6, size_t((2 * M * whole + columns) * 4)));
    const Views found = {view, rotates ? view + M * whole : view, columns ? view + 2 * M * whole : nullptr};
    const auto bring = type == FLOAT32 ? arrange<FLOAT32, M> : type == BFLOAT16 ? arrange<BFLOAT16, M> : arrange<FLOAT16, M>;
    bring(x, in, scale, view, const_cast<float*>(found.columns));
    return found;
}

bool has_extras(const Head& h) {  // the first row of those that were sorted together has the most
    for (int64_t strip = 0; strip < h.strips; strip += SORTED / STRIP) {
        if (*entries_of(h, strip)) return true;
    }
    return false;
}

template <int TYPE, int M>
void few_of(const Matrix* matrices, int32_t count, const void* x, int32_t type, const Output* outputs, int part, int parts) {
    const int64_t in = matrices[0].in;
    bool rotates = false, extras = false;
    for (int32_t i = 0; i < count; ++i) {
        rotates = rotates || head_of(matrices[i]).kind == ROTATED;
        extras = extras || has_extras(head_of(matrices[i]));
    }
    const Views all = arranged<M>(x, type, in, INPUT_SCALE[TYPE], rotates, extras);
    int64_t ring = 0;
    for (int32_t i = 0; i < count; ++i) {
        constexpr int R = Blocking<M>::STRIPS;
        const Head& h = head_of(matrices[i]);
        if (h.kind == ROTATED && h.group != ring) rotate<M>(in, ring = h.group, all.x, const_cast<float*>(all.rotated));
        const Views views = {all.x, h.kind == ROTATED ? all.rotated : all.x, all.columns};
        const int64_t first = border(matrices[i], part, parts), last = border(matrices[i], part + 1, parts);
        const int64_t each = (last - first) / R;
        multiply_strips<TYPE, M, R>(h, views, outputs[i], first, each);
        if (R > 1 && first + R * each < last) {
            multiply_strips<TYPE, M, 1>(h, views, outputs[i], first + R * each, last - first - R * each);
        }
    }
}

}  // namespace
}  // namespace budwood::tiles
