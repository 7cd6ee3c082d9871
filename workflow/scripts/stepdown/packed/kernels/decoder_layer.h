// Decoder layers of the Llama kind for one token: what stands between their linears, which then cost most of the time.
// Rounded to bf16 where transformers rounds; only attention is computed in float32 from end to end.
#pragma once

#include "multiply.h"

namespace {

// All sizes are whole eights.
struct DecoderLayer {
    int64_t hidden, heads, key_heads, head_size, avx512;
    double epsilon, scaling;                              // of the norms; of queries by keys
    const Matrix *query, *key, *value, *output, *gate, *up, *down;
    const bf16 *input_norm, *post_attention_norm;         // [hidden]
    const bf16 *query_norm, *key_norm;                    // [head size], or null
};

// Of one layer: keys and values [key heads][room][head size], of which so many are known.
struct Memory {
    bf16 *keys, *values;
    int64_t room, known;
};

AVX2_INLINE float sum_of(__m256 eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// e^x for x up to 88, and what is not a number as it is: 2^n times a polynomial for what is left of x, within 2 in the last place (Cephes' expf).
AVX2_INLINE __m256 exponential(__m256 x) {
    // Of two the second is given where one is not a number.
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 left = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    left = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), left);
    __m256 sum = _mm256_set1_ps(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        sum = _mm256_fmadd_ps(sum, left, _mm256_set1_ps(next));
    sum = _mm256_add_ps(_mm256_fmadd_ps(sum, _mm256_mul_ps(left, left), left), _mm256_set1_ps(1));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
}

// Root mean square norm of `size` values; y may be x.
AVX2 inline void normalise(const bf16 *x, const bf16 *weight, int64_t size, double epsilon, bf16 *y) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < size; i += 8) sum = _mm256_fmadd_ps(load_wide(x + i), load_wide(x + i), sum);
    const __m256 factor = _mm256_set1_ps(1 / std::sqrt(sum_of(sum) / float(size) + float(epsilon)));
    for (int64_t i = 0; i < size; i += 8)
        store_narrow(y + i, _mm256_mul_ps(load_wide(weight + i), rounded(_mm256_mul_ps(load_wide(x + i), factor))));
}

// Rotary position of heads [heads][size] in place; cosines and sines [size].
inline void rotate(bf16 *x, int64_t heads, int64_t size, const bf16 *cosines, const bf16 *sines) {
    const auto turned = [&](bf16 own, float other, int64_t i) {
        return narrow(widen(narrow(widen(own) * widen(cosines[i]))) + widen(narrow(other * widen(sines[i]))));
    };
    for (int64_t head = 0; head < heads; ++head, x += size)
        for (int64_t i = 0, j = size / 2; j < size; ++i, ++j) {
            const bf16 first = x[i], second = x[j];
            x[i] = turned(first, -widen(second), i), x[j] = turned(second, widen(first), j);
        }
}

// silu(gate) * up, to gate.
AVX2 inline void gate_by_silu(bf16 *gate, const bf16 *up, int64_t size) {
    for (int64_t i = 0; i < size; i += 8) {
        const __m256 x = load_wide(gate + i), inverse = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
        const __m256 silu = rounded(_mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), inverse)));
        store_narrow(gate + i, _mm256_mul_ps(silu, load_wide(up + i)));
    }
}

AVX2 inline void add(bf16 *x, const bf16 *y, int64_t size) {
    for (int64_t i = 0; i < size; i += 8) store_narrow(x + i, _mm256_add_ps(load_wide(x + i), load_wide(y + i)));
}

// Scores to what they weigh, not yet divided by the sum of all, which is returned.
AVX2 inline float soften(float *weights, int64_t length) {
    const float most = *std::max_element(weights, weights + length);
    float all = 0;
    int64_t n = 0;
    for (; n + 8 <= length; n += 8) {
        const __m256 found = exponential(_mm256_sub_ps(_mm256_loadu_ps(weights + n), _mm256_set1_ps(most)));
        _mm256_storeu_ps(weights + n, found);
        all += sum_of(found);
    }
    for (; n < length; ++n) all += weights[n] = std::exp(weights[n] - most);
    return all;
}

