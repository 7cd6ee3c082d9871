// Strips with AVX-512: BF16, VBMI and VBMI2 for bf16, VNNI and GFNI for whole numbers.
//
// One vector of 16 floats holds the outputs of a strip. Dense blocks of bf16 go two columns at a time, 32 weights
// against one pair of x. 2:4 blocks go four columns at a time, 32 kept weights against x *permuted* by their 2-bit
// positions: nothing is decompressed. TopK blocks go four at a time in the same way (quads.py).
//
// Whole numbers go four columns at a time, 64 of them; those kept of a 2:4 block four of eight columns.
#pragma once

#include "matrix.h"

namespace {

#define AVX512                                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vbmi2,avx512vnni,gfni,fma")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

AVX512_INLINE __m512bh as_bh(__m512i bits) { return (__m512bh)bits; }

// Independent sums [chain][row of x] of 16 outputs.
template <int R, int CHAINS> struct Strip512 {
    static constexpr int ROWS = R;
    static constexpr bool WAITS = R <= 4; // for memory: with few rows of x
    __m512 of[CHAINS][R];
    static Run top_k(const Matrix &m, int64_t strip) {
        const int64_t *before = m.quads_before + 2 * strip;
        return {before[1], before[2] - before[0]};
    }
};

// Enough of them to hide the latency of one.
constexpr int chains_for(int rows) { return std::max(1, 4 / rows); }
template <int R> struct Floats512 : Strip512<R, chains_for(R)> {};

// Of whole numbers, still to be multiplied by the scales of the rows.
template <int BITS, int R> struct Codes512 : Strip512<R, 1> {};

AVX512_INLINE int32_t four_bytes(const void *from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return four;
}

AVX512_INLINE int64_t eight_bytes(const void *from) {
    int64_t eight;
    std::memcpy(&eight, from, 8);
    return eight;
}

// --- bf16 --------------------------------------------------------------------------------------------------------------

template <int R>
AVX512_INLINE void add_dense(const Matrix &m, int64_t block, Input in, int64_t column, Floats512<R> &total) {
    const bf16 *w = m.dense + block * B * B, *x = in.x + column * B * R;
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
        fetch<64>(w + 32 * pair);
        const __m512bh weights = as_bh(_mm512_loadu_si512(w + 32 * pair));
#pragma GCC unroll 16
        for (int n = 0; n < R; ++n) {
            __m512 &sum = total.of[pair % chains_for(R)][n];
            sum = _mm512_dpbf16_ps(sum, weights, as_bh(_mm512_set1_epi32(four_bytes(x + n * B + 2 * pair))));
        }
    }
}

template <int R>
AVX512_INLINE void add_two_four(const Matrix &m, int64_t block, Input in, int64_t column, Floats512<R> &total) {
    const bf16 *w = m.two_four + block * 128, *x = in.x + column * B * R;
    const uint64_t *words = m.positions + block * 4;
    // Of the word that byte 2 i takes eight bits from 2 i on of, the lowest two are position i.
    alignas(64) uint8_t offsets[64];
    for (int i = 0; i < 64; ++i) offsets[i] = uint8_t(i & ~1);
    const __m512i shifts = _mm512_load_si512(offsets);
    fetch<32, AHEAD_OF_POSITIONS>(words);
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
        fetch<64>(w + 32 * group);
        const __m512bh weights = as_bh(_mm512_loadu_si512(w + 32 * group));
        const __m512i shifted = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(int64_t(words[group])));
#pragma GCC unroll 16
        for (int n = 0; n < R; ++n) {
            __m512 &sum = total.of[group % chains_for(R)][n];
            // Four inputs, eight times over: bits beyond the lowest two make no difference.
            const __m512i four = _mm512_set1_epi64(eight_bytes(x + n * B + 4 * group));
            sum = _mm512_dpbf16_ps(sum, weights, as_bh(_mm512_permutexvar_epi16(shifted, four)));
        }
    }
}

AVX512_INLINE __m512i side_by_side(const bf16 *left, const bf16 *right) {
    const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)left));
    return _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i *)right), 1);
}

// In a register: from memory, where GCC would leave it, an expanding instruction takes a Zen several times as long.
template <class Vector> AVX512_INLINE Vector loaded(Vector vector) {
    asm("" : "+v"(vector));
    return vector;
}

