/* Product of activations and a linear layer's weights, which are laid out in panels once.
 *
 * The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
 * (2008), for few rows: sums of a tile of some rows and two vectors of columns stay in registers, and
 * while the rows go over one panel of weights, the next one is fetched from memory.
 *
 * Each number is one sum over the inputs, in their order, whatever rows come beside it and however
 * many threads work: a row's result doesn't depend on its neighbours, to the last bit.
 *
 * engine/packed_product.py calls this through ctypes; it has checked every shape and stride that is
 * relied on here. All arrays are float32 and contiguous.
 */
#include <stdint.h>
#include <string.h>

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
#define PANEL (2 * LANES)
#define MAX_TILE_ROWS 14

/* Inputs that are summed up at once: their weights stay in a core's nearest cache, and sums of sums
 * round less than one long sum. */
#define PART 256
/* Floats of input rows that stay in its second cache, and how few rows are worth reading all weights
 * for. */
#define CACHED_INPUTS (64 * 1024)
#define MIN_ROWS 56

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* One tile's sums over some inputs; they begin at `start` [PANEL], or are added to out if it is null.
 * The rows of x are `size` apart, the rows of out `width`. `next` and `next_step` say what to fetch
 * meanwhile, in bytes. */
INLINE void multiply_tile(int rows, const float *x, int64_t size, const float *weights,
                          int64_t length, const char *next, int64_t next_step,
                          const float *start, float *out, int64_t width)
{
    vector sums[MAX_TILE_ROWS][2], zero = {0};
    /* Every third row has a pointer; the two behind it are one and two sizes on. */
    const float *thirds[] = {x, x + 3 * size, x + 6 * size, x + 9 * size, x + 12 * size};
    UNROLL for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = zero;
    for (int64_t p = 0; p < length; p++) {
        vector left = *(const vector *)weights, right = *(const vector *)(weights + LANES);
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
        next += next_step;
        weights += PANEL;
        UNROLL for (int i = 0; i < rows; i++)
        {
            float number = thirds[i / 3][i % 3 * size];
            sums[i][0] += number * left;
            sums[i][1] += number * right;
        }
        UNROLL for (int i = 0; i < (rows + 2) / 3; i++) thirds[i]++;
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

/* The tile for each number of rows, which the compiler has to know. */
#define TILE(rows)                                                                                \
    static void tile_##rows(const float *x, int64_t size, const float *weights, int64_t length,   \
                            const char *next, int64_t next_step, const float *start, float *out,  \
                            int64_t width)                                                        \
    {                                                                                             \
        multiply_tile(rows, x, size, weights, length, next, next_step, start, out, width);        \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7)
TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)

typedef void (*tile)(const float *, int64_t, const float *, int64_t, const char *, int64_t,
                     const float *, float *, int64_t);
static const tile TILES[] = {0,      tile_1, tile_2,  tile_3,  tile_4,  tile_5,  tile_6, tile_7,
                             tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14};

/* All rows of one group over one panel; `columns` of it are there, the others are padding. */
static void multiply_panel(const float *x, int64_t rows, int64_t size, const float *panel,
                           const float *bias, float *out, int64_t columns, int64_t width)
{
    float start[PANEL] = {0}, padded[TILE_ROWS * PANEL];
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t next_step = PANEL * (int64_t)sizeof(float) / tiles;
    if (bias)
        memcpy(start, bias, columns * sizeof(float));
    for (int64_t part = 0; part < size; part += PART) {
        int64_t length = size - part < PART ? size - part : PART;
        const float *weights = panel + part * PANEL, *from = part ? 0 : start;
        const char *next = (const char *)(weights + length * PANEL);
        for (int64_t t = 0, row = 0; t < tiles; t++, next += next_step * length) {
            int64_t count = rows / tiles + (t < rows % tiles);
            const float *inputs = x + row * size + part;
            float *to = out + row * width;
            row += count;
            if (columns == PANEL) {
                TILES[count](inputs, size, weights, length, next, next_step, from, to, width);
                continue;
            }
            for (int64_t i = 0; i < count; i++)
                memcpy(padded + i * PANEL, to + i * width, columns * sizeof(float));
            TILES[count](inputs, size, weights, length, next, next_step, from, padded, PANEL);
            for (int64_t i = 0; i < count; i++)
                memcpy(to + i * width, padded + i * PANEL, columns * sizeof(float));
        }
    }
}

/* Columns of a panel. */
int64_t panel_width(void)
{
    return PANEL;
}

/* weight: [outputs, inputs] to packed: [panels, inputs, PANEL], with zeros beyond the outputs. */
void pack_panels(const float *weight, int64_t outputs, int64_t inputs, float *packed,
                 int num_threads)
{
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t first = 0; first < outputs; first += PANEL) {
        float *panel = packed + first * inputs;
        for (int64_t p = 0; p < inputs; p++)
            for (int64_t column = first; column < first + PANEL; column++)
                *panel++ = column < outputs ? weight[column * inputs + p] : 0.0f;
    }
}

/* x: [rows, inputs]; packed as above; bias: [outputs] or null; out: [rows, outputs]. */
void multiply(const float *x, int64_t rows, const float *packed, const float *bias, float *out,
              int64_t inputs, int64_t outputs, int num_threads)
{
    int64_t panels = (outputs + PANEL - 1) / PANEL;
    int64_t most = CACHED_INPUTS / inputs < MIN_ROWS ? MIN_ROWS : CACHED_INPUTS / inputs;
    int64_t groups = (rows + most - 1) / most, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    /* Rather smaller groups than threads without work. */
    int64_t wanted = num_threads > 1 ? (4 * num_threads + panels - 1) / panels : 1;
    wanted = wanted > tiles ? tiles : wanted;
    groups = groups < wanted ? wanted : groups;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < groups * panels; task++) {
        int64_t group = task / panels, panel = task % panels;
        int64_t row = rows * group / groups, end = rows * (group + 1) / groups;
        int64_t column = panel * PANEL;
        multiply_panel(x + row * inputs, end - row, inputs, packed + panel * PANEL * inputs,
                       bias ? bias + column : 0, out + row * outputs + column,
                       outputs - column < PANEL ? outputs - column : PANEL, outputs);
    }
}