// One head: query and y, bf16 [head size].
AVX2 inline void attend(const DecoderLayer &layer, const Memory &memory, int64_t head, const bf16 *query, bf16 *y) {
    static thread_local std::vector<float> weights, wide;
    const int64_t size = layer.head_size, key_head = head / (layer.heads / layer.key_heads);
    const bf16 *keys = memory.keys + key_head * memory.room * size;
    const bf16 *values = memory.values + key_head * memory.room * size;
    weights.resize(size_t(memory.known)), wide.resize(size_t(size));
    for (int64_t i = 0; i < size; ++i) wide[i] = widen(query[i]) * float(layer.scaling);
    for (int64_t n = 0; n < memory.known; ++n) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < size; i += 8)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(&wide[i]), load_wide(keys + n * size + i), sum);
        weights[n] = sum_of(sum);
    }
    const float all = soften(weights.data(), memory.known);
    std::fill(wide.begin(), wide.end(), 0.0f);
    for (int64_t n = 0; n < memory.known; ++n) {
        const __m256 weight = _mm256_set1_ps(weights[n] / all);
        for (int64_t i = 0; i < size; i += 8) {
            const __m256 value = load_wide(values + n * size + i);
            _mm256_storeu_ps(&wide[i], _mm256_fmadd_ps(weight, value, _mm256_loadu_ps(&wide[i])));
        }
    }
    for (int64_t i = 0; i < size; i += 8) store_narrow(y + i, _mm256_loadu_ps(&wide[i]));
}

// Room for what a matrix is multiplied with, zeros beyond its columns.
inline bf16 *room(std::vector<bf16> &kept, const Matrix &matrix) {
    kept.assign(size_t(matrix.block_columns * B), 0);
    return kept.data();
}

// x: bf16 [hidden], in and out.
inline void attention_block(const DecoderLayer &l, Memory &memory, const bf16 *cosines, const bf16 *sines, bf16 *x,
                            int threads) {
    static thread_local std::vector<bf16> kept, query, key, value, y;
    const int64_t size = l.head_size;
    query.resize(size_t(l.heads * size)), key.resize(size_t(l.key_heads * size)), value.resize(key.size());
    bf16 *input = room(kept, *l.query);
    normalise(x, l.input_norm, l.hidden, l.epsilon, input);
    multiply({{l.query, query.data()}, {l.key, key.data()}, {l.value, value.data()}}, input, 1, threads, l.avx512);
    for (int64_t head = 0; l.query_norm && head < l.heads; ++head)
        normalise(&query[head * size], l.query_norm, size, l.epsilon, &query[head * size]);
    for (int64_t head = 0; l.key_norm && head < l.key_heads; ++head)
        normalise(&key[head * size], l.key_norm, size, l.epsilon, &key[head * size]);
    rotate(query.data(), l.heads, size, cosines, sines), rotate(key.data(), l.key_heads, size, cosines, sines);
    for (int64_t head = 0; head < l.key_heads; ++head) {
        const int64_t place = (head * memory.room + memory.known) * size;
        std::copy_n(&key[head * size], size, memory.keys + place);
        std::copy_n(&value[head * size], size, memory.values + place);
    }
    ++memory.known;
    input = room(kept, *l.output);
    const bf16 *queries = query.data();
#pragma omp parallel for num_threads(threads)
    for (int64_t head = 0; head < l.heads; ++head) attend(l, memory, head, queries + head * size, input + head * size);
    y.resize(size_t(l.hidden));
    multiply({{l.output, y.data()}}, input, 1, threads, l.avx512);
    add(x, y.data(), l.hidden);
}

inline void mlp_block(const DecoderLayer &l, bf16 *x, int threads) {
    static thread_local std::vector<bf16> kept, kept_gate, up, y;
    bf16 *input = room(kept, *l.gate), *gate = room(kept_gate, *l.down);
    normalise(x, l.post_attention_norm, l.hidden, l.epsilon, input);
    up.resize(size_t(l.up->outputs)), y.resize(size_t(l.hidden));
    multiply({{l.gate, gate}, {l.up, up.data()}}, input, 1, threads, l.avx512);
    gate_by_silu(gate, up.data(), l.up->outputs);
    multiply({{l.down, y.data()}}, gate, 1, threads, l.avx512);
    add(x, y.data(), l.hidden);
}

} // namespace
