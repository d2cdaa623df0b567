/* Attention of single new tokens over the KV pool, all sequences of a batch in one call.
 *
 * engine/attention/native.py compiles this once per machine and calls it through ctypes; it has
 * checked every shape, stride and bound that is relied on here. All arrays are float32; strides
 * and sizes count floats. Softmax in two passes: all scores of a head's group are kept.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

#define INLINE static inline __attribute__((always_inline))

INLINE float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Scores to weights, in place; returns their sum. */
static float weigh(float *scores, int64_t length)
{
    float top = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < length; j++)
        top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < length; j++) {
        scores[j] = exponential(scores[j] - top);
        sum += scores[j];
    }
    return sum;
}

/* One KV head of one sequence: `group` queries over `length` keys. */
INLINE void attend_head(const float *q, int64_t q_head, const float *k, const float *v,
                        float *out, int64_t group, int64_t length, int64_t key_size,
                        int64_t value_size, float scale, float *scores)
{
    for (int64_t j = 0; j < length; j++) {
        for (int64_t i = 0; i < key_size; i += 16)
            __builtin_prefetch(k + (j + 24) * key_size + i);
        for (int64_t g = 0; g < group; g++)
            scores[g * length + j] = scale * dot(q + g * q_head, k + j * key_size, key_size);
        for (int64_t i = 0; i < value_size; i += 16)
            __builtin_prefetch(v + j * value_size + i, 0, 2);
    }
    for (int64_t g = 0; g < group; g++) {
        float *weights = scores + g * length;
        float inverse = 1.0f / weigh(weights, length);
        for (int64_t j = 0; j < length; j++)
            weights[j] *= inverse;
    }
    memset(out, 0, group * value_size * sizeof(float));
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) {
        const float *a = v + j * value_size;
        const float *b = a + value_size, *c = b + value_size, *d = c + value_size;
        for (int64_t g = 0; g < group; g++) {
            const float *w = scores + g * length + j;
            float *restrict sum = out + g * value_size;
#pragma omp simd
            for (int64_t i = 0; i < value_size; i++)
                sum[i] += w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i];
        }
    }
    for (; j < length; j++)
        for (int64_t g = 0; g < group; g++) {
            float weight = scores[g * length + j], *restrict sum = out + g * value_size;
            const float *a = v + j * value_size;
#pragma omp simd
            for (int64_t i = 0; i < value_size; i++)
                sum[i] += weight * a[i];
        }
}

/* q: [H, T, D] with strides q_head and q_token. k, v: [Hkv, S, D] and [Hkv, S, Dv], contiguous.
 * out: [T, H, Dv], contiguous. segments: [n, 3], each a token's row, its first slot and the slot
 * after its last. Returns 0, or 1 when there is no memory for the scores. */
int attend_decodes(const float *q, int64_t q_head, int64_t q_token, const float *k,
                   const float *v, float *out, int64_t num_kv_heads, int64_t group,
                   int64_t num_slots, int64_t key_size, int64_t value_size, float scale,
                   const int64_t *segments, int64_t num_segments, int64_t longest, int num_threads)
{
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        float *scores = malloc(group * longest * sizeof(float));
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < num_segments * num_kv_heads; task++) {
            const int64_t *segment = segments + 3 * (task / num_kv_heads);
            int64_t head = task % num_kv_heads, slot = head * num_slots + segment[1];
            const float *query = q + head * group * q_head + segment[0] * q_token;
            const float *key = k + slot * key_size, *value = v + slot * value_size;
            float *sum = out + (segment[0] * num_kv_heads + head) * group * value_size;
            int64_t length = segment[2] - segment[1];
            if (!scores)
                continue;
            /* Sizes that the compiler knows are unrolled. */
            if (key_size == 64 && value_size == 64)
                attend_head(query, q_head, key, value, sum, group, length, 64, 64, scale, scores);
            else if (key_size == 128 && value_size == 128)
                attend_head(query, q_head, key, value, sum, group, length, 128, 128, scale, scores);
            else
                attend_head(query, q_head, key, value, sum, group, length, key_size, value_size,
                            scale, scores);
        }
        free(scores);
    }
    return failed;
}
