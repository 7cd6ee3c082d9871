// The kernels as Python calls them. One library for every processor: what it has is asked at run time.
#include "multiply.h"
#include "unpack.h"

// 2: AVX-512 with BF16, VBMI, VNNI and GFNI; 1: AVX2 with FMA; 0: neither.
extern "C" int three_tier_instructions() {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx512 ? 2 : avx2 ? 1 : 0;
}

// x: bf16 [rows][16 * block columns]; y: bf16 [rows][outputs].
extern "C" void three_tier_linear(const Matrix *matrix, const bf16 *x, int64_t rows, bf16 *y, int threads, int avx512) {
    for (int64_t start = 0; start < rows; start += ROWS_AT_ONCE)
        multiply({{matrix, y + start * matrix->outputs}}, x + start * matrix->block_columns * B,
                 std::min(ROWS_AT_ONCE, rows - start), threads, avx512);
}

// w: bf16 [16 * strips][16 * block columns], the strips from `first` on.
extern "C" void three_tier_unpack(const Matrix *matrix, int64_t first, int64_t strips, bf16 *w, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t strip = 0; strip < strips; ++strip)
        unpack_strip(*matrix, first + strip, w + strip * B * B * matrix->block_columns);
}
