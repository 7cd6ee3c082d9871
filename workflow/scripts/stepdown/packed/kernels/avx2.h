// Strips with AVX2 and FMA. A block goes in two halves of 8 rows, as in avx512.h but for TopK, whose weights are added
// one by one.
#pragma once

#include "matrix.h"

namespace {

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) inline

// Eight values of bf16 as floats, and back: to nearest, ties to even; a NaN stays one.
AVX2_INLINE __m256 load_wide(const bf16 *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

AVX2_INLINE void store_narrow(bf16 *to, __m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i whole = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), none);
    const __m128i low = _mm256_castsi256_si128(whole), high = _mm256_extracti128_si256(whole, 1);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(low, high));
}

// A float as bf16 can hold it.
AVX2_INLINE __m256 rounded(__m256 values) {
    alignas(16) bf16 eight[8];
    store_narrow(eight, values);
    return load_wide(eight);
}

template <int R> struct Strip256 {
    static constexpr int ROWS = R;
    static constexpr bool WAITS = R < 4;
    static Run top_k(const Matrix &m, int64_t strip) { return run_of(m, strip, 2); }
};

template <int R> struct Floats256 : Strip256<R> {
    static constexpr int CHAINS = std::max(1, 4 / R);
    __m256 of[CHAINS][R][2];
};

// Of whole numbers, still to be multiplied by the scales of the rows.
template <int BITS, int R> struct Codes256 : Strip256<R> {
    __m256 of[R][2];
};

// --- bf16 --------------------------------------------------------------------------------------------------------------

// Weights come in pairs: the first of each 32 bits is the lower half.
AVX2_INLINE __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
AVX2_INLINE __m256 second_of(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

template <int R>
AVX2_INLINE void add_dense(const Matrix &m, int64_t block, Input in, int64_t column, Floats256<R> &total) {
    const bf16 *w = m.dense + block * B * B;
    const float *x = in.wide + column * B * R;
    fetch<512>(w);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256i weights = _mm256_loadu_si256((const __m256i *)(w + 32 * pair + 16 * half));
            const __m256 first = first_of(weights), second = second_of(weights);
#pragma GCC unroll 4
            for (int n = 0; n < R; ++n) {
                __m256 &sum = total.of[pair % total.CHAINS][n][half];
                sum = _mm256_fmadd_ps(first, _mm256_broadcast_ss(x + 2 * pair * R + n), sum);
                sum = _mm256_fmadd_ps(second, _mm256_broadcast_ss(x + (2 * pair + 1) * R + n), sum);
            }
        }
}

template <int R>
AVX2_INLINE void add_two_four(const Matrix &m, int64_t block, Input in, int64_t column, Floats256<R> &total) {
    const bf16 *w = m.two_four + block * 128, *x = in.x + column * B * R;
    const uint64_t *words = m.positions + block * 4;
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    fetch<256>(w), fetch<32, AHEAD_OF_POSITIONS>(words);
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256i weights = _mm256_loadu_si256((const __m256i *)(w + 32 * group + 16 * half));
            const __m256 first = first_of(weights), second = second_of(weights);
            // A permutation of floats looks at the lowest two bits only.
            const __m256i position = _mm256_srlv_epi32(_mm256_set1_epi32(int(words[group] >> 32 * half)), shifts);
            const __m256i next = _mm256_srli_epi32(position, 2);
#pragma GCC unroll 4
            for (int n = 0; n < R; ++n) {
                int64_t four;
                std::memcpy(&four, x + n * B + 4 * group, 8);
                const __m256 columns = first_of(_mm256_cvtepu16_epi32(_mm_set1_epi64x(four)));
                __m256 &sum = total.of[group % total.CHAINS][n][half];
                sum = _mm256_fmadd_ps(first, _mm256_permutevar_ps(columns, position), sum);
                sum = _mm256_fmadd_ps(second, _mm256_permutevar_ps(columns, next), sum);
            }
        }
}

// R floats, one for each row of x.
template <int R> struct Rows {
    typedef float type __attribute__((vector_size(4 * R), aligned(4), may_alias));
};

// One block, its weights one by one, to sums of their own: [16 outputs][R]; bf16 in either case. Goes on to the next.
template <int R>
AVX2_INLINE void add_top_k(const Matrix &m, Run &run, Input in, Strip256<R> &, float *sums) {
    using Row = typename Rows<R>::type;
    const bf16 *values = m.top_k + run.first * m.k;
    const uint8_t *positions = m.top_k_positions + run.first * m.k;
    const float *x = in.wide + *run.columns * int64_t(B * R);
    ++run.first, ++run.columns;
    for (int64_t j = 0; j < m.k; ++j) {
        const Row *column = (const Row *)(x + (positions[j] >> 4) * R);
        Row *sum = (Row *)(sums + (positions[j] & 15) * R);
        *sum += widen(values[j]) * *column;
    }
}

