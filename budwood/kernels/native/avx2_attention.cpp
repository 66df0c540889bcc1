// AVX2, attention of one new token to keys and values in any dtype: both are read once, the sums are float32. torch
// multiplies single rows of bfloat16 several times slower than memory allows on processors without bfloat16.
#include "avx2.h"

#include <cmath>
#include <limits>

namespace budwood::with_avx2 {
namespace {

constexpr int PIECE = 64;  // tokens whose sums are computed together
constexpr int HEADS = 4;   // that share keys and values, for which these are read once
constexpr int WIDEST = 256;  // columns of a head
constexpr float NONE = -std::numeric_limits<float>::infinity();

int64_t groups(const Attention& a) { return (a.heads / a.shared + HEADS - 1) / HEADS; }  // of HEADS
int64_t splits(const Attention& a) { return (a.tokens + PIECE - 1) / PIECE; }
int64_t pieces(const Attention& a) { return a.width % 8 || a.width > WIDEST ? 0 : a.batch * a.shared * groups(a) * splits(a); }

// What is kept of a piece, for each of HEADS: the sum of the weighted values [width], the largest score, the sum of weights.
int64_t room(const Attention& a) { return a.width + 2; }
int64_t bytes(const Attention& a) { return pieces(a) * HEADS * room(a) * int64_t(sizeof(float)); }

// e^x for x <= 0, to 2 units in the last place; below -87.3 it is 0, NaN stays NaN. x = n ln 2 + r: a polynomial in r.
INLINE __m256 exponential(__m256 x) {
    const __m256 below = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
    __m256 y = _mm256_set1_ps(1.f / 5040);
    constexpr float COEFFICIENTS[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
#pragma GCC unroll 8
    for (const float coefficient : COEFFICIENTS) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(coefficient));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(below, _mm256_mul_ps(y, _mm256_castsi256_ps(exponent)));
}

// The tokens of one piece, for N heads.
template <int TYPE, int N>
struct Piece {
    using Kind = Values<TYPE>;
    using Value = typename Kind::Value;
    const Attention& a;
    const Value *query, *key, *value;
    const uint8_t* seen;
    int64_t tokens;
    alignas(32) float weights[N][PIECE];

    void add(float* sums) {
        multiply_keys();
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            float* of_head = sums + n * room(a);
            weigh(weights[n], of_head[a.width], of_head[a.width + 1]);
        }
        for (int64_t column = 0; column < a.width; column += 16) add_values(column, sums);
    }

    // weights[head][token]: the scores.
    void multiply_keys() {
        int64_t token = 0;
        for (; token + 2 <= tokens; token += 2) multiply<2>(token);
        if (token < tokens) multiply<1>(token);
        for (int64_t t = 0; t < PIECE; ++t) {
            if (t < tokens && (!seen || seen[t * a.seen_strides[1]])) continue;
            for (int n = 0; n < N; ++n) weights[n][t] = NONE;
        }
    }

    template <int T>
    INLINE void multiply(int64_t token) {
        __m256 s[T][N];
        for (int t = 0; t < T; ++t) for (int n = 0; n < N; ++n) s[t][n] = _mm256_setzero_ps();
        const Value* at = key + token * a.key_strides[2];
        for (int64_t column = 0; column < a.width; column += 8) {
            __m256 keys[T];
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) keys[t] = Kind::eight(at + t * a.key_strides[2] + column);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const __m256 queries = Kind::eight(query + n * a.query_strides[1] + column);
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) s[t][n] = _mm256_fmadd_ps(queries, keys[t], s[t][n]);
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) weights[n][token + t] = a.scale * sum_of(s[t][n]);
        }
    }

    // Scores to weights, relative to the largest score.
    static INLINE void weigh(float* scores, float& largest, float& sum) {
        largest = NONE;
        for (int t = 0; t < PIECE; ++t) largest = scores[t] > largest ? scores[t] : largest;
        const __m256 from = _mm256_set1_ps(largest == NONE ? 0 : largest);  // all may be unseen, or NaN
        __m256 total = _mm256_setzero_ps();
        for (int t = 0; t < PIECE; t += 8) {
            const __m256 weight = exponential(_mm256_sub_ps(_mm256_load_ps(scores + t), from));
            _mm256_store_ps(scores + t, weight);
            total = _mm256_add_ps(total, weight);
        }
        sum = sum_of(total);
    }

    // Columns [column, column + 16) of the sums, or the last 8.
    INLINE void add_values(int64_t column, float* sums) {
        const bool both = column + 16 <= a.width;
        __m256 s[2][N];
        for (int half = 0; half < 2; ++half) for (int n = 0; n < N; ++n) s[half][n] = _mm256_setzero_ps();
        const Value* at = value + column;
        for (int64_t t = 0; t < tokens; ++t, at += a.value_strides[2]) {
            // An unseen token may hold anything, as the unused part of a cache does.
            if (seen && !seen[t * a.seen_strides[1]]) continue;
            const __m256 values[2] = {Kind::eight(at), both ? Kind::eight(at + 8) : _mm256_setzero_ps()};
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const __m256 weight = _mm256_broadcast_ss(&weights[n][t]);
                s[0][n] = _mm256_fmadd_ps(weight, values[0], s[0][n]);
                s[1][n] = _mm256_fmadd_ps(weight, values[1], s[1][n]);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            _mm256_storeu_ps(sums + n * room(a) + column, s[0][n]);
            if (both) _mm256_storeu_ps(sums + n * room(a) + column + 8, s[1][n]);
        }
    }
};

