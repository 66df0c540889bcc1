// AVX-512, int8 values and few rows of x: the activations are 16-bit integers with a scale for every SEGMENT of columns, as
// the values have one. Their products are summed exactly; each segment's sum is multiplied by both scales. The 16-bit
// rounding of an activation is less than a thousandth of that of bfloat16.
#include "avx512_few.h"

namespace budwood::with_avx512 {
namespace {

// A row's mask, padded with unset bits up to a multiple of 64.
INLINE const uint8_t* padded_mask(const Matrix& a, int64_t row, uint8_t* room) {
    const uint8_t* mask = mask_bytes(a, row, room);
    if (a.in % 64 == 0) return mask;
    if (mask != room) std::memcpy(room, mask, size_t(a.stride));
    if (a.in % 8) room[a.stride - 1] &= uint8_t((1u << (a.in % 8)) - 1);
    std::memset(room + a.stride, 0, 8);
    return room;
}

template <bool SAFE>
INLINE __m512i spread_bytes(uint64_t bits, const int8_t*& at, const int8_t* end) {
    const int64_t left = SAFE ? end - at : 64;
    const __m512i packed = left >= 64 ? _mm512_loadu_si512(at)
                                      : _mm512_maskz_loadu_epi8(left <= 0 ? 0ull : (1ull << left) - 1, at);
    at += __builtin_popcountll(bits);
    return expand(__mmask64(bits), packed);
}

template <bool SAFE, int M>
INLINE void int8_segment(const uint8_t* const mask[2], const int8_t*& at0, const int8_t*& at1, const int8_t* end,
                         const int16_t* x, int steps, __m512i* sums0, __m512i* sums1) {
    for (int step = 0; step < steps; ++step, x += 2 * LANE * M) {
        uint64_t bits[2];
        std::memcpy(&bits[0], mask[0] + 8 * step, 8);
        std::memcpy(&bits[1], mask[1] + 8 * step, 8);
        const __m512i one = spread_bytes<SAFE>(bits[0], at0, end), two = spread_bytes<SAFE>(bits[1], at1, end);
        const __m512i low0 = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(one));
        const __m512i high0 = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(one, 1));
        const __m512i low1 = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(two));
        const __m512i high1 = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(two, 1));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i low = _mm512_loadu_si512(x + LANE * m), high = _mm512_loadu_si512(x + LANE * (M + m));
            sums0[m] = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums0[m], low0, low), high0, high);
            sums1[m] = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums1[m], low1, low), high1, high);
        }
    }
}

// Recovered weights of a pair of rows: their range per row and segment.
struct Recovered {
    const uint8_t* counts[2];
    int64_t next[2];
    Recovered(const Matrix& a, int64_t row0, int64_t row1) : counts{}, next{} {
        if (!a.more_starts) return;
        const int64_t segments = segments_of(a), rows[2] = {row0, row1};
        for (int r = 0; r < 2; ++r) counts[r] = a.more_counts + rows[r] * segments, next[r] = a.more_starts[rows[r]];
    }
};

// The products of the recovered weights of both rows in one segment, sixteen of each at a time: activations are gathered from
// the 256 of the segment by four lookups.
template <int M>
INLINE void add_recovered(const Matrix& a, Recovered& recovered, int64_t segment, const int16_t* x, const float* scales,
                          int64_t segments, __m512* total0, __m512* total1) {
    int left[2] = {recovered.counts[0][segment], recovered.counts[1][segment]};
    while (left[0] > 0 || left[1] > 0) {
        __m128i columns[2];
        __m512 weights[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            const __mmask16 some = left[r] >= 16 ? 0xffff : left[r] <= 0 ? 0 : __mmask16((1u << left[r]) - 1);
            columns[r] = _mm_maskz_loadu_epi8(some, a.more_columns + recovered.next[r]);
            weights[r] = read_values(a.more_values, a.more_type, recovered.next[r], some);
            recovered.next[r] += left[r] < 16 ? (left[r] > 0 ? left[r] : 0) : 16;
            left[r] -= 16;
        }
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_set_m128i(columns[1], columns[0]));
        const __mmask32 odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), upper = _mm512_movepi16_mask(_mm512_slli_epi16(at, 8));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512i found[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int16_t* from = x + LANE * (2 * M * i + m);
                found[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + LANE * M));
            }
            const __m512i lower = _mm512_mask_blend_epi16(odd, found[0], found[1]);
            const __m512i picked = _mm512_mask_blend_epi16(upper, lower, _mm512_mask_blend_epi16(odd, found[2], found[3]));
            const __m512 one = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(picked)));
            const __m512 two = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(picked, 1)));
            const __m512 scale = _mm512_set1_ps(scales[m * segments]);
            total0[m] = _mm512_fmadd_ps(_mm512_mul_ps(weights[0], scale), one, total0[m]);
            total1[m] = _mm512_fmadd_ps(_mm512_mul_ps(weights[1], scale), two, total1[m]);
        }
    }
}

// Prefetches what `add_recovered` needs of a later row: three pieces, too short for the hardware prefetcher.
INLINE void prefetch_recovered(const Matrix& a, int64_t row) {
    const int64_t later = row + 8;
    if (!a.more_starts || later >= a.out) return;
    const int64_t first = a.more_starts[later], count = a.more_starts[later + 1] - first, bytes = a.more_type == FLOAT32 ? 4 : 2;
    _mm_prefetch(reinterpret_cast<const char*>(a.more_counts) + later * segments_of(a), _MM_HINT_T0);
    for (int64_t byte = 0; byte < count; byte += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(a.more_columns) + first + byte, _MM_HINT_T0);
    }
    for (int64_t byte = 0; byte < count * bytes; byte += 64) {
        _mm_prefetch(static_cast<const char*>(a.more_values) + first * bytes + byte, _MM_HINT_T0);
    }
}

