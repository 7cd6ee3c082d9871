// y = x W^T + b for all rows of x, on several threads. Every weight is read once, in the order it is stored in.
#pragma once

#include <initializer_list>
#include <vector>

#include "avx2.h"
#include "avx512.h"

namespace {

// Strips that share a pass over x, so that x is read from the second-level cache and not from further away.
constexpr int STRIPS_AT_ONCE = 4;
// Rows of x that are held in the kernels' own layout; by then reading W again costs nothing beside computing.
constexpr int64_t ROWS_AT_ONCE = 256;

using Strip = void (*)(const Matrix &, int64_t, Input, float *);

struct Kernel {
    int rows; // of x at a time
    Strip strip;
};

// The smallest kernel that takes all rows at once, or the largest there is.
inline Kernel choose(int64_t bits, bool avx512, int64_t rows) {
    static const std::vector<Kernel> with_avx512[] = {
        {{1, strip_avx512<Floats512<1>>},
         {2, strip_avx512<Floats512<2>>},
         {4, strip_avx512<Floats512<4>>},
         {8, strip_avx512<Floats512<8>>},
         {16, strip_avx512<Floats512<16>>}},
        {{1, strip_avx512<Codes512<8, 1>>},
         {2, strip_avx512<Codes512<8, 2>>},
         {4, strip_avx512<Codes512<8, 4>>},
         {8, strip_avx512<Codes512<8, 8>>},
         {16, strip_avx512<Codes512<8, 16>>}},
        {{1, strip_avx512<Codes512<4, 1>>},
         {2, strip_avx512<Codes512<4, 2>>},
         {4, strip_avx512<Codes512<4, 4>>},
         {8, strip_avx512<Codes512<4, 8>>},
         {16, strip_avx512<Codes512<4, 16>>}}};
    static const std::vector<Kernel> with_avx2[] = {
        {{1, strip_avx2<Floats256<1>>}, {2, strip_avx2<Floats256<2>>}, {4, strip_avx2<Floats256<4>>}},
        {{1, strip_avx2<Codes256<8, 1>>}, {2, strip_avx2<Codes256<8, 2>>}, {4, strip_avx2<Codes256<8, 4>>}},
        {{1, strip_avx2<Codes256<4, 1>>}, {2, strip_avx2<Codes256<4, 2>>}, {4, strip_avx2<Codes256<4, 4>>}}};
    const auto &kernels = (avx512 ? with_avx512 : with_avx2)[bits == 0 ? 0 : bits == 8 ? 1 : 2];
    for (const Kernel &kernel : kernels)
        if (kernel.rows >= rows) return kernel;
    return kernels.back();
}

// 16 values of x as whole numbers: the largest becomes 127 or -127, `offset` is added to all. Where one is infinite or
// no number the step is none either.
AVX2 inline void to_codes(const bf16 *x, char offset, int8_t *codes, float *step) {
    const __m256i values = _mm256_loadu_si256((const __m256i *)x);
    const __m256i sizes = _mm256_and_si256(values, _mm256_set1_epi16(0x7fff));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    // There is an instruction for the least of eight.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    const bf16 most = bf16(~_mm_extract_epi16(least, 0));
    const float largest = widen(most);
    const __m256 inverse = _mm256_set1_ps(most < 0x7f80 && largest > 1e-30f ? 127 / largest : 0.0f);
    *step = most < 0x7f80 ? largest / 127 : NAN;
    __m256i whole[2];
    for (int half = 0; half < 2; ++half) {
        const __m128i part = half ? _mm256_extracti128_si256(values, 1) : _mm256_castsi256_si128(values);
        const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(part), 16));
        whole[half] = _mm256_cvtps_epi32(_mm256_mul_ps(wide, inverse));
    }
    // What is packed stands in the order of the halves' own halves.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)codes, _mm_add_epi8(bytes, _mm_set1_epi8(offset)));
}

// Rows of x in bundles of R, block column by block column: bf16 [bundles][block columns][R][16], and as floats
// [bundles][block columns][16][R]; rows that are missing in the last bundle are zero. And as codes, see `Input`.
struct Inputs {
    int R;
    char offset;
    int64_t bundles, block_columns, rows;
    std::vector<bf16> narrow;
    std::vector<float> wide;
    std::vector<int8_t> codes;
    std::vector<float> steps;

