// y = x W^T + b with W in three tiers, as docs/packed-format.md lays it out: 16 x 16 blocks, sorted by tier inside each
// strip of 16 rows of W. Every weight is read once, in the order it is stored in.
//
// One vector of 16 floats holds the outputs of a strip. Dense blocks go two columns at a time, 32 weights against one pair
// of x. 2:4 blocks go four columns at a time, 32 kept weights against x *permuted* by their 2-bit positions: nothing is
// decompressed. TopK blocks go four at a time in the same way (quads.py); with AVX2 their weights are added one by one.
//
// Where kept weights are whole numbers (`bits`), those of Dense and 2:4 blocks are multiplied as such: x is made 8 bits
// too, each 16 of a block column with a step of their own.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>
#include <omp.h>

namespace {

constexpr int B = 16;
// Strips that share a pass over x, so that x is read from the second-level cache and not from further away.
constexpr int STRIPS_AT_ONCE = 4;
// Rows of x that are held in the kernels' own layout; by then reading W again costs nothing beside computing.
constexpr int64_t ROWS_AT_ONCE = 256;

using bf16 = uint16_t;

struct Matrix {
    int64_t strips, block_columns, outputs, k, bits;
    const bf16 *dense;              // [dense blocks][8 column pairs][16 rows][2]
    const bf16 *two_four;           // [2:4 blocks][4 groups][16 rows][2 kept]
    const uint64_t *positions;      // [2:4 blocks][4 groups]: row r's two positions are bits 4r..4r+1 and 4r+2..4r+3
    const bf16 *top_k;              // [TopK blocks][k]
    const uint8_t *top_k_positions; // [TopK blocks][k]: 16 * column + row
    const int32_t *columns;         // [strips][block columns]: where the strip's blocks stand, Dense, 2:4, TopK
    const int64_t *starts;          // [strips + 1][3]: blocks of each tier in the strips before
    const bf16 *bias;               // [outputs] or null
    // TopK blocks four at a time, for AVX-512: quads.py.
    const bf16 *quad_values;        // [vectors][16 rows][2]
    const uint8_t *quad_columns;    // [vectors][16 rows][2]: 16 * which of the four blocks + column
    const int32_t *quad_blocks;     // [quads][4]: where in the strip the blocks stand
    const int64_t *vectors_before;  // [quads + 1]
    const int64_t *quads_before;    // [strips + 1]
    // Where `bits` is not 0, whole numbers of so many bits in place of `dense`, `two_four` and `positions`.
    const uint8_t *dense_codes;        // 8 bits: [Dense blocks][4][16 rows][4 columns]; 4: [..][2][16][4], two in a byte
    const uint8_t *two_four_codes;     // 8 bits: [2:4 blocks][2][16 rows][4 kept]; 4: [..][1][16][4]
    const uint8_t *code_positions;     // [2:4 blocks][2][16 rows]: four positions of two bits
    const int8_t *dense_multiples;     // 4 bits: [Dense blocks][16 rows]
    const int8_t *two_four_multiples;  // 4 bits: [2:4 blocks][16 rows]
    const float *scales;               // [strips][16 rows]
};

// One strip's blocks of one tier.
struct Run {
    int64_t first, count;
    const int32_t *columns = nullptr;
};

inline Run run_of(const Matrix &m, int64_t strip, int tier) {
    const int64_t *start = m.starts + 3 * strip, *end = start + 3;
    const int32_t *columns = m.columns + strip * m.block_columns;
    for (int before = 0; before < tier; ++before) columns += end[before] - start[before];
    return {start[tier], end[tier] - start[tier], columns};
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
    const int8_t *codes;  // [block columns][R][16]
    const float *steps;   // [block columns][R]
    const int32_t *sums;  // [block columns][R]: of the codes
};

// --- AVX-512 BF16 and VBMI ---------------------------------------------------------------------------------------------

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma,avx2")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

AVX512_INLINE __m512bh as_bh(__m512i bits) { return (__m512bh)bits; }

// What goes on in a strip: enough independent sums [chain][row of x] of 16 outputs to hide the latency of one.
template <int R> struct Totals512 {
    static constexpr int CHAINS = std::max(1, 4 / R);
    static constexpr bool WAITS = R <= 4; // for memory: with few rows of x
    __m512 of[CHAINS][R];
    // TopK blocks come four at a time: few steps, which are spread among all turns.
    static Run top_k(const Matrix &m, int64_t strip) {
        return {m.quads_before[strip], m.quads_before[strip + 1] - m.quads_before[strip]};
    }
    static int64_t due(int64_t turns, int64_t all, int64_t count) { return (turns * count + all - 1) / all; }
};

// Fetch what lies some way ahead into the second-level cache: with several streams at once the processor's own
// prefetching comes too late. The distances are measured.
template <int R> AVX512_INLINE void fetch(const void *ahead) {
    if constexpr (Totals512<R>::WAITS) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
}

// w: [8 pairs][16 rows][2].
template <int R> AVX512_INLINE void add_dense(const bf16 *w, Input in, int64_t column, Totals512<R> &total) {
    const bf16 *x = in.x + column * B * R;
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
        fetch<R>(w + 32 * pair + 512);
        const __m512bh weights = as_bh(_mm512_loadu_si512(w + 32 * pair));
#pragma GCC unroll 16
        for (int n = 0; n < R; ++n) {
            int32_t two;
            std::memcpy(&two, x + n * B + 2 * pair, 4);
            __m512 &sum = total.of[pair % total.CHAINS][n];
            sum = _mm512_dpbf16_ps(sum, weights, as_bh(_mm512_set1_epi32(two)));
        }
    }
}

