// W in three tiers, as docs/packed-format.md lays it out: 16 x 16 blocks, sorted by tier inside each strip of 16 rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace {

constexpr int B = 16;

using bf16 = uint16_t;

struct Matrix {
    int64_t strips, block_columns, outputs, k, bits;
    const bf16 *dense;              // [dense blocks][8 column pairs][16 rows][2]
    const bf16 *two_four;           // [2:4 blocks][4 groups][16 rows][2 kept]
    const uint64_t *positions;      // [2:4 blocks][4 groups]: row r's two positions are bits 4r..4r+1 and 4r+2..4r+3
    const bf16 *top_k;              // [TopK blocks][k]
    const uint8_t *top_k_positions; // [TopK blocks][k]: 16 * column + row
    const uint16_t *columns;        // [strips][block columns]: where the strip's blocks stand, Dense, 2:4, TopK
    const int64_t *starts;          // [strips + 1][3]: blocks of each tier in the strips before
    const bf16 *bias;               // [outputs] or null
    const uint8_t *quads;           // TopK blocks four at a time, for AVX-512, one `Quad` after the other
    const int64_t *quads_before;    // [strips + 1][2]: quads, and bytes of them
    // Where `bits` is not 0, whole numbers of so many bits in place of `dense`, `two_four` and `positions`; those of
    // TopK blocks, and with 4 bits what they are multiplied by, are in `top_k` and `quads` as bf16, exactly.
    const uint8_t *dense_codes;        // 8 bits: [Dense blocks][4][16 rows][4 columns]; 4: [..][2][16][4], two a byte
    const uint8_t *two_four_codes;     // 8 bits: [2:4 blocks][2][16 rows][4 kept]; 4: [..][1][16][4]
    const uint8_t *code_positions;     // [2:4 blocks][2][16 rows]: four positions of two bits
    const int8_t *dense_multiples;     // 4 bits: [Dense blocks][16 rows]
    const int8_t *two_four_multiples;  // 4 bits: [2:4 blocks][16 rows]
    const float *scales;               // [strips][16 rows]
};

// Bytes of the codes of a block.
template <int BITS> constexpr int DENSE_BYTES = 32 * BITS;
template <int BITS> constexpr int TWO_FOUR_BYTES = 16 * BITS;

// quads.py
struct Quad {
    uint16_t blocks[4]; // where in the strip they stand
    uint16_t vectors, weights;
    // And then: uint32_t filled[vectors], which of [16 rows][2] have a weight; bf16 values[weights];
    // uint8_t columns[weights], 16 * which of the blocks + column.
    int64_t bytes() const { return (int64_t(sizeof(Quad)) + 4 * vectors + 3 * weights + 3) / 4 * 4; }
};

// One strip's blocks of one tier; of quads `first` counts bytes.
struct Run {
    int64_t first, count;
    const uint16_t *columns = nullptr;
};

inline Run run_of(const Matrix &m, int64_t strip, int tier) {
    const int64_t *start = m.starts + 3 * strip, *end = start + 3;
    const uint16_t *columns = m.columns + strip * m.block_columns;
    for (int before = 0; before < tier; ++before) columns += end[before] - start[before];
    return {start[tier], end[tier] - start[tier], columns};
}

// Fetches the next bytes into the first-level cache by so many ahead, as measured: with several streams at once the
// processor's own prefetching comes too late. Inlined always: a call that computes nothing GCC leaves out.
constexpr int AHEAD = 4096, AHEAD_OF_POSITIONS = 2048;
template <int BYTES, int BY = AHEAD> __attribute__((always_inline)) inline void fetch(const void *from) {
    for (int line = 0; line < BYTES; line += 64) _mm_prefetch((const char *)from + BY + line, _MM_HINT_T0);
}

inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// To nearest, ties to even; a NaN stays one.
inline bf16 narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return bf16(bits >> 16 | 0x40);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// R rows of x, block column by block column.
struct Input {
    const bf16 *x;     // [block columns][R][16]
    const float *wide; // the same as floats, [block columns][16][R], for AVX2 alone
    // For weights of whole numbers: code * step is about x.
    const int8_t *codes; // [block columns][R][16]; for AVX-512 128 more, not negative
    const float *steps;  // [block columns][R]
};

// sums: float [ROWS of x][16], of one strip. One block of each tier in turn, and those of TopK spread among all turns:
// while one waits for memory the other computes. Where nothing waits, tier after tier. `Totals` says what goes on in a
// strip, and for how many rows of x.
// A macro, since what is inlined must be compiled for the same instructions, and no template can be told for which.
#define STRIP(name, INSTRUCTIONS)                                                                                      \
    template <class Totals> INSTRUCTIONS void name(const Matrix &m, int64_t strip, Input in, float *sums) {            \
        Totals total = {};                                                                                             \
        alignas(64) float rest[B * Totals::ROWS] = {};                                                                 \
        const Run dense = run_of(m, strip, 0), two_four = run_of(m, strip, 1);                                         \
        Run top_k = Totals::top_k(m, strip);                                                                           \
        const int64_t longest = std::max({dense.count, two_four.count, top_k.count});                                  \
        const int64_t turn = Totals::WAITS ? 1 : longest;                                                              \
        for (int64_t start = 0, owed = 0; start < longest; start += turn) {                                            \
            for (int64_t b = start; b < std::min(start + turn, dense.count); ++b)                                      \
                add_dense(m, dense.first + b, in, dense.columns[b], total);                                            \
            for (int64_t b = start; b < std::min(start + turn, two_four.count); ++b)                                   \
                add_two_four(m, two_four.first + b, in, two_four.columns[b], total);                                   \
            for (owed += turn * top_k.count; owed > 0; owed -= longest) add_top_k(m, top_k, in, total, rest);          \
        }                                                                                                              \
        store(m, strip, total, rest, sums);                                                                            \
    }

} // namespace
