// AVX2, normalization by the root mean square in one pass over a row and back: torch makes eight passes, one operator each.
#include "avx2.h"

#include <cmath>

namespace budwood::with_avx2 {
namespace {

// Eight values rounded to a dtype, to nearest, ties to even: as float32, and written.
template <int TYPE>
struct Rounded;

template <>
struct Rounded<FLOAT32> {
    static INLINE __m256 wide(__m256 v) { return v; }
    static INLINE void write(float* to, __m256 v) { _mm256_storeu_ps(to, v); }
};

template <>
struct Rounded<FLOAT16> {
    static INLINE __m128i halves(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static INLINE __m256 wide(__m256 v) { return _mm256_cvtph_ps(halves(v)); }
    static INLINE void write(uint16_t* to, __m256 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves(v)); }
};

template <>
struct Rounded<BFLOAT16> {
    static INLINE __m256i bits(__m256 v) {  // in the upper halves
        const __m256i all = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(all, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(all, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
    }
    static INLINE __m256 wide(__m256 v) {
        return _mm256_castsi256_ps(_mm256_and_si256(bits(v), _mm256_set1_epi32(int(0xffff0000))));
    }
    static INLINE void write(uint16_t* to, __m256 v) {
        const __m256i low = _mm256_srli_epi32(bits(v), 16), packed = _mm256_packus_epi32(low, low);
        const __m256i joined = _mm256_permute4x64_epi64(packed, 0b1000);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(joined));
    }
};

template <int TYPE>
void norm_of(const Norm& a) {
    using Value = typename Values<TYPE>::Value;
    const Value *x = static_cast<const Value*>(a.x), *weight = static_cast<const Value*>(a.weight);
    Value* y = static_cast<Value*>(a.y);
    for (int64_t row = 0; row < a.rows; ++row, x += a.width, y += a.width) {
        __m256 s[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t column = 0; column < a.width; column += 16) {
            const bool both = column + 16 <= a.width;
            const __m256 v = Values<TYPE>::eight(x + column);
            const __m256 next = both ? Values<TYPE>::eight(x + column + 8) : _mm256_setzero_ps();
            s[0] = _mm256_fmadd_ps(v, v, s[0]);
            s[1] = _mm256_fmadd_ps(next, next, s[1]);
        }
        const __m256 factor = _mm256_set1_ps(1 / std::sqrt(sum_of(_mm256_add_ps(s[0], s[1])) / float(a.width) + a.epsilon));
        for (int64_t column = 0; column < a.width; column += 8) {
            __m256 v = _mm256_mul_ps(Values<TYPE>::eight(x + column), factor), w = Values<TYPE>::eight(weight + column);
            if (a.form == ROUNDED_FIRST) v = Rounded<TYPE>::wide(v);
            if (a.form == FROM_ONE) w = _mm256_add_ps(w, _mm256_set1_ps(1));
            Rounded<TYPE>::write(y + column, _mm256_mul_ps(v, w));
        }
    }
}

}  // namespace

bool norm(const Norm& a) {
    if (a.width % 8) return false;
    switch (a.type) {
        case FLOAT32: return norm_of<FLOAT32>(a), true;
        case BFLOAT16: return norm_of<BFLOAT16>(a), true;
        default: return norm_of<FLOAT16>(a), true;
    }
}

}  // namespace budwood::with_avx2