// w: [4 groups][16 rows][2]; words: [4 groups].
template <int R>
AVX512_INLINE void add_two_four(const bf16 *w, const uint64_t *words, Input in, int64_t column,
                                Totals512<R> &total) {
    const bf16 *x = in.x + column * B * R;
    // Of the word that byte 2 i takes eight bits from 2 i on of, the lowest two are position i.
    alignas(64) uint8_t offsets[64];
    for (int i = 0; i < 64; ++i) offsets[i] = uint8_t(i & ~1);
    const __m512i shifts = _mm512_load_si512(offsets);
    fetch<R>(words + 16);
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
        fetch<R>(w + 32 * group + 640);
        const __m512bh weights = as_bh(_mm512_loadu_si512(w + 32 * group));
        const __m512i shifted = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(int64_t(words[group])));
#pragma GCC unroll 16
        for (int n = 0; n < R; ++n) {
            __m512 &sum = total.of[group % total.CHAINS][n];
            int64_t four;
            std::memcpy(&four, x + n * B + 4 * group, 8);
            // Four inputs, eight times over: bits beyond the lowest two make no difference.
            const __m512i permuted = _mm512_permutexvar_epi16(shifted, _mm512_set1_epi64(four));
            sum = _mm512_dpbf16_ps(sum, weights, as_bh(permuted));
        }
    }
}

AVX512_INLINE __m512i side_by_side(const bf16 *left, const bf16 *right) {
    const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)left));
    return _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i *)right), 1);
}

template <int R>
AVX512_INLINE void add_top_k(const Matrix &m, Run run, int64_t step, Input in, Totals512<R> &total, float *) {
    const int64_t quad = run.first + step;
    const int32_t *blocks = m.quad_blocks + 4 * quad;
    const int64_t first = m.vectors_before[quad], end = m.vectors_before[quad + 1];
#pragma GCC unroll 16
    for (int n = 0; n < R; ++n) {
        const auto at = [&](int block) { return in.x + (blocks[block] * int64_t(R) + n) * B; };
        const __m512i left = side_by_side(at(0), at(1)), right = side_by_side(at(2), at(3));
        for (int64_t v = first; v < end; ++v) {
            fetch<R>(m.quad_values + 32 * v + 256), fetch<R>(m.quad_columns + 32 * v + 256);
            const __m512bh weights = as_bh(_mm512_loadu_si512(m.quad_values + 32 * v));
            const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(m.quad_columns + 32 * v)));
            __m512 &sum = total.of[0][n];
            sum = _mm512_dpbf16_ps(sum, weights, as_bh(_mm512_permutex2var_epi16(left, index, right)));
        }
    }
}

template <int R> AVX512_INLINE void store(Totals512<R> &total, const float *, float *sums) {
    for (int n = 0; n < R; ++n) {
        for (int chain = 1; chain < total.CHAINS; ++chain)
            total.of[0][n] = _mm512_add_ps(total.of[0][n], total.of[chain][n]);
        _mm512_storeu_ps(sums + n * B, total.of[0][n]);
    }
}

