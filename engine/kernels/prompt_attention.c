/* Attention of several new tokens of a sequence over the KV pool: prompts and their chunks.
 *
 * Scores are made with keys as a tile's rows and queries as its columns, so that a softmax runs over
 * whole vectors of queries and neither keys nor values are laid out anew. It is softmax in two
 * passes: all scores of a panel of queries are kept. The queries of a KV head's group are rows of one
 * matrix, token by token.
 *
 * engine/attention/native.py compiles this once per machine and calls it through ctypes; it has
 * checked every shape, stride and bound that is relied on here. All arrays are float32; strides
 * and sizes count floats.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"
#include "tile.h"

/* The arguments of attend_prompts that every part of it needs. */
struct layer {
    const float *q;
    int64_t q_head, q_token;
    const float *k, *v;
    float *out;
    int64_t num_kv_heads, group, num_slots, key_size, value_size;
    float scale;
    int64_t window, chunk;
};

/* A sequence's new tokens: their first row and number, its first slot, and its tokens before them. */
struct segment {
    int64_t row, count, slot, past;
};

/* What a thread works in. */
struct scratch {
    float *queries; /* [D, PANEL] */
    float *scores;  /* [L, PANEL] */
    float *values;  /* [L, PANEL], those of a last panel that isn't full */
    float *out;     /* [PANEL, Dv rounded up to panels] */
};

static const float ZEROS[PANEL];

#define SCORE(rows)                                                                               \
    static void score_##rows(const float *keys, int64_t key_size, const float *queries, float *to) \
    {                                                                                             \
        struct inputs in = {keys, key_size, 1};                                                   \
        struct weights by = {queries, PANEL, 0, (const char *)queries, 0};                        \
        multiply_tile(rows, 0, in, by, key_size, ZEROS, to, PANEL);                               \
    }
EACH_TILE(SCORE)
#define SCORE_NAME(rows) score_##rows,
static void (*const SCORES[])(const float *, int64_t, const float *, float *) = {
    0, EACH_TILE(SCORE_NAME)};

#define SUM(rows)                                                                                 \
    static void sum_##rows(const float *weights, const float *values, int64_t row, int64_t length, \
                           float *to, int64_t width)                                              \
    {                                                                                             \
        struct inputs in = {weights, 1, PANEL};                                                   \
        struct weights by = {values, row, 0, (const char *)values, 0};                            \
        multiply_tile(rows, 0, in, by, length, ZEROS, to, width);                                 \
    }
EACH_TILE(SUM)
#define SUM_NAME(rows) sum_##rows,
static void (*const SUMS[])(const float *, const float *, int64_t, int64_t, float *, int64_t) = {
    0, EACH_TILE(SUM_NAME)};

static int64_t first_key(const struct layer *layer, int64_t position)
{
    if (layer->chunk)
        return position - position % layer->chunk;
    return layer->window && position >= layer->window ? position + 1 - layer->window : 0;
}

/* Scores to weights, in place, column by column; their inverse sums to `inverse` [PANEL]. */
static void weigh_columns(float *scores, int64_t length, float *inverse)
{
    float top[PANEL], sum[PANEL] = {0};
    memcpy(top, scores, sizeof top);
    for (int64_t j = 1; j < length; j++)
#pragma omp simd
        for (int i = 0; i < PANEL; i++)
            top[i] = scores[j * PANEL + i] > top[i] ? scores[j * PANEL + i] : top[i];
    for (int64_t j = 0; j < length; j++) {
        float *row = scores + j * PANEL;
#pragma omp simd
        for (int i = 0; i < PANEL; i++) {
            float weight = exponential(row[i] - top[i]);
            row[i] = row[i] == -INFINITY ? 0.0f : weight;
            sum[i] += row[i];
        }
    }
    for (int i = 0; i < PANEL; i++)
        inverse[i] = 1.0f / sum[i];
}

