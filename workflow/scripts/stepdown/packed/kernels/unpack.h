// Strips of W as they are, bf16, for a product of others that does not take them packed.
#pragma once

#include "avx2.h"

namespace {

// Four whole numbers times a multiple, then times a scale, to nearest: as bf16, the first in the lowest 16 bits.
AVX2_INLINE uint64_t scaled(__m128i four, int multiple, float scale) {
    const __m128i products = _mm_mullo_epi32(four, _mm_set1_epi32(multiple));
    const __m128i bits = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(products), _mm_set1_ps(scale)));
    const __m128i even = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), even), 16);
    return uint64_t(_mm_cvtsi128_si64(_mm_packus_epi32(rounded, rounded)));
}

// A row's four of vector v of a block's codes [16 rows][4].
AVX2_INLINE __m128i four_codes(const Matrix &m, const uint8_t *codes, int v, int row) {
    int32_t four;
    std::memcpy(&four, codes + (m.bits == 8 ? v : v / 2) * 64 + 4 * row, 4);
    if (m.bits == 8) return _mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
    return _mm_sub_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four >> 4 * (v % 2) & 0x0f0f0f0f)), _mm_set1_epi32(8));
}

inline void put(bf16 *target, uint64_t four) { std::memcpy(target, &four, 8); }

// w: [16 rows][width], from the block's first column on.
AVX2 inline void unpack_dense(const Matrix &m, int64_t block, const float *scales, bf16 *w, int64_t width) {
    for (int row = 0; row < B; ++row)
        for (int group = 0; group < 4; ++group) {
            uint64_t four = 0;
            if (m.bits) {
                const uint8_t *codes = m.dense_codes + block * 32 * m.bits;
                const int multiple = m.bits == 8 ? 1 : m.dense_multiples[block * B + row];
                four = scaled(four_codes(m, codes, group, row), multiple, scales[row]);
            } else {
                const bf16 *from = m.dense + block * B * B + 2 * group * 32 + 2 * row;
                uint32_t pairs[2];
                for (int i = 0; i < 2; ++i) std::memcpy(pairs + i, from + 32 * i, 4);
                four = uint64_t(pairs[1]) << 32 | pairs[0];
            }
            put(w + row * width + 4 * group, four);
        }
}

// Two of four columns; positions: two bits for each.
inline uint64_t spread(uint64_t first, uint64_t second, int positions) {
    return first << 16 * (positions & 3) | second << 16 * (positions >> 2 & 3);
}

AVX2 inline void unpack_two_four(const Matrix &m, int64_t block, const float *scales, bf16 *w, int64_t width) {
    for (int row = 0; row < B; ++row) {
        bf16 *target = w + row * width;
        for (int h = 0; h < 2 && m.bits; ++h) {
            const uint8_t *codes = m.two_four_codes + block * 16 * m.bits;
            const int multiple = m.bits == 8 ? 1 : m.two_four_multiples[block * B + row];
            const uint64_t kept = scaled(four_codes(m, codes, h, row), multiple, scales[row]);
            const int positions = m.code_positions[(block * 2 + h) * B + row];
            put(target + 8 * h, spread(kept & 0xffff, kept >> 16 & 0xffff, positions));
            put(target + 8 * h + 4, spread(kept >> 32 & 0xffff, kept >> 48, positions >> 4));
        }
        for (int group = 0; group < 4 && !m.bits; ++group) {
            const bf16 *kept = m.two_four + block * 128 + group * 32 + 2 * row;
            put(target + 4 * group, spread(kept[0], kept[1], int(m.positions[block * 4 + group] >> 4 * row)));
        }
    }
}

inline void unpack_top_k(const Matrix &m, int64_t block, const float *scales, bf16 *w, int64_t width) {
    for (int row = 0; row < B; ++row) std::memset(w + row * width, 0, B * sizeof(bf16));
    for (int64_t i = block * m.k; i < (block + 1) * m.k; ++i) {
        const int row = m.top_k_positions[i] & 15, column = m.top_k_positions[i] >> 4;
        w[row * width + column] = m.bits ? narrow(widen(m.top_k[i]) * scales[row]) : m.top_k[i];
    }
}

// w: [16 rows][16 * block columns].
inline void unpack_strip(const Matrix &m, int64_t strip, bf16 *w) {
    const auto unpack_tier = [&](int tier, auto unpack_block) {
        const Run run = run_of(m, strip, tier);
        const float *scales = m.bits ? m.scales + strip * B : nullptr;
        for (int64_t b = 0; b < run.count; ++b)
            unpack_block(m, run.first + b, scales, w + run.columns[b] * B, m.block_columns * B);
    };
    unpack_tier(0, unpack_dense), unpack_tier(1, unpack_two_four), unpack_tier(2, unpack_top_k);
}

} // namespace