template <int TYPE, int N>
void add_piece(const Attention& a, float* sums, int64_t sequence, int64_t shared, int64_t head, int64_t first) {
    using Value = typename Values<TYPE>::Value;
    const int64_t left = a.tokens - first;
    Piece<TYPE, N> piece = {
        a,
        static_cast<const Value*>(a.query) + sequence * a.query_strides[0] + head * a.query_strides[1],
        static_cast<const Value*>(a.key) + sequence * a.key_strides[0] + shared * a.key_strides[1] + first * a.key_strides[2],
        static_cast<const Value*>(a.value) + sequence * a.value_strides[0] + shared * a.value_strides[1] + first * a.value_strides[2],
        a.seen ? a.seen + sequence * a.seen_strides[0] + first * a.seen_strides[1] : nullptr,
        left < PIECE ? left : PIECE,
        {},
    };
    piece.add(sums);
}

template <int TYPE>
void add_of(const Attention& a, float* sums, int64_t first, int64_t last) {
    const int64_t in_group = a.heads / a.shared;
    for (int64_t number = first; number < last; ++number) {
        const int64_t split = number % splits(a), group = number / splits(a) % groups(a);
        const int64_t shared = number / splits(a) / groups(a) % a.shared;
        const int64_t sequence = number / splits(a) / groups(a) / a.shared;
        const int64_t head = shared * in_group + group * HEADS, heads = in_group - group * HEADS;
        float* to = sums + number * HEADS * room(a);
        switch (heads < HEADS ? heads : HEADS) {
            case 1: add_piece<TYPE, 1>(a, to, sequence, shared, head, split * PIECE); break;
            case 2: add_piece<TYPE, 2>(a, to, sequence, shared, head, split * PIECE); break;
            case 3: add_piece<TYPE, 3>(a, to, sequence, shared, head, split * PIECE); break;
            default: add_piece<TYPE, HEADS>(a, to, sequence, shared, head, split * PIECE);
        }
    }
}

void add(const Attention& a, void* sums, int64_t first, int64_t last) {
    float* to = static_cast<float*>(sums);
    switch (a.type) {
        case FLOAT32: add_of<FLOAT32>(a, to, first, last); break;
        case BFLOAT16: add_of<BFLOAT16>(a, to, first, last); break;
        default: add_of<FLOAT16>(a, to, first, last);
    }
}

void join(const Attention& a, const void* sums, int64_t first, int64_t last) {
    const int64_t in_group = a.heads / a.shared, step = HEADS * room(a);
    Output out = {a.out, nullptr, a.width, a.type};
    for (int64_t row = first; row < last; ++row) {  // sequence * heads + head
        const int64_t inside = row % in_group;
        const float* piece = static_cast<const float*>(sums) +
                             ((row / in_group * groups(a) + inside / HEADS) * splits(a) * HEADS + inside % HEADS) * room(a);
        float largest = NONE, sum = 0;
        for (int64_t i = 0; i < splits(a); ++i) largest = std::fmax(largest, piece[i * step + a.width]);
        if (largest == NONE) largest = 0;  // all tokens are unseen: the result is 0
        alignas(32) float total[WIDEST] = {};
        for (int64_t i = 0; i < splits(a); ++i, piece += step) {
            const float factor = std::exp(piece[a.width] - largest);
            sum += factor * piece[a.width + 1];
            for (int64_t column = 0; column < a.width; column += 8) {
                const __m256 added = _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_loadu_ps(piece + column));
                _mm256_store_ps(total + column, _mm256_add_ps(_mm256_load_ps(total + column), added));
            }
        }
        for (int64_t column = 0; column < a.width; ++column) store(out, row, column, sum == 0 ? 0 : total[column] / sum);
    }
}

}  // namespace

const Attends attends = {pieces, bytes, add, join};

}  // namespace budwood::with_avx2
