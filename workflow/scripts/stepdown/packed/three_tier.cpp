// y = x W^T + b with W in three tiers, as docs/packed-format.md lays it out: 16 x 16 blocks, sorted by tier inside each
// strip of 16 rows of W. Every weight is read once, in the order it is stored in.
//
// One vector of 16 floats holds the outputs of a strip. Dense blocks go two columns at a time, 32 weights against one pair
// of x. 2:4 blocks go four columns at a time, 32 kept weights against x *permuted* by their 2-bit positions: nothing is
// decompressed. TopK blocks go four at a time in the same way (quads.py); with AVX2 their weights are added one by one.
#include <algorithm>
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
    int64_t strips, block_columns, outputs, k;
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
    INSTRUCTIONS void name(const Matrix &m, int64_t strip, const bf16 *x, const float *wide, float *sums) {            \
        const Input in{x, wide};                                                                                       \
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

using Strip = void (*)(const Matrix &, int64_t, const bf16 *, const float *, float *);

struct Kernel {
    int rows; // of x at a time
    Strip strip;
};

// The smallest kernel that takes all rows at once, or the largest there is.
Kernel choose(bool avx512, int64_t rows) {
    static const std::vector<Kernel> with_avx512 = {
        {1, strip_avx512<1>}, {2, strip_avx512<2>}, {4, strip_avx512<4>}, {8, strip_avx512<8>}, {16, strip_avx512<16>}};
    static const std::vector<Kernel> with_avx2 = {{1, strip_avx2<1>}, {2, strip_avx2<2>}, {4, strip_avx2<4>}};
    const auto &kernels = avx512 ? with_avx512 : with_avx2;
    for (const Kernel &kernel : kernels)
        if (kernel.rows >= rows) return kernel;
    return kernels.back();
}

// Rows of x in bundles of R, block column by block column: bf16 [bundles][block columns][R][16], and as floats
// [bundles][block columns][16][R]; rows that are missing in the last bundle are zero.
struct Inputs {
    int R;
    int64_t bundles, block_columns, rows;
    std::vector<bf16> narrow;
    std::vector<float> wide;

    void reserve(int rows_at_once, int64_t all_rows, int64_t columns, bool with_wide) {
        R = rows_at_once, rows = all_rows, block_columns = columns, bundles = (all_rows + R - 1) / R;
        const size_t size = size_t(bundles * block_columns * R * B);
        narrow.resize(size), wide.resize(with_wide ? size : 0);
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
            const int64_t start = bundle * m.block_columns * inputs.R * B;
            const float *wide = inputs.wide.empty() ? nullptr : inputs.wide.data() + start;
            kernel.strip(m, strip, inputs.narrow.data() + start, wide, sums);
            store(m, inputs, strip, bundle, sums, y);
        }
}

void multiply(const Matrix &m, const bf16 *x, int64_t rows, bf16 *y, int threads, bool avx512) {
    const Kernel kernel = choose(avx512, rows);
    // Kept from call to call: fresh memory costs more than filling it.
    static thread_local Inputs kept;
    Inputs &inputs = kept;
    inputs.reserve(kernel.rows, rows, m.block_columns, !avx512);
    // One thread is done with a single bundle before two have met.
#pragma omp parallel for collapse(2) num_threads(threads) if (inputs.bundles > 1)
    for (int64_t bundle = 0; bundle < inputs.bundles; ++bundle)
        for (int64_t column = 0; column < m.block_columns; ++column) inputs.fill(x, bundle, column);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < m.strips; first += STRIPS_AT_ONCE)
        multiply_strips(m, kernel, inputs, first, std::min(first + STRIPS_AT_ONCE, m.strips), y);
}

} // namespace

// 2: AVX-512 with BF16 and VBMI; 1: AVX2 with FMA; 0: neither.
extern "C" int three_tier_instructions() {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx512 ? 2 : avx2 ? 1 : 0;
}

// x: bf16 [rows][16 * block columns]; y: bf16 [rows][outputs].
extern "C" void three_tier_linear(const Matrix *matrix, const bf16 *x, int64_t rows, bf16 *y, int threads, int avx512) {
    for (int64_t start = 0; start < rows; start += ROWS_AT_ONCE)
        multiply(*matrix, x + start * matrix->block_columns * B, std::min(ROWS_AT_ONCE, rows - start),
                 y + start * matrix->outputs, threads, avx512);
}