// --- AVX2 --------------------------------------------------------------------------------------------------------------

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) inline

// Weights come in pairs: the first of each 32 bits is the lower half.
AVX2_INLINE __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
AVX2_INLINE __m256 second_of(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

template <int R> struct Totals256 {
    static constexpr int CHAINS = std::max(1, 4 / R);
    static constexpr bool WAITS = R < 4;
    __m256 of[CHAINS][R][2];
    static Run top_k(const Matrix &m, int64_t strip) { return run_of(m, strip, 2); }
    static int64_t due(int64_t turns, int64_t, int64_t count) { return std::min(turns, count); }
};

template <int R> AVX2_INLINE void add_dense(const bf16 *w, Input in, int64_t column, Totals256<R> &total) {
    const float *x = in.wide + column * B * R;
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

template <int R> AVX2_INLINE void add_two_four(const bf16 *w, const uint64_t *words, Input in, int64_t column,
                             Totals256<R> &total) {
    const bf16 *x = in.x + column * B * R;
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
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

// One block, its weights one by one, to sums of their own: [16 outputs][R].
template <int R>
AVX2_INLINE void add_top_k(const Matrix &m, Run run, int64_t step, Input in, Totals256<R> &, float *sums) {
    using Row = typename Rows<R>::type;
    const bf16 *values = m.top_k + (run.first + step) * m.k;
    const uint8_t *positions = m.top_k_positions + (run.first + step) * m.k;
    const float *x = in.wide + run.columns[step] * int64_t(B * R);
    for (int64_t j = 0; j < m.k; ++j) {
        const Row *column = (const Row *)(x + (positions[j] >> 4) * R);
        Row *sum = (Row *)(sums + (positions[j] & 15) * R);
        *sum += widen(values[j]) * *column;
    }
}

template <int R> AVX2_INLINE void store(Totals256<R> &total, const float *top_k, float *sums) {
    for (int n = 0; n < R; ++n)
        for (int half = 0; half < 2; ++half) {
            for (int chain = 1; chain < total.CHAINS; ++chain)
                total.of[0][n][half] = _mm256_add_ps(total.of[0][n][half], total.of[chain][n][half]);
            _mm256_storeu_ps(sums + n * B + 8 * half, total.of[0][n][half]);
            for (int row = 8 * half; row < 8 * half + 8; ++row) sums[n * B + row] += top_k[row * R + n];
        }
}

// --- what both share ---------------------------------------------------------------------------------------------------

// sums: float [R][16], of one strip. One block of each tier in turn: while one waits for memory the other computes.
// Where nothing waits, tier after tier.
// A macro, since what is inlined must be compiled for the same instructions, and no template can be told for which.
#define STRIP(name, INSTRUCTIONS, Totals)                                                                              \
    template <int R>                                                                                                   \
    INSTRUCTIONS void name(const Matrix &m, int64_t strip, Input in, float *sums) {                                    \
        Totals<R> total = {};                                                                                          \
        alignas(64) float rest[B * R] = {};                                                                            \
        const Run dense = run_of(m, strip, 0), two_four = run_of(m, strip, 1), top_k = Totals<R>::top_k(m, strip);     \
        const int64_t longest = std::max({dense.count, two_four.count, top_k.count});                                  \
        const int64_t turn = Totals<R>::WAITS ? 1 : longest;                                                           \
        for (int64_t start = 0, step = 0; start < longest; start += turn) {                                            \
            for (int64_t b = start; b < std::min(start + turn, dense.count); ++b)                                      \
                add_dense(m.dense + (dense.first + b) * B * B, in, dense.columns[b], total);                           \
            for (int64_t b = start; b < std::min(start + turn, two_four.count); ++b)                                   \
                add_two_four(m.two_four + (two_four.first + b) * 128, m.positions + (two_four.first + b) * 4,          \
                             in, two_four.columns[b], total);                                                          \
            for (const int64_t due = Totals<R>::due(start + turn, longest, top_k.count); step < due; ++step)           \
                add_top_k(m, top_k, step, in, total, rest);                                                            \
        }                                                                                                              \
        store(total, rest, sums);                                                                                      \
    }

STRIP(strip_avx512, AVX512, Totals512)
STRIP(strip_avx2, AVX2, Totals256)

// --- whole numbers, AVX-512 VNNI ---------------------------------------------------------------------------------------

#define VNNI                                                                                                           \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,fma,avx2")))
#define VNNI_INLINE VNNI __attribute__((always_inline)) inline

// What is added to codes, which the instruction takes as not negative.
template <int BITS> constexpr int OFFSET = BITS == 8 ? 128 : 8;

// COUNT vectors of codes [16 rows][4] with their offset.
template <int BITS, int COUNT> VNNI_INLINE void load_codes(const uint8_t *codes, __m512i *vectors) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; ++v)
            vectors[v] = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * v), _mm512_set1_epi8(char(0x80)));
    } else {
        const __m512i lower = _mm512_set1_epi8(15);
#pragma GCC unroll 2
        for (int v = 0; v < COUNT / 2; ++v) {
            const __m512i two = _mm512_loadu_si512(codes + 64 * v);
            vectors[2 * v] = _mm512_and_si512(two, lower);
            vectors[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(two, 4), lower);
        }
    }
}

