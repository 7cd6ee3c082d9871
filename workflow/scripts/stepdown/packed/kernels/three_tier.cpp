// The kernels as Python calls them. One library for every processor: what it has is asked at run time.
#include "decoder_layer.h"
#include "unpack.h"

// 2: AVX-512 with BF16, VBMI, VBMI2, VNNI and GFNI; 1: AVX2 with FMA; 0: neither.
extern "C" int three_tier_instructions() {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                        __builtin_cpu_supports("avx512bf16") &&
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

// x: bf16 [hidden], in and out; norm: bf16 [hidden], of what the last layer gives; cosines, sines: bf16 [head size];
// memory: bf16 [layers][keys, values][key heads][room][head size], with `known` places known, and one more afterwards.
extern "C" void decode_token(const DecoderLayer *layers, int64_t count, const bf16 *norm, const bf16 *cosines,
                             const bf16 *sines, bf16 *memory, int64_t room, int64_t known, bf16 *x, int threads) {
    for (const DecoderLayer *layer = layers; layer < layers + count; ++layer) {
        const int64_t half = layer->key_heads * room * layer->head_size;
        Memory own = {memory, memory + half, room, known};
        attention_block(*layer, own, cosines, sines, x, threads);
        mlp_block(*layer, x, threads);
        memory += 2 * half;
    }
    normalise(x, norm, layers->hidden, layers->epsilon, x);
}