// TopK blocks, a few weights, are bf16 in either case. Goes on to the next quad.
template <int R, int CHAINS>
AVX512_INLINE void add_top_k(const Matrix &m, Run &run, Input in, Strip512<R, CHAINS> &total, float *) {
    const Quad &quad = *(const Quad *)(m.quads + run.first);
    const uint32_t *filled_of = (const uint32_t *)(&quad + 1);
    const bf16 *values = (const bf16 *)(filled_of + quad.vectors);
    const uint8_t *columns = (const uint8_t *)(values + quad.weights);
    fetch<192, AHEAD_OF_POSITIONS>(&quad);
    run.first += quad.bytes();
    // Rows of x that the first-level cache does not hold, and that nothing foresees.
    if (R >= 8)
        for (const uint16_t block : ((const Quad *)(m.quads + run.first))->blocks)
            fetch<2 * B * R, 0>(in.x + block * int64_t(R * B));
    // As many rows of x as there are registers for, so that weights and where they stand are read once for them.
    constexpr int AT_ONCE = std::min(R, 4);
#pragma GCC unroll 4
    for (int from = 0; from < R; from += AT_ONCE) {
        __m512i left[AT_ONCE], right[AT_ONCE];
#pragma GCC unroll 4
        for (int n = 0; n < AT_ONCE; ++n) {
            const auto at = [&](int block) { return in.x + (quad.blocks[block] * int64_t(R) + from + n) * B; };
            left[n] = side_by_side(at(0), at(1)), right[n] = side_by_side(at(2), at(3));
        }
        for (int64_t v = 0, done = 0; v < quad.vectors; ++v) {
            const __mmask32 filled = filled_of[v];
            const __m512i kept = loaded(_mm512_loadu_si512(values + done));
            const __m512bh weights = as_bh(_mm512_maskz_expand_epi16(filled, kept));
            const __m256i packed = loaded(_mm256_loadu_si256((const __m256i *)(columns + done)));
            const __m512i index = _mm512_cvtepu8_epi16(_mm256_maskz_expand_epi8(filled, packed));
            done += __builtin_popcount(filled);
#pragma GCC unroll 4
            for (int n = 0; n < AT_ONCE; ++n) {
                __m512 &sum = total.of[0][from + n];
                // What is not filled meets no input: of an infinite one it would make a NaN.
                const __m512i x = _mm512_maskz_permutex2var_epi16(filled, left[n], index, right[n]);
                sum = _mm512_dpbf16_ps(sum, weights, as_bh(x));
            }
        }
    }
}

template <int R>
AVX512_INLINE void store(const Matrix &, int64_t, Floats512<R> &total, const float *, float *sums) {
    for (int n = 0; n < R; ++n) {
        for (int chain = 1; chain < chains_for(R); ++chain)
            total.of[0][n] = _mm512_add_ps(total.of[0][n], total.of[chain][n]);
        _mm512_storeu_ps(sums + n * B, total.of[0][n]);
    }
}

// --- whole numbers -----------------------------------------------------------------------------------------------------

// COUNT vectors of codes [16 rows][4].
template <int BITS, int COUNT> AVX512_INLINE void load_codes(const uint8_t *codes, __m512i *vectors) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; ++v) vectors[v] = _mm512_loadu_si512(codes + 64 * v);
    } else {
        // Of each byte the lower or the upper four bits less 8: bits 0 to 2, then bit 3 turned over, five times.
        const __m512i lower = _mm512_set1_epi64(0x0102040808080808), upper = _mm512_set1_epi64(0x1020408080808080);
#pragma GCC unroll 2
        for (int v = 0; v < COUNT / 2; ++v) {
            const __m512i two = _mm512_loadu_si512(codes + 64 * v);
            vectors[2 * v] = _mm512_gf2p8affine_epi64_epi8(two, lower, 0xf8);
            vectors[2 * v + 1] = _mm512_gf2p8affine_epi64_epi8(two, upper, 0xf8);
        }
    }
}

// 1.5 * 2^23 as a float's bits: a whole number below 2^22 that is added to them is added to the float. So a sum becomes
// a float by a subtraction, for which other parts of the processor are free than for products.
constexpr int32_t FLOAT_BITS = 0x4b400000;

// Codes of x are not negative, as the instruction wants it, by 128 that are taken off before they are added.
template <int COUNT> AVX512_INLINE __m512i start_of(const __m512i *weights) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(0x80)), weights[v]);
    return _mm512_sub_epi32(_mm512_set1_epi32(FLOAT_BITS), sum);
}