// What a row of a block is multiplied by: the step of x, and with 4 bits the multiple.
template <int BITS> VNNI_INLINE __m512 factors(const int8_t *multiples, float step) {
    const __m512 all = _mm512_set1_ps(step);
    if constexpr (BITS == 8) return all;
    return _mm512_mul_ps(all, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)multiples))));
}

template <int BITS, int R>
VNNI_INLINE void add_dense_codes(const uint8_t *codes, const int8_t *multiples, Input in, int64_t column,
                                 __m512 *total) {
    __m512i weights[4];
    load_codes<BITS, 4>(codes, weights);
    fetch<R>(codes + 1024), fetch<R>(codes + 1024 + 64);
    if constexpr (BITS == 8) fetch<R>(codes + 1024 + 128), fetch<R>(codes + 1024 + 192);
#pragma GCC unroll 16
    for (int n = 0; n < R; ++n) {
        const int8_t *x = in.codes + (column * R + n) * B;
        __m512i sum = _mm512_set1_epi32(-OFFSET<BITS> * in.sums[column * R + n]);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            int32_t four;
            std::memcpy(&four, x + 4 * g, 4);
            sum = _mm512_dpbusd_epi32(sum, weights[g], _mm512_set1_epi32(four));
        }
        total[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factors<BITS>(multiples, in.steps[column * R + n]), total[n]);
    }
}

template <int BITS, int R>
VNNI_INLINE void add_two_four_codes(const uint8_t *codes, const uint8_t *positions, const int8_t *multiples, Input in,
                                    int64_t column, __m512 *total) {
    __m512i weights[2], index[2];
    load_codes<BITS, 2>(codes, weights);
    fetch<R>(codes + 1024), fetch<R>(positions + 512);
    if constexpr (BITS == 8) fetch<R>(codes + 1024 + 64);
    // Of the 32 bits with a row's four positions byte i takes those from 2 i on; the last two are of the second group.
    const __m512i shifts = _mm512_set1_epi64(0x2624222006040200), second = _mm512_set1_epi32(0x04040000);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        const __m512i rows = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(positions + 16 * h)));
        const __m512i places = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, rows), _mm512_set1_epi8(3));
        index[h] = _mm512_or_si512(places, second);
    }
#pragma GCC unroll 16
    for (int n = 0; n < R; ++n) {
        const int8_t *x = in.codes + (column * R + n) * B;
        __m512i sum = _mm512_setzero_si512(), offsets = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            int64_t eight;
            std::memcpy(&eight, x + 8 * h, 8);
            const __m512i permuted = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), index[h]);
            sum = _mm512_dpbusd_epi32(sum, weights[h], permuted);
            offsets = _mm512_dpbusd_epi32(offsets, _mm512_set1_epi8(char(OFFSET<BITS>)), permuted);
        }
        sum = _mm512_sub_epi32(sum, offsets);
        total[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factors<BITS>(multiples, in.steps[column * R + n]), total[n]);
    }
}