template <int M>
void int8_rows(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    const int8_t* values = static_cast<const int8_t*>(a.values);
    const int8_t* end = values + a.count;
    const int16_t* x = static_cast<const int16_t*>(in.data);
    const int64_t half = (last - first + 1) / 2, segments = segments_of(a), room = (a.stride + 191) / 64 * 64;
    uint8_t* folded = static_cast<uint8_t*>(scratch(0, size_t(2 * room)));
    for (int64_t p = 0; p < half; ++p) {
        const int64_t row0 = first + p, row1 = row0 + half < last ? row0 + half : row0;
        // Read as words, so a row that does not end with one is padded with unset bits.
        const uint8_t* const masks[2] = {padded_mask(a, row0, folded), padded_mask(a, row1, folded + room)};
        const int8_t *at0 = values + a.starts[row0], *at1 = values + a.starts[row1];
        prefetch_places(a, row0);
        prefetch_places(a, row1);
        prefetch_recovered(a, row0);
        prefetch_recovered(a, row1);
        const bool safe = a.starts[row1 + 1] + 64 > a.count || a.starts[row0 + 1] + 64 > a.count;
        Recovered recovered(a, row0, row1);
        __m512 total0[M], total1[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total0[m] = total1[m] = _mm512_setzero_ps();
        for (int64_t segment = 0; segment < segments; ++segment) {
            const int64_t column = segment * SEGMENT, left = (a.in - column + 63) / 64;
            const int steps = int(left < SEGMENT / 64 ? left : SEGMENT / 64);
            const int16_t* here = x + column * M;
            __m512i sums0[M], sums1[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums0[m] = sums1[m] = _mm512_setzero_si512();
            for (int line = 0; line < 128; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(at0) + AHEAD + line, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(at1) + AHEAD + line, _MM_HINT_T0);
            }
            const uint8_t* const mask[2] = {masks[0] + column / 8, masks[1] + column / 8};
            safe ? int8_segment<true, M>(mask, at0, at1, end, here, steps, sums0, sums1)
                 : int8_segment<false, M>(mask, at0, at1, end, here, steps, sums0, sums1);
            const float scale0 = a.scales[row0 * segments + segment], scale1 = a.scales[row1 * segments + segment];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float scale = in.scales[m * segments + segment];
                total0[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale0 * scale), _mm512_cvtepi32_ps(sums0[m]), total0[m]);
                total1[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale1 * scale), _mm512_cvtepi32_ps(sums1[m]), total1[m]);
            }
            if (a.more_starts) add_recovered<M>(a, recovered, segment, here, in.scales + segment, segments, total0, total1);
        }
        store_pair<M>(out, row0, row1, total0, total1);
    }
}

}  // namespace

void few_int8(const Matrix& a, const Input& in, const Output& out, int64_t first, int64_t last) {
    by_rows(in.rows, [&](auto rows) { int8_rows<rows()>(a, in, out, first, last); });
}

// x -> 16-bit integers, 32767 for the largest of a SEGMENT; where `twice`, what they leave in the next row.
void integers(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    int16_t* all = static_cast<int16_t*>(const_cast<void*>(to.data));
    float* scales = const_cast<float*>(to.scales);
    const __m512 sign = _mm512_set1_ps(-0.0f);
    for (int64_t segment = first; segment < last; ++segment) {
        const int64_t column = segment * SEGMENT, count = in - column < SEGMENT ? in - column : SEGMENT;
        for (int64_t to_row = 0; to_row < to.rows; to_row += to.twice ? 2 : 1) {
            const int64_t row = to.twice ? to_row / 2 : to_row, segments = to.stride / SEGMENT;
            __m512 largest = _mm512_setzero_ps(), values[SEGMENT / 16];
            for (int i = 0; i < SEGMENT / 16; ++i) {
                const int64_t left = count - 16 * i;
                const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
                values[i] = read_values(x, type, row * in + column + 16 * i, some);
                // As integers, so that NaN > infinity > finite.
                largest = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest),
                                                               _mm512_castps_si512(_mm512_andnot_ps(sign, values[i]))));
            }
            const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(largest));
            float most;
            std::memcpy(&most, &bits, 4);
            const bool finite = bits < 0x7f800000;
            const float inverse = 32767 / most;
            const bool usable = finite && inverse <= 3.4028234e38f;  // else zeros, or too small for its inverse
            const auto keep = [&](int64_t at_row, int i, __m512i rounded) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(all + place(to.rows, at_row, column + 16 * i)),
                                    _mm512_cvtepi32_epi16(rounded));
            };
            const float scale = finite ? most / 32767 : __builtin_nanf("");
            const float finer = FINER * inverse <= 3.4028234e38f ? FINER * inverse : 0;
            for (int i = 0; i < SEGMENT / 16; ++i) {
                const __m512i rounded = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(values[i], _mm512_set1_ps(inverse)))
                                               : _mm512_set1_epi32(finite ? 0 : 1);
                keep(to_row, i, rounded);
                if (!to.twice) continue;
                const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(scale), values[i]);
                keep(to_row + 1, i, _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(finer))));
            }
            scales[to_row * segments + segment] = scale;
            if (to.twice) scales[(to_row + 1) * segments + segment] = scale / FINER;
        }
    }
}

}  // namespace budwood::with_avx512
