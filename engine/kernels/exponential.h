/* The exponential function of the C sources beside this one. */
#include <math.h>
#include <stdint.h>

/* e^x to within 2 units in the last place, and e^60 or e^-60 beyond: Cephes' expf, written so that
 * it vectorizes. Farther out, what is divided by it would become a denormal number, which costs a
 * hundred times as much, also in the lanes that a vector computes and doesn't take. */
static inline float exponential(float x)
{
    x = x < -60.0f ? -60.0f : x;
    x = x > 60.0f ? 60.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* Of a NaN any number, which p, a NaN, is multiplied with. */
    union { uint32_t i; float f; } power = {(uint32_t)((int32_t)n + 127) << 23};
    return p * power.f;
}