// As STRIP; the weights of TopK blocks, a few, are bf16 here as well.
template <int BITS, int R> VNNI void strip_vnni(const Matrix &m, int64_t strip, Input in, float *sums) {
    constexpr int DENSE_BYTES = 32 * BITS, TWO_FOUR_BYTES = 16 * BITS, MULTIPLES = BITS == 8 ? 0 : B;
    __m512 total[R] = {};
    Totals512<R> rest = {};
    const Run dense = run_of(m, strip, 0), two_four = run_of(m, strip, 1), top_k = Totals512<R>::top_k(m, strip);
    const int64_t longest = std::max({dense.count, two_four.count, top_k.count});
    const int64_t turn = Totals512<R>::WAITS ? 1 : longest;
    for (int64_t start = 0, step = 0; start < longest; start += turn) {
        for (int64_t b = start; b < std::min(start + turn, dense.count); ++b)
            add_dense_codes<BITS, R>(m.dense_codes + (dense.first + b) * DENSE_BYTES,
                                     m.dense_multiples + MULTIPLES * (dense.first + b), in, dense.columns[b], total);
        for (int64_t b = start; b < std::min(start + turn, two_four.count); ++b)
            add_two_four_codes<BITS, R>(m.two_four_codes + (two_four.first + b) * TWO_FOUR_BYTES,
                                        m.code_positions + (two_four.first + b) * 2 * B,
                                        m.two_four_multiples + MULTIPLES * (two_four.first + b), in,
                                        two_four.columns[b], total);
        for (const int64_t due = Totals512<R>::due(start + turn, longest, top_k.count); step < due; ++step)
            add_top_k(m, top_k, step, in, rest, nullptr);
    }
    store(rest, nullptr, sums);
    const __m512 scales = _mm512_loadu_ps(m.scales + strip * B);
    for (int n = 0; n < R; ++n)
        _mm512_storeu_ps(sums + n * B, _mm512_fmadd_ps(total[n], scales, _mm512_loadu_ps(sums + n * B)));
}

// --- all of them -------------------------------------------------------------------------------------------------------

using Strip = void (*)(const Matrix &, int64_t, Input, float *);

struct Kernel {
    int rows; // of x at a time
    Strip strip;
};

// The smallest kernel that takes all rows at once, or the largest there is.
Kernel choose(int64_t bits, bool avx512, int64_t rows) {
    static const std::vector<Kernel> with_avx512 = {
        {1, strip_avx512<1>}, {2, strip_avx512<2>}, {4, strip_avx512<4>}, {8, strip_avx512<8>}, {16, strip_avx512<16>}};
    static const std::vector<Kernel> with_avx2 = {{1, strip_avx2<1>}, {2, strip_avx2<2>}, {4, strip_avx2<4>}};
    static const std::vector<Kernel> of_8_bits = {
        {1, strip_vnni<8, 1>}, {2, strip_vnni<8, 2>}, {4, strip_vnni<8, 4>}, {8, strip_vnni<8, 8>}, {16, strip_vnni<8, 16>}};
    static const std::vector<Kernel> of_4_bits = {
        {1, strip_vnni<4, 1>}, {2, strip_vnni<4, 2>}, {4, strip_vnni<4, 4>}, {8, strip_vnni<4, 8>}, {16, strip_vnni<4, 16>}};
    const auto &kernels = bits == 8 ? of_8_bits : bits == 4 ? of_4_bits : avx512 ? with_avx512 : with_avx2;
    for (const Kernel &kernel : kernels)
        if (kernel.rows >= rows) return kernel;
    return kernels.back();
}

// Rows of x in bundles of R, block column by block column: bf16 [bundles][block columns][R][16], and as floats
// [bundles][block columns][16][R]; rows that are missing in the last bundle are zero. And as codes, see `Input`.
struct Inputs {
    int R;
    int64_t bundles, block_columns, rows;
    std::vector<bf16> narrow;
    std::vector<float> wide;
    std::vector<int8_t> codes;
    std::vector<float> steps;
    std::vector<int32_t> sums;

    void reserve(int rows_at_once, int64_t all_rows, int64_t columns, bool with_wide, bool with_codes) {
        R = rows_at_once, rows = all_rows, block_columns = columns, bundles = (all_rows + R - 1) / R;
        const size_t size = size_t(bundles * block_columns * R * B);
        narrow.resize(size), wide.resize(with_wide ? size : 0), codes.resize(with_codes ? size : 0);
        steps.resize(codes.size() / B), sums.resize(codes.size() / B);
    }

    Input bundle(int64_t number) const {
        const int64_t start = number * block_columns * R * B;
        return {narrow.data() + start, wide.empty() ? nullptr : wide.data() + start,
                codes.empty() ? nullptr : codes.data() + start, codes.empty() ? nullptr : steps.data() + start / B,
                codes.empty() ? nullptr : sums.data() + start / B};
    }

