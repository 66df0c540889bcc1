// AVX2, int8 values and few rows of x: sixteen columns at a time, multiplied with activations that are 16-bit integers with
// a scale for every SEGMENT of columns, as the values have one. The sums of a segment are exact.
#include "avx2.h"

namespace budwood::with_avx2 {
namespace {

template <int CODING, int M, int R>
INLINE void int8_rows(const Matrix& a, const int64_t* rows, bool safe, const Input& in, float (*sums)[M], const Tables& tables) {
    const int8_t* values = static_cast<const int8_t*>(a.values);
    const int16_t* x = static_cast<const int16_t*>(in.data);
    const Spread& table = tables.by[CODING];
    const int64_t segments = segments_of(a), words = safe ? 0 : a.in / LANE;
    const int8_t* at[R];
    const uint8_t* places[R];
    __m256 totals[R][M];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
        at[r] = values + a.starts[rows[r]];
        places[r] = a.places + rows[r] * a.stride;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) totals[r][m] = _mm256_setzero_ps();
    }
    for (int64_t segment = 0; segment < segments; ++segment) {
        __m256i s[R][M];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) s[r][m] = _mm256_setzero_si256();
        }
        const int64_t end = (segment + 1) * (SEGMENT / LANE);
        int64_t word = segment * (SEGMENT / LANE);
        for (; word < (end < words ? end : words); ++word) {
            uint32_t here[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                std::memcpy(&here[r], places[r] + 4 * word, 4);
                _mm_prefetch(reinterpret_cast<const char*>(at[r]) + AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                __m256i weights[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    const uint32_t one = here[r] >> (16 * half) & 255, two = here[r] >> (16 * half + 8) & 255;
                    const __m128i each = _mm_unpacklo_epi64(eight_bytes(table.bytes[one]), eight_bytes(table.bytes[two]));
                    const __m128i to = _mm_add_epi8(each, sixteen_bytes(tables.behind[count_of<CODING>(one, 1)]));
                    const int8_t* from = at[r] + count_of<CODING>(here[r], 2 * half);
                    weights[r] = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sixteen_bytes(from), to));
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m256i inputs =
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (word * M + m) * LANE + 16 * half));
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) s[r][m] = _mm256_add_epi32(s[r][m], _mm256_madd_epi16(weights[r], inputs));
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) at[r] += count_of<CODING>(here[r], LANE / 8);
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            // The remainder of the row; all of it near the end of the values.
            for (int64_t byte = 4 * word; byte < a.stride && byte < 4 * end; ++byte) {
                const int64_t column = 8 * byte, columns = a.in - column, left = values + a.count - at[r];
                uint32_t bits = places[r][byte];
                if (CODING == NIBBLES) bits = tables.unfolded[bits];
                if (columns < 8) bits &= (1u << columns) - 1;
                int8_t room[8] = {};
                if (left > 0) std::memcpy(room, at[r], size_t(left < 8 ? left : 8));
                const __m128i spread = _mm_shuffle_epi8(eight_bytes(room), eight_bytes(tables.by[BITMASK].bytes[bits]));
                const __m256i weights = _mm256_zextsi128_si256(_mm_cvtepi8_epi16(spread));
                at[r] += __builtin_popcount(bits);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m256i inputs = _mm256_zextsi128_si256(sixteen_bytes(x + place(M, m, column)));
                    s[r][m] = _mm256_add_epi32(s[r][m], _mm256_madd_epi16(weights, inputs));
                }
            }
            const float scale = a.scales[rows[r] * segments + segment];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 both = _mm256_set1_ps(scale * in.scales[m * segments + segment]);
                totals[r][m] = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(s[r][m]), totals[r][m]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) sums[r][m] = sum_of(totals[r][m]);
        each_more(a, rows[r], [&](int64_t column, float value) {
            for (int m = 0; m < M; ++m) {
                sums[r][m] += value * in.scales[m * segments + column / SEGMENT] * float(x[place(M, m, column)]);
            }
        });
    }
}

template <int CODING, int M>
void int8_of(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    constexpr int R = M <= 3 ? 2 : 1;
    const Tables& tables = tables_of_bytes();
    by_parts<M, R>(a, out, first, last, 16, [&](const int64_t* rows, bool safe, float (*sums)[M]) {
        int8_rows<CODING, M, R>(a, rows, safe, in, sums, tables);
    });
}

}  // namespace

void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) {
        a.coding == NIBBLES ? int8_of<NIBBLES, rows()>(a, in, out, first, last)
                            : int8_of<BITMASK, rows()>(a, in, out, first, last);
    });
}

// x -> 16-bit integers, 32767 for the largest of a SEGMENT; where `twice`, what they leave in the next row.
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    int16_t* all = static_cast<int16_t*>(const_cast<void*>(to.data));
    float* scales = const_cast<float*>(to.scales);
    const __m256i magnitude = _mm256_set1_epi32(INT32_MAX);
    for (int64_t segment = first; segment < last; ++segment) {
        const int64_t column = segment * SEGMENT, end = in - column < SEGMENT ? in : column + SEGMENT;
        for (int64_t to_row = 0; to_row < to.rows; to_row += to.twice ? 2 : 1) {
            const int64_t row = to.twice ? to_row / 2 : to_row, segments = to.stride / SEGMENT;
            __m256 values[SEGMENT / 8];
            __m256i largest = _mm256_setzero_si256();  // of the bits: NaN > infinity > finite
            for (int i = 0; i < SEGMENT / 8; ++i) {
                values[i] = widened(x, type, row * in + column + 8 * i, row * in + end);
                largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude));
            }
            alignas(32) int32_t each[8];
            _mm256_store_si256(reinterpret_cast<__m256i*>(each), largest);
            int32_t bits = 0;
            for (int i = 0; i < 8; ++i) bits = each[i] > bits ? each[i] : bits;
            float most;
            std::memcpy(&most, &bits, 4);
            const bool finite = bits < 0x7f800000;
            const float inverse = 32767 / most;
            const bool usable = finite && inverse <= 3.4028234e38f;  // else zeros, or too small for its inverse
            const auto keep = [&](int64_t at_row, int i, __m256i rounded) {
                const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(all + place(to.rows, at_row, column + 8 * i)), narrow);
            };
            const float scale = finite ? most / 32767 : __builtin_nanf("");
            const float finer = FINER * inverse <= 3.4028234e38f ? FINER * inverse : 0;
            for (int i = 0; i < SEGMENT / 8; ++i) {
                const __m256i rounded = usable ? _mm256_cvtps_epi32(_mm256_mul_ps(values[i], _mm256_set1_ps(inverse)))
                                               : _mm256_set1_epi32(finite ? 0 : 1);
                keep(to_row, i, rounded);
                if (!to.twice) continue;
                const __m256 left = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(rounded), _mm256_set1_ps(scale), values[i]);
                keep(to_row + 1, i, _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(finer))));
            }
            scales[to_row * segments + segment] = scale;
            if (to.twice) scales[(to_row + 1) * segments + segment] = scale / FINER;
        }
    }
}

}  // namespace budwood::with_avx2
