/* Product of activations and a linear layer's weights, which are laid out in panels once.
 *
 * It is made for few rows: while they go over one panel of weights, the next one is fetched from
 * memory. A row's numbers are the same to the last bit whatever rows come beside it and however
 * many threads work.
 *
 * engine/kernels/panel_product.py calls this through ctypes; it has checked every shape and stride that is
 * relied on here. All arrays are contiguous, and float32 but for weights quantized to int8.
 */
#include <stdint.h>
#include <string.h>

#include "tile.h"

/* Inputs that are summed up at once: their weights stay in a core's nearest cache, and sums of sums
 * round less than one long sum. */
#define PART 256
/* Floats of input rows that stay in its second cache, and how few rows are worth reading all weights
 * for. */
#define CACHED_INPUTS (64 * 1024)
#define MIN_ROWS 56

/* The tile for each number of rows, which the compiler has to know. Plain arguments: structures, which
 * go over the stack, took a tenth off the speed. */
#define TILE(kind, is_int8, rows)                                                                 \
    static void kind##_tile_##rows(const float *x, int64_t size, const void *weights,             \
                                   const float *scales, int64_t length, const char *next,         \
                                   int64_t next_step, const float *start, float *out,             \
                                   int64_t width)                                                 \
    {                                                                                             \
        struct inputs in = {x, size, 1};                                                          \
        struct weights by = {weights, PANEL, scales, next, next_step};                            \
        multiply_tile(rows, is_int8, in, by, length, start, out, width);                          \
    }
#define FLOAT_TILE(rows) TILE(float, 0, rows)
#define INT8_TILE(rows) TILE(int8, 1, rows)
EACH_TILE(FLOAT_TILE)
EACH_TILE(INT8_TILE)
#define FLOAT_NAME(rows) float_tile_##rows,
#define INT8_NAME(rows) int8_tile_##rows,
typedef void (*tile)(const float *, int64_t, const void *, const float *, int64_t, const char *,
                     int64_t, const float *, float *, int64_t);
static const tile TILES[2][MAX_TILE_ROWS + 1] = {{0, EACH_TILE(FLOAT_NAME)},
                                                 {0, EACH_TILE(INT8_NAME)}};

/* A part of a panel of int8 numbers as float32 ones. */
static void expand(const int8_t *numbers, const float *scales, int64_t length, float *out)
{
    for (int64_t at = 0; at < length * PANEL; at += LANES)
        *(vector *)(out + at) = *(const vector *)(scales + at % PANEL) * from_int8(numbers + at);
}

/* All rows of one group over one panel, which has scales if its numbers are int8; `columns` of it are
 * there, the others are padding. */
static void multiply_panel(const float *x, int64_t rows, int64_t size, const char *panel,
                           const float *scales, const float *bias, float *out, int64_t columns,
                           int64_t width)
{
    float start[PANEL] = {0}, scale[PANEL] = {0}, padded[TILE_ROWS * PANEL];
    float expanded[PART * PANEL];
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t step = PANEL * (int64_t)(scales ? sizeof(int8_t) : sizeof(float));
    /* Several tiles read numbers that were expanded once, a single one expands them itself. */
    int expands = scales && tiles > 1;
    if (bias)
        memcpy(start, bias, columns * sizeof(float));
    if (scales)
        memcpy(scale, scales, columns * sizeof(float));
    for (int64_t part = 0; part < size; part += PART) {
        int64_t length = size - part < PART ? size - part : PART;
        const void *weights = panel + part * step;
        const float *from = part ? 0 : start;
        const char *next = panel + (part + length) * step;
        int64_t next_step = step / tiles;
        if (expands) {
            expand(weights, scale, length, expanded);
            weights = expanded;
        }
        for (int64_t t = 0, row = 0; t < tiles; t++, next += next_step * length) {
            int64_t count = rows / tiles + (t < rows % tiles);
            tile multiply = TILES[scales && !expands][count];
            const float *inputs = x + row * size + part;
            float *to = out + row * width;
            row += count;
            if (columns == PANEL) {
                multiply(inputs, size, weights, scale, length, next, next_step, from, to, width);
                continue;
            }
            for (int64_t i = 0; i < count; i++)
                memcpy(padded + i * PANEL, to + i * width, columns * sizeof(float));
            multiply(inputs, size, weights, scale, length, next, next_step, from, padded, PANEL);
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

/* weight: [outputs, inputs] to panels: [number of them, inputs, PANEL], with zeros beyond the outputs. */
#define LAY_OUT(name, number)                                                                        \
    void name(const number *weight, int64_t outputs, int64_t inputs, number *panels,              \
              int num_threads)                                                                    \
    {                                                                                             \
        _Pragma("omp parallel for num_threads(num_threads) if (num_threads > 1)")                 \
        for (int64_t first = 0; first < outputs; first += PANEL) {                                \
            number *panel = panels + first * inputs;                                              \
            for (int64_t p = 0; p < inputs; p++)                                                  \
                for (int64_t column = first; column < first + PANEL; column++)                    \
                    *panel++ = column < outputs ? weight[column * inputs + p] : 0;                \
        }                                                                                         \
    }
LAY_OUT(make_panels, float)
LAY_OUT(make_int8_panels, int8_t)

/* x: [rows, inputs]; panels as above; scales: [outputs] if they hold int8 numbers, else null; bias:
 * [outputs] or null; out: [rows, outputs]. */
void multiply(const float *x, int64_t rows, const char *panels, const float *scales,
              const float *bias, float *out, int64_t inputs, int64_t outputs, int num_threads)
{
    int64_t step = inputs * (int64_t)(scales ? sizeof(int8_t) : sizeof(float));
    int64_t num_panels = (outputs + PANEL - 1) / PANEL;
    int64_t most = CACHED_INPUTS / inputs < MIN_ROWS ? MIN_ROWS : CACHED_INPUTS / inputs;
    int64_t groups = (rows + most - 1) / most, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    /* Rather smaller groups than threads without work. */
    int64_t wanted = num_threads > 1 ? (4 * num_threads + num_panels - 1) / num_panels : 1;
    wanted = wanted > tiles ? tiles : wanted;
    groups = groups < wanted ? wanted : groups;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < groups * num_panels; task++) {
        int64_t group = task / num_panels, panel = task % num_panels;
        int64_t row = rows * group / groups, end = rows * (group + 1) / groups;
        int64_t column = panel * PANEL;
        multiply_panel(x + row * inputs, end - row, inputs, panels + column * step,
                       scales ? scales + column : 0, bias ? bias + column : 0,
                       out + row * outputs + column,
                       outputs - column < PANEL ? outputs - column : PANEL, outputs);
    }
}