template <int R>
AVX2_INLINE void store(const Matrix &, int64_t, Floats256<R> &total, const float *top_k, float *sums) {
    for (int n = 0; n < R; ++n)
        for (int half = 0; half < 2; ++half) {
            for (int chain = 1; chain < total.CHAINS; ++chain)
                total.of[0][n][half] = _mm256_add_ps(total.of[0][n][half], total.of[chain][n][half]);
            _mm256_storeu_ps(sums + n * B + 8 * half, total.of[0][n][half]);
            for (int row = 8 * half; row < 8 * half + 8; ++row) sums[n * B + row] += top_k[row * R + n];
        }
}

// --- whole numbers -----------------------------------------------------------------------------------------------------

// Vector v of codes [16 rows][4], one half of the rows.
template <int BITS> AVX2_INLINE __m256i load_codes(const uint8_t *codes, int v, int half) {
    if constexpr (BITS == 8) return _mm256_loadu_si256((const __m256i *)(codes + 64 * v + 32 * half));
    const __m256i two = _mm256_loadu_si256((const __m256i *)(codes + 64 * (v / 2) + 32 * half));
    const __m256i four_bits = _mm256_and_si256(v % 2 ? _mm256_srli_epi16(two, 4) : two, _mm256_set1_epi8(15));
    return _mm256_sub_epi8(four_bits, _mm256_set1_epi8(8));
}

// Sums of four products: the instruction wants one factor not negative, so the other takes its sign. Two products of at
// most 127 * 127 have room in 16 bits.
AVX2_INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i x) {
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}

// Adds the exact sums of half a block, times the step of x and, with 4 bits, the multiples of the rows.
template <int BITS, int R>
AVX2_INLINE void add_half(const int8_t *multiples, int64_t block, int half, const __m256i *sums, const float *steps,
                          Codes256<BITS, R> &total) {
    __m256 factors = _mm256_set1_ps(1);
    if constexpr (BITS == 4) {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(multiples + block * B + 8 * half));
        factors = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        fetch<B, AHEAD_OF_POSITIONS>(multiples + block * B);
    }
#pragma GCC unroll 4
    for (int n = 0; n < R; ++n) {
        const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[n]), factors);
        total.of[n][half] = _mm256_fmadd_ps(products, _mm256_set1_ps(steps[n]), total.of[n][half]);
    }
}

template <int BITS, int R>
AVX2_INLINE void add_dense(const Matrix &m, int64_t block, Input in, int64_t column, Codes256<BITS, R> &total) {
    const uint8_t *codes = m.dense_codes + block * DENSE_BYTES<BITS>;
    const int8_t *x = in.codes + column * R * B;
    fetch<DENSE_BYTES<BITS>>(codes);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i sums[R] = {};
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            const __m256i weights = load_codes<BITS>(codes, g, half);
#pragma GCC unroll 4
            for (int n = 0; n < R; ++n) {
                int32_t four;
                std::memcpy(&four, x + n * B + 4 * g, 4);
                sums[n] = add_products(sums[n], weights, _mm256_set1_epi32(four));
            }
        }
        add_half(m.dense_multiples, block, half, sums, in.steps + column * R, total);
    }
}

// Of 8 rows, four positions each in a byte -> where these are among eight columns, a byte each.
AVX2_INLINE __m256i places_of_half(const uint8_t *positions) {
    const __m256i rows = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)positions));
    const __m256i two = _mm256_or_si256(rows, _mm256_slli_epi32(rows, 6));
    const __m256i four = _mm256_or_si256(two, _mm256_slli_epi32(two, 12));
    // The last two are of the second group.
    return _mm256_or_si256(_mm256_and_si256(four, _mm256_set1_epi8(3)), _mm256_set1_epi32(0x04040000));
}

template <int BITS, int R>
AVX2_INLINE void add_two_four(const Matrix &m, int64_t block, Input in, int64_t column, Codes256<BITS, R> &total) {
    const uint8_t *codes = m.two_four_codes + block * TWO_FOUR_BYTES<BITS>;
    const uint8_t *positions = m.code_positions + block * 2 * B;
    const int8_t *x = in.codes + column * R * B;
    fetch<TWO_FOUR_BYTES<BITS>>(codes), fetch<32, AHEAD_OF_POSITIONS>(positions);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i sums[R] = {};
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const __m256i weights = load_codes<BITS>(codes, h, half);
            const __m256i places = places_of_half(positions + h * B + 8 * half);
#pragma GCC unroll 4
            for (int n = 0; n < R; ++n) {
                int64_t eight;
                std::memcpy(&eight, x + n * B + 8 * h, 8);
                sums[n] = add_products(sums[n], weights, _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), places));
            }
        }
        add_half(m.two_four_multiples, block, half, sums, in.steps + column * R, total);
    }
}

template <int BITS, int R>
AVX2_INLINE void store(const Matrix &m, int64_t strip, Codes256<BITS, R> &total, const float *top_k, float *sums) {
    for (int n = 0; n < R; ++n)
        for (int half = 0; half < 2; ++half) {
            _mm256_storeu_ps(sums + n * B + 8 * half, total.of[n][half]);
            for (int row = 8 * half; row < 8 * half + 8; ++row)
                sums[n * B + row] = (sums[n * B + row] + top_k[row * R + n]) * m.scales[strip * B + row];
        }
}

STRIP(strip_avx2, AVX2)

} // namespace
