/* A tile of a matrix product, whose sums stay in registers: some rows by two vectors of columns.
 *
 * The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
 * (2008). Sums are made in the order of the inputs, so a row's don't depend on the rows beside it.
 */
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* Floats of a vector, and rows of a tile: the sums, two vectors of weights and one input number fill
 * the registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 14
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 12
#else
#define LANES 4
#define TILE_ROWS 6
#endif
#define MAX_TILE_ROWS 14

/* Columns of a tile. */
#define PANEL (2 * LANES)

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* Where a tile's inputs are: number p of row i at x[i * row + p * step]. */
struct inputs {
    const float *x;
    int64_t row, step;
};

/* What a tile multiplies them with: row p, PANEL numbers, is p * row numbers behind `at`. They are
 * float32, or int8 and to be multiplied with their columns' scales. What is needed next is fetched
 * meanwhile, `next_step` bytes for each row. */
struct weights {
    const void *at;
    int64_t row;
    const float *scales;
    const char *next;
    int64_t next_step;
};

/* int8 numbers as float32 ones. The compiler's own conversion of vectors is five times as slow. */
INLINE vector from_int8(const int8_t *numbers)
{
#if defined(__AVX512F__)
    return (vector)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)numbers)));
#elif defined(__AVX2__)
    return (vector)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)numbers)));
#else
    vector out;
    for (int i = 0; i < LANES; i++)
        out[i] = numbers[i];
    return out;
#endif
}

/* out[i * width] = start + the tile's sums over `length` inputs; without a start they are added. */
INLINE void multiply_tile(int rows, int is_int8, struct inputs in, struct weights by,
                          int64_t length, const float *start, float *out, int64_t width)
{
    vector sums[MAX_TILE_ROWS][2], zero = {0}, scales[2] = {zero, zero};
    const char *at = by.at;
    int64_t step = by.row * (int64_t)(is_int8 ? sizeof(int8_t) : sizeof(float));
    /* Every third row has a pointer; the two behind it are one and two rows on. */
    const float *thirds[] = {in.x, in.x + 3 * in.row, in.x + 6 * in.row, in.x + 9 * in.row,
                             in.x + 12 * in.row};
    UNROLL for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = zero;
    if (is_int8) {
        scales[0] = *(const vector *)by.scales;
        scales[1] = *(const vector *)(by.scales + LANES);
    }
    for (int64_t p = 0; p < length; p++, at += step) {
        vector left, right;
        if (is_int8) {
            left = scales[0] * from_int8((const int8_t *)at);
            right = scales[1] * from_int8((const int8_t *)at + LANES);
        } else {
            left = *(const vector *)at;
            right = *(const vector *)((const float *)at + LANES);
        }
        __builtin_prefetch(by.next, 0, 2);
        __builtin_prefetch(by.next + 64, 0, 2);
        by.next += by.next_step;
        UNROLL for (int i = 0; i < rows; i++)
        {
            float number = thirds[i / 3][i % 3 * in.row];
            sums[i][0] += number * left;
            sums[i][1] += number * right;
        }
        UNROLL for (int i = 0; i < (rows + 2) / 3; i++) thirds[i] += in.step;
    }
    UNROLL for (int i = 0; i < rows; i++)
    {
        vector *to = (vector *)(out + i * width);
        const vector *from = start ? (const vector *)start : to;
        vector left = from[0] + sums[i][0], right = from[1] + sums[i][1];
        to[0] = left;
        to[1] = right;
    }
}

/* Calls `tile`, a macro of a function's name and a number of rows, for each that a tile may have. */
#define EACH_TILE(tile)                                                                           \
    tile(1) tile(2) tile(3) tile(4) tile(5) tile(6) tile(7)                                       \
    tile(8) tile(9) tile(10) tile(11) tile(12) tile(13) tile(14)
