// A decoder layer of the Llama kind for one token: what stands between its linears, which then cost most of the time.
// Rounded to bf16 where transformers rounds; only attention is computed in float32 from end to end.
#pragma once

#include "multiply.h"

namespace {

struct DecoderLayer {
    int64_t hidden, heads, key_heads, head_size, avx512;
    double epsilon, scaling;                              // of the norms; of queries by keys
    const Matrix *query, *key, *value, *output, *gate, *up, *down;
    const bf16 *input_norm, *post_attention_norm;         // [hidden]
    const bf16 *query_norm, *key_norm;                    // [head size], or null
};

// Keys and values so far, [key heads][length][head size], by how far apart heads and places are.
struct Memory {
    const bf16 *keys, *values;
    int64_t length, key_head_stride, key_stride, value_head_stride, value_stride;
    const bool *seen; // [length], or null where all are
};

AVX2_INLINE __m256 load_wide(const bf16 *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

AVX2_INLINE float sum_of(__m256 eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// e^x for x up to 88: 2^n times a polynomial for what is left of x, within 2 in the last place (Cephes' expf).
AVX2_INLINE __m256 exponential(__m256 x) {
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(88.0f)), _mm256_set1_ps(-87.0f));
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

// Root mean square norm of `size` values, whole eights of them; y may be x.
AVX2 inline void normalise(const bf16 *x, const bf16 *weight, int64_t size, double epsilon, bf16 *y) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < size; i += 8) sum = _mm256_fmadd_ps(load_wide(x + i), load_wide(x + i), sum);
    const float factor = 1 / std::sqrt(sum_of(sum) / float(size) + float(epsilon));
    for (int64_t i = 0; i < size; ++i) y[i] = narrow(widen(weight[i]) * widen(narrow(widen(x[i]) * factor)));
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

// silu(gate) * up, to gate; whole eights of them.
AVX2 inline void gate_by_silu(bf16 *gate, const bf16 *up, int64_t size) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
    for (int64_t start = 0; start < size; start += 8) {
        const __m256 x = load_wide(gate + start);
        alignas(32) float silu[8];
        _mm256_store_ps(silu, _mm256_div_ps(x, _mm256_add_ps(one, exponential(_mm256_sub_ps(zero, x)))));
        for (int i = 0; i < 8; ++i) gate[start + i] = narrow(widen(narrow(silu[i])) * widen(up[start + i]));
    }
}

inline void add(bf16 *x, const bf16 *y, int64_t size) {
    for (int64_t i = 0; i < size; ++i) x[i] = narrow(widen(x[i]) + widen(y[i]));
}

// What the query of a head finds among the keys: weights, and their sum. weights: float [length], scores before.
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

// One head: query and y, bf16 [head size], whole eights of them.
AVX2 inline void attend(const DecoderLayer &layer, const Memory &memory, int64_t head, const bf16 *query, bf16 *y) {
    static thread_local std::vector<float> weights, wide;
    const int64_t size = layer.head_size, key_head = head / (layer.heads / layer.key_heads);
    const bf16 *keys = memory.keys + key_head * memory.key_head_stride;
    const bf16 *values = memory.values + key_head * memory.value_head_stride;
    weights.resize(size_t(memory.length)), wide.resize(size_t(size));
    for (int64_t i = 0; i < size; ++i) wide[i] = widen(query[i]) * float(layer.scaling);
    for (int64_t n = 0; n < memory.length; ++n) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < size; i += 8)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(&wide[i]), load_wide(keys + n * memory.key_stride + i), sum);
        weights[n] = memory.seen && !memory.seen[n] ? -INFINITY : sum_of(sum);
    }
    const float all = soften(weights.data(), memory.length);
    std::fill(wide.begin(), wide.end(), 0.0f);
    for (int64_t n = 0; n < memory.length; ++n) {
        const __m256 weight = _mm256_set1_ps(weights[n] / all);
        for (int64_t i = 0; i < size; i += 8) {
            const __m256 value = load_wide(values + n * memory.value_stride + i);
            _mm256_storeu_ps(&wide[i], _mm256_fmadd_ps(weight, value, _mm256_loadu_ps(&wide[i])));
        }
    }
    for (int64_t i = 0; i < size; ++i) y[i] = narrow(wide[i]);
}

// Room for what a matrix is multiplied with, zeros beyond its columns.
inline bf16 *room(std::vector<bf16> &kept, const Matrix &matrix) {
    kept.assign(size_t(matrix.block_columns * B), 0);
    return kept.data();
}

} // namespace