// Adds the exact sums of a block, times the step of x and, with 4 bits, the multiples of the rows.
template <int BITS> AVX512_INLINE __m512 add_block(__m512 total, __m512i sum, __m512 multiples, float step) {
    __m512 block = _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_castsi512_ps(_mm512_set1_epi32(FLOAT_BITS)));
    if constexpr (BITS == 4) block = _mm512_mul_ps(block, multiples);
    return _mm512_fmadd_ps(block, _mm512_set1_ps(step), total);
}

template <int BITS> AVX512_INLINE __m512 load_multiples(const int8_t *multiples, int64_t block) {
    if constexpr (BITS == 8) return _mm512_setzero_ps();
    fetch<B, AHEAD_OF_POSITIONS>(multiples + block * B);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(multiples + block * B))));
}

template <int BITS, int R>
AVX512_INLINE void add_dense(const Matrix &m, int64_t block, Input in, int64_t column, Codes512<BITS, R> &total) {
    const uint8_t *codes = m.dense_codes + block * DENSE_BYTES<BITS>;
    fetch<DENSE_BYTES<BITS>>(codes);
    __m512i weights[4];
    load_codes<BITS, 4>(codes, weights);
    const __m512i start = start_of<4>(weights);
    const __m512 multiples = load_multiples<BITS>(m.dense_multiples, block);
#pragma GCC unroll 16
    for (int n = 0; n < R; ++n) {
        const int8_t *x = in.codes + (column * R + n) * B;
        // Two sums, of which neither waits for the other.
        __m512i sums[2] = {start, _mm512_setzero_si512()};
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
            sums[g % 2] = _mm512_dpbusd_epi32(sums[g % 2], _mm512_set1_epi32(four_bytes(x + 4 * g)), weights[g]);
        const __m512i sum = _mm512_add_epi32(sums[0], sums[1]);
        total.of[0][n] = add_block<BITS>(total.of[0][n], sum, multiples, in.steps[column * R + n]);
    }
}

// Of 16 rows, four positions each in a byte -> where these are among eight columns, a byte each.
AVX512_INLINE __m512i places_of(const uint8_t *positions) {
    // Of the 32 bits with a row's four positions byte i takes those from 2 i on; the last two are of the second group.
    const __m512i shifts = _mm512_set1_epi64(0x2624222006040200), second = _mm512_set1_epi32(0x04040000);
    const __m512i rows = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)positions));
    const __m512i shifted = _mm512_multishift_epi64_epi8(shifts, rows);
    return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(3), second, 0xea); // (shifted & 3) | second
}

template <int BITS, int R>
AVX512_INLINE void add_two_four(const Matrix &m, int64_t block, Input in, int64_t column, Codes512<BITS, R> &total) {
    const uint8_t *codes = m.two_four_codes + block * TWO_FOUR_BYTES<BITS>;
    const uint8_t *positions = m.code_positions + block * 2 * B;
    fetch<TWO_FOUR_BYTES<BITS>>(codes);
    fetch<32, AHEAD_OF_POSITIONS>(positions);
    __m512i weights[2];
    load_codes<BITS, 2>(codes, weights);
    const __m512i start = start_of<2>(weights), places[2] = {places_of(positions), places_of(positions + B)};
    const __m512 multiples = load_multiples<BITS>(m.two_four_multiples, block);
#pragma GCC unroll 16
    for (int n = 0; n < R; ++n) {
        const int8_t *x = in.codes + (column * R + n) * B;
        __m512i sum = start;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const __m512i eight = _mm512_set1_epi64(eight_bytes(x + 8 * h));
            sum = _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi8(eight, places[h]), weights[h]);
        }
        total.of[0][n] = add_block<BITS>(total.of[0][n], sum, multiples, in.steps[column * R + n]);
    }
}

template <int BITS, int R>
AVX512_INLINE void store(const Matrix &m, int64_t strip, Codes512<BITS, R> &total, const float *, float *sums) {
    const __m512 scales = _mm512_loadu_ps(m.scales + strip * B);
    for (int n = 0; n < R; ++n) _mm512_storeu_ps(sums + n * B, _mm512_mul_ps(total.of[0][n], scales));
}

STRIP(strip_avx512, AVX512)

} // namespace
