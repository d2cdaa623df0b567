/* What a decoder layer does between its matrix products, one pass over memory for each.
 *
 * engine/kernels/fused_functions.py calls this through ctypes; it has checked every shape and stride that is
 * relied on here. All arrays are float32; strides and sizes count floats.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"

/* out = weight * x / sqrt(mean(x^2) + eps), row by row; x and out: [rows, size], contiguous. */
void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t size,
              float eps, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        float *to = out + row * size, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++)
            sum += from[i] * from[i];
        float inverse = 1.0f / sqrtf(sum / size + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            to[i] = weight[i] * (from[i] * inverse);
    }
}

/* Some thousand numbers of one row; apart, for a loop that is shared out among threads as well
 * doesn't vectorize. */
static void silu_gate_part(float *restrict gate, const float *restrict up, int64_t size)
{
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* gate = silu(gate) * up, in place; both [size]. */
void silu_gate(float *gate, const float *up, int64_t size, int num_threads)
{
    const int64_t part = 4096;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t start = 0; start < size; start += part)
        silu_gate_part(gate + start, up + start, size - start < part ? size - start : part);
}

/* Rotary positions, the halves of a head being the pairs' parts.
 * x: [H, T, D] with strides head and token; out: [T, H, D], contiguous; cosine, sine: [T, D],
 * contiguous. */
void rotate(const float *x, float *out, int64_t head, int64_t token, const float *cosine,
            const float *sine, int64_t num_heads, int64_t num_tokens, int64_t size,
            int num_threads)
{
    int64_t half = size / 2;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *c = cosine + t * size, *s = sine + t * size;
        for (int64_t h = 0; h < num_heads; h++) {
            const float *from = x + h * head + t * token;
            float *restrict to = out + (t * num_heads + h) * size;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                to[i] = from[i] * c[i] - from[half + i] * s[i];
                to[half + i] = from[half + i] * c[half + i] + from[i] * s[half + i];
            }
        }
    }
}

/* New tokens' keys or values to their slots.
 * rows: [H, T, D] with strides head and token; pool: [H, S, D], contiguous; slots: [T]. */
void write_slots(const float *rows, int64_t head, int64_t token, const int64_t *slots,
                 float *pool, int64_t num_heads, int64_t num_tokens, int64_t num_slots,
                 int64_t size, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t h = 0; h < num_heads; h++)
            memcpy(pool + (h * num_slots + slots[t]) * size, rows + h * head + t * token,
                   size * sizeof(float));
}
