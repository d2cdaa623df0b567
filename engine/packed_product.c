/* Product of activations and a linear layer's weights, which are laid out in panels once.
 *
 * It is made for few rows: while they go over one panel of weights, the next one is fetched from
 * memory. A row's numbers are the same to the last bit whatever rows come beside it and however
 * many threads work.
 *
 * engine/packed_product.py calls this through ctypes; it has checked every shape and stride that is
 * relied on here. All arrays are float32 and contiguous.
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
#define TILE(rows)                                                                                \
    static void tile_##rows(const float *x, int64_t size, const float *weights, int64_t length,   \
                            const char *next, int64_t next_step, const float *start, float *out,  \
                            int64_t width)                                                        \
    {                                                                                             \
        struct inputs in = {x, size, 1};                                                          \
        struct weights by = {weights, PANEL, next, next_step};                                    \
        multiply_tile(rows, in, by, length, start, out, width);                                   \
    }
EACH_TILE(TILE)
#define NAME(rows) tile_##rows,
typedef void (*tile)(const float *, int64_t, const float *, int64_t, const char *, int64_t,
                     const float *, float *, int64_t);
static const tile TILES[] = {0, EACH_TILE(NAME)};

/* All rows of one group over one panel; `columns` of it are there, the others are padding. */
static void multiply_panel(const float *x, int64_t rows, int64_t size, const float *panel,
                           const float *bias, float *out, int64_t columns, int64_t width)
{
    float start[PANEL] = {0}, padded[TILE_ROWS * PANEL];
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    if (bias)
        memcpy(start, bias, columns * sizeof(float));
    for (int64_t part = 0; part < size; part += PART) {
        int64_t length = size - part < PART ? size - part : PART;
        const float *weights = panel + part * PANEL, *from = part ? 0 : start;
        const char *next = (const char *)(weights + length * PANEL);
        int64_t next_step = PANEL * (int64_t)sizeof(float) / tiles;
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