    void fill(const bf16 *x, int64_t bundle, int64_t column) {
        const int64_t start = (bundle * block_columns + column) * R * B;
        for (int n = 0; n < R; ++n) {
            bf16 *target = narrow.data() + start + n * B;
            const int64_t row = bundle * R + n;
            if (row < rows)
                std::memcpy(target, x + (row * block_columns + column) * B, B * sizeof(bf16));
            else
                std::memset(target, 0, B * sizeof(bf16));
            for (int c = 0; c < B && !wide.empty(); ++c) wide[start + c * R + n] = widen(target[c]);
            if (!codes.empty())
                to_codes(target, codes.data() + start + n * B, steps[start / B + n], sums[start / B + n]);
        }
    }

    // 16 values of x: the largest becomes 127 or -127. Where one is infinite or no number all are no number.
    static void to_codes(const bf16 *x, int8_t *codes, float &step, int32_t &sum) {
        bf16 most = 0;
        for (int c = 0; c < B; ++c) most = std::max<bf16>(most, x[c] & 0x7fff);
        const float largest = widen(most);
        const bool finite = most < 0x7f80, counts = finite && largest > 1e-30f;
        const float inverse = counts ? 127 / largest : 0;
        step = finite ? largest / 127 : NAN, sum = 0;
        for (int c = 0; c < B; ++c) {
            codes[c] = counts ? int8_t(std::lrintf(widen(x[c]) * inverse)) : int8_t(0);
            sum += codes[c];
        }
    }
};

void store(const Matrix &m, const Inputs &inputs, int64_t strip, int64_t bundle, const float *sums, bf16 *y) {
    const int64_t rows = std::min<int64_t>(inputs.R, inputs.rows - bundle * inputs.R);
    const int64_t outputs = std::min<int64_t>(B, m.outputs - strip * B);
    for (int64_t n = 0; n < rows; ++n) {
        bf16 *target = y + (bundle * inputs.R + n) * m.outputs + strip * B;
        for (int64_t o = 0; o < outputs; ++o)
            target[o] = narrow(sums[n * B + o] + (m.bias ? widen(m.bias[strip * B + o]) : 0.0f));
    }
}

// All rows of x by the strips from `first` to before `end`.
void multiply_strips(const Matrix &m, const Kernel &kernel, const Inputs &inputs, int64_t first, int64_t end, bf16 *y) {
    for (int64_t bundle = 0; bundle < inputs.bundles; ++bundle)
        for (int64_t strip = first; strip < end; ++strip) {
            alignas(64) float sums[B * B];
            kernel.strip(m, strip, inputs.bundle(bundle), sums);
            store(m, inputs, strip, bundle, sums, y);
        }
}

void multiply(const Matrix &m, const bf16 *x, int64_t rows, bf16 *y, int threads, bool avx512) {
    const Kernel kernel = choose(m.bits, avx512, rows);
    // Kept from call to call: fresh memory costs more than filling it.
    static thread_local Inputs kept;
    Inputs &inputs = kept;
    inputs.reserve(kernel.rows, rows, m.block_columns, !avx512, m.bits);
    // One thread is done with a single bundle before two have met.
#pragma omp parallel for collapse(2) num_threads(threads) if (inputs.bundles > 1)
    for (int64_t bundle = 0; bundle < inputs.bundles; ++bundle)
        for (int64_t column = 0; column < m.block_columns; ++column) inputs.fill(x, bundle, column);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < m.strips; first += STRIPS_AT_ONCE)
        multiply_strips(m, kernel, inputs, first, std::min(first + STRIPS_AT_ONCE, m.strips), y);
}

} // namespace

// 2: AVX-512 with BF16, VBMI and VNNI; 1: AVX2 with FMA; 0: neither.
extern "C" int three_tier_instructions() {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx512 ? 2 : avx2 ? 1 : 0;
}

// x: bf16 [rows][16 * block columns]; y: bf16 [rows][outputs].
extern "C" void three_tier_linear(const Matrix *matrix, const bf16 *x, int64_t rows, bf16 *y, int threads, int avx512) {
    for (int64_t start = 0; start < rows; start += ROWS_AT_ONCE)
        multiply(*matrix, x + start * matrix->block_columns * B, std::min(ROWS_AT_ONCE, rows - start),
                 y + start * matrix->outputs, threads, avx512);
}
