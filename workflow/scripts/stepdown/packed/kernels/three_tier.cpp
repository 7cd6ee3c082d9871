// The kernels as Python calls them. One library for every processor: what it has is asked at run time.
#include "decoder_layer.h"
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

// x: bf16 [hidden]; cosines, sines: bf16 [head size]. Writes query [heads][head size], key and value [key heads][head size].
extern "C" void decoder_layer_before(const DecoderLayer *layer, const bf16 *x, const bf16 *cosines, const bf16 *sines,
                                     bf16 *query, bf16 *key, bf16 *value, int threads) {
    const DecoderLayer &l = *layer;
    static thread_local std::vector<bf16> kept;
    bf16 *input = room(kept, *l.query);
    normalise(x, l.input_norm, l.hidden, l.epsilon, input);
    multiply({{l.query, query}, {l.key, key}, {l.value, value}}, input, 1, threads, l.avx512);
    for (int64_t head = 0; l.query_norm && head < l.heads; ++head)
        normalise(query + head * l.head_size, l.query_norm, l.head_size, l.epsilon, query + head * l.head_size);
    for (int64_t head = 0; l.key_norm && head < l.key_heads; ++head)
        normalise(key + head * l.head_size, l.key_norm, l.head_size, l.epsilon, key + head * l.head_size);
    rotate(query, l.heads, l.head_size, cosines, sines), rotate(key, l.key_heads, l.head_size, cosines, sines);
}

// The rest, once the key and the value are in memory. x: bf16 [hidden], in and out; query: what came of it before.
extern "C" void decoder_layer_after(const DecoderLayer *layer, const Memory *memory, const bf16 *query, bf16 *x, int threads) {
    const DecoderLayer &l = *layer;
    static thread_local std::vector<bf16> kept, kept_gate, up, y;
    bf16 *input = room(kept, *l.output);
#pragma omp parallel for num_threads(threads)
    for (int64_t head = 0; head < l.heads; ++head)
        attend(l, *memory, head, query + head * l.head_size, input + head * l.head_size);
    y.resize(size_t(l.hidden));
    multiply({{l.output, y.data()}}, input, 1, threads, l.avx512);
    add(x, y.data(), l.hidden);
    input = room(kept, *l.gate);
    normalise(x, l.post_attention_norm, l.hidden, l.epsilon, input);
    bf16 *gate = room(kept_gate, *l.down);
    up.resize(size_t(l.up->outputs));
    multiply({{l.gate, gate}, {l.up, up.data()}}, input, 1, threads, l.avx512);
    gate_by_silu(gate, up.data(), l.up->outputs);
    multiply({{l.down, y.data()}}, gate, 1, threads, l.avx512);
    add(x, y.data(), l.hidden);
}