    void reserve(int rows_at_once, int64_t all_rows, int64_t columns, bool avx512, bool with_codes) {
        R = rows_at_once, rows = all_rows, block_columns = columns, bundles = (all_rows + R - 1) / R;
        offset = avx512 ? char(128) : char(0);
        const size_t size = size_t(bundles * block_columns * R * B);
        narrow.resize(size), wide.resize(avx512 ? 0 : size), codes.resize(with_codes ? size : 0);
        steps.resize(codes.size() / B);
    }

    Input bundle(int64_t number) const {
        const int64_t start = number * block_columns * R * B;
        const auto from = [](const auto &all, int64_t place) { return all.empty() ? nullptr : all.data() + place; };
        return {from(narrow, start), from(wide, start), from(codes, start), from(steps, start / B)};
    }

    void fill(const bf16 *x, int64_t bundle, int64_t column) {
        static const bf16 zeros[B] = {};
        const int64_t start = (bundle * block_columns + column) * R * B;
        for (int n = 0; n < R; ++n) {
            const int64_t row = bundle * R + n, place = start + n * B;
            const bf16 *source = row < rows ? x + (row * block_columns + column) * B : zeros;
            std::memcpy(&narrow[place], source, B * sizeof(bf16));
            for (int c = 0; c < B && !wide.empty(); ++c) wide[start + c * R + n] = widen(source[c]);
            if (!codes.empty()) to_codes(source, offset, &codes[place], &steps[place / B]);
        }
    }
};

// What x is multiplied with: y, bf16 [rows][outputs].
struct Product {
    const Matrix *matrix;
    bf16 *y;
};

AVX2 inline void store(const Product &product, const Inputs &inputs, int64_t strip, int64_t bundle, const float *sums) {
    const Matrix &m = *product.matrix;
    const int64_t rows = std::min<int64_t>(inputs.R, inputs.rows - bundle * inputs.R);
    const int64_t outputs = std::min<int64_t>(B, m.outputs - strip * B);
    bf16 bias[B] = {}, whole[B];
    if (m.bias) std::memcpy(bias, m.bias + strip * B, size_t(outputs) * sizeof(bf16));
    for (int64_t n = 0; n < rows; ++n) {
        for (int half = 0; half < B; half += 8)
            store_narrow(whole + half, _mm256_add_ps(_mm256_loadu_ps(sums + n * B + half), load_wide(bias + half)));
        std::memcpy(product.y + (bundle * inputs.R + n) * m.outputs + strip * B, whole, size_t(outputs) * sizeof(bf16));
    }
}

// All rows of x by `count` strips from `first` on, which share a pass over x.
inline void multiply_strips(const Product &product, const Kernel &kernel, const Inputs &inputs, int64_t first,
                            int64_t count) {
    const int64_t end = std::min(first + count, product.matrix->strips);
    for (int64_t bundle = 0; bundle < inputs.bundles; ++bundle)
        for (int64_t strip = first; strip < end; ++strip) {
            alignas(64) float sums[B * B];
            kernel.strip(*product.matrix, strip, inputs.bundle(bundle), sums);
            store(product, inputs, strip, bundle, sums);
        }
}

// The same x, bf16 [rows][16 * block columns], by several matrices of the same values.
inline void multiply(std::initializer_list<Product> products, const bf16 *x, int64_t rows, int threads, bool avx512) {
    const Matrix &m = *products.begin()->matrix;
    const Kernel kernel = choose(m.bits, avx512, rows);
    // Kept from call to call: fresh memory costs more than filling it.
    static thread_local Inputs kept;
    Inputs &inputs = kept;
    inputs.reserve(kernel.rows, rows, m.block_columns, avx512, m.bits);
    // One thread is done with a single bundle before two have met.
#pragma omp parallel for collapse(2) num_threads(threads) if (inputs.bundles > 1)
    for (int64_t bundle = 0; bundle < inputs.bundles; ++bundle)
        for (int64_t column = 0; column < m.block_columns; ++column) inputs.fill(x, bundle, column);
    const int64_t count = inputs.bundles > 1 ? STRIPS_AT_ONCE : 1;
    const auto tasks_of = [&](const Product &product) { return (product.matrix->strips + count - 1) / count; };
    int64_t tasks = 0;
    for (const Product &product : products) tasks += tasks_of(product);
    // Long pieces first, in which memory is read as it stands; then shorter ones, so that no thread waits for another.
#pragma omp parallel for schedule(guided) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t place = task;
        const Product *product = products.begin();
        for (; place >= tasks_of(*product); ++product) place -= tasks_of(*product);
        multiply_strips(*product, kernel, inputs, place * count, count);
    }
}

} // namespace