/* Some queries of one KV head, `first .. first + count` of the segment's tokens by group. */
static void attend_panel(const struct layer *layer, struct segment segment, int64_t head, int64_t first,
                         int64_t count, struct scratch scratch)
{
    int64_t group = layer->group, key_size = layer->key_size, value_size = layer->value_size;
    int64_t begin = first_key(layer, segment.past + first / group);
    int64_t length = segment.past + (first + count - 1) / group + 1 - begin;
    int64_t slot = head * layer->num_slots + segment.slot + begin;
    int64_t width = (value_size + PANEL - 1) / PANEL * PANEL;
    const float *keys = layer->k + slot * key_size, *values = layer->v + slot * value_size;
    float inverse[PANEL];

    for (int64_t i = 0; i < PANEL; i++) {
        int64_t row = first + (i < count ? i : 0);
        const float *q = layer->q + (segment.row + row / group) * layer->q_token +
                         (head * group + row % group) * layer->q_head;
        for (int64_t d = 0; d < key_size; d++)
            scratch.queries[d * PANEL + i] = layer->scale * q[d];
    }
    for (int64_t j = 0; j < length; j += TILE_ROWS)
        SCORES[length - j < TILE_ROWS ? length - j : TILE_ROWS](
            keys + j * key_size, key_size, scratch.queries, scratch.scores + j * PANEL);
    for (int64_t i = 0; i < count; i++) {
        int64_t position = segment.past + (first + i) / group;
        for (int64_t j = 0; j < first_key(layer, position) - begin; j++)
            scratch.scores[j * PANEL + i] = -INFINITY;
        for (int64_t j = position + 1 - begin; j < length; j++)
            scratch.scores[j * PANEL + i] = -INFINITY;
    }
    weigh_columns(scratch.scores, length, inverse);
    for (int64_t column = 0; column < value_size; column += PANEL) {
        const float *panel = values + column;
        int64_t row = value_size, there = value_size - column;
        if (there < PANEL) { /* a whole panel's numbers would reach beyond the pool */
            for (int64_t j = 0; j < length; j++)
                memcpy(scratch.values + j * PANEL, panel + j * row, there * sizeof(float));
            panel = scratch.values;
            row = PANEL;
        }
        for (int64_t i = 0, tiles = (count + TILE_ROWS - 1) / TILE_ROWS, t = 0; t < tiles; t++) {
            int64_t rows = count / tiles + (t < count % tiles);
            SUMS[rows](scratch.scores + i, panel, row, length,
                       scratch.out + i * width + column, width);
            i += rows;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t row = segment.row + (first + i) / group, of = head * group + (first + i) % group;
        float *to = layer->out + (row * layer->num_kv_heads * group + of) * value_size;
        for (int64_t d = 0; d < value_size; d++)
            to[d] = scratch.out[i * width + d] * inverse[i];
    }
}

/* q: [H, T, D] with strides q_head and q_token. k, v: [Hkv, S, D] and [Hkv, S, Dv], contiguous.
 * out: [T, H, Dv], contiguous. segments: [n, 4], as in `struct segment`. window, chunk: as in MaskRule.
 * longest: keys of any segment. Returns 0, or 1 when there is no memory to work in. */
int attend_prompts(const float *q, int64_t q_head, int64_t q_token, const float *k, const float *v,
                   float *out, int64_t num_kv_heads, int64_t group, int64_t num_slots,
                   int64_t key_size, int64_t value_size, float scale, int64_t window,
                   int64_t chunk, const int64_t *segments, int64_t num_segments, int64_t longest,
                   int num_threads)
{
    struct layer layer = {q,         q_head,   q_token,    k,     v,      out,  num_kv_heads, group,
                          num_slots, key_size, value_size, scale, window, chunk};
    int64_t columns = key_size + 2 * longest + value_size + PANEL;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        float *memory = malloc(columns * PANEL * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        struct scratch scratch = {memory, memory + key_size * PANEL,
                                  memory + (key_size + longest) * PANEL,
                                  memory + (key_size + 2 * longest) * PANEL};
        /* What lies beyond the values isn't used, but denormal numbers would cost time. */
        if (memory && value_size % PANEL)
            memset(scratch.values, 0, longest * PANEL * sizeof(float));
        for (int64_t s = 0; s < num_segments; s++) {
            struct segment segment = {segments[4 * s], segments[4 * s + 1], segments[4 * s + 2], segments[4 * s + 3]};
            int64_t queries = segment.count * group, panels = (queries + PANEL - 1) / PANEL;
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < panels * num_kv_heads; task++) {
                /* The last queries, which see most keys, first. */
                int64_t first = (panels - 1 - task / num_kv_heads) * PANEL;
                int64_t count = queries - first < PANEL ? queries - first : PANEL;
                if (memory)
                    attend_panel(&layer, segment, task % num_kv_heads, first, count, scratch);
            }
        }
        free(memory);
    }
    return failed;
}
