/* The engine's kernels on a CPU. `library.py` compiles and calls them, for float32 tensors, or with BFLOAT16 defined
   for bfloat16 tensors. Both compute in float32.

   Vector extensions of GCC and Clang make one source serve every instruction set. A vector is as wide as the machine's
   registers, and the accumulators of one tile fill them. */

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 3, ROWS = 8 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS = 3, ROWS = 8 };
#else
enum { LANES = 8, VECTORS = 2, ROWS = 6 };
#endif
enum {
    PANEL = LANES * VECTORS, /* outputs of a linear that are computed together */
    DEPTH = 192,             /* inputs after which a few rows' next tile starts, so that weights stay in L1 */
    DEPTH_OF_MANY = 768,     /* the same for many rows; larger, since their sums are written after each part */
    AHEAD = 2048,            /* distance, in weights, of the prefetch from memory to L2 */
    CHUNK_VALUES = 1 << 18,  /* inputs of the rows that are computed with one panel; 1 MB, which fits L2 */
    MAX_CHUNK_ROWS = 480,
    MAX_KEYS = 512,          /* keys whose softmax weights are held at a time */
    KEYS_AHEAD = 16,         /* distance, in keys, of the prefetch */
    COLUMNS = 2 * LANES,     /* of the values that are summed together */
    GROUP = 64,              /* ids whose maximum, or sum of weights, is computed first */
    MAX_CANDIDATES = 512,    /* most likely ids that are kept sorted */
    DIGIT_BITS = 10,         /* digits of a weight's bits, for the radix select of `least_kept` */
    DIGITS = 1 << DIGIT_BITS,
    FEW_VALUES = 1 << 16, /* up to so many values one thread is faster than starting two */
    NOT_FINITE = -1,
    UNDECIDED = -2
};

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

int32_t kraken_panel(void) { return PANEL; }

INLINE vec load(const float *from) { return *(const vec *)from; }

/* stored: the type of a tensor's values.
   word: 32 bits of a tensor that a linear multiplies at a time; passed around as one float32. */
#ifdef BFLOAT16

typedef uint16_t stored;
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vec load_stored(const stored *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, uvec) << 16);
}

INLINE float widen(stored value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE stored narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, not_a_number = bits >> 16 | 0x40;
    return (stored)((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
}

/* sums + the products of two bfloat16 of x with two of each lane of w */
INLINE vec add_products(vec sums, float x, vec w) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uvec pair = (uvec){0} + bits;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pair, (__m512bh)w);
#else
    sums += (vec)(pair << 16) * (vec)((uvec)w << 16);
    return sums + (vec)(pair & 0xffff0000u) * (vec)((uvec)w & 0xffff0000u);
#endif
}

#else

typedef float stored;

INLINE vec load_stored(const stored *from) { return load(from); }

INLINE float widen(stored value) { return value; }

INLINE stored narrow(float value) { return value; }

INLINE vec add_products(vec sums, float x, vec w) { return sums + x * w; }

#endif

enum { LINE = 64 / sizeof(stored) };

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* e to the x, to 2 units in the last place; NaN stays NaN. */
INLINE vec exponential(vec x) {
    x = choose(x < -87.0f, (vec){0} - 87.0f, x);
    x = choose(x > 88.0f, (vec){0} + 88.0f, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* the exponent of two is in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)(((ivec)shifted << 23) + 0x3f800000);
}

/* The tanh form: x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec gelu(vec x) { return x / (1.0f + exponential(-1.5957691f * (x + 0.044715f * x * x * x))); }

INLINE float sum_of(vec x) {
    float part[LANES] __attribute__((aligned(64)));
    *(vec *)part = x;
#pragma GCC unroll 4
    for (int width = LANES / 2; width >= 4; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return (part[0] + part[2]) + (part[1] + part[3]);
}

/* sums[rows, width] (+)= x[rows, depth] w[depth, width]. The width is a number of vectors, which hold words or float32.
   `ahead` is AHEAD, or 0 for no prefetch. */
INLINE void tile(const float *x, int64_t row_stride, int64_t column_stride, const float *w, int64_t depth, int rows,
                 int vectors, int is_words, int ahead, float *sums, int is_first) {
    vec a[ROWS][VECTORS];
    const int width = vectors * LANES;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) a[r][v] = is_first ? (vec){0} : load(sums + r * width + v * LANES);
    for (int64_t k = 0; k < depth; k++, w += width) {
        vec b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) b[v] = load(w + v * LANES);
        if (ahead)
#pragma GCC unroll 4
            for (int i = 0; i < width; i += 16) __builtin_prefetch(w + ahead + i, 0, 2); /* a line of memory */
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float value = x[r * row_stride + k * column_stride];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                if (is_words)
                    a[r][v] = add_products(a[r][v], value, b[v]);
                else
                    a[r][v] += value * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(vec *)(sums + r * width + v * LANES) = a[r][v];
}

static void tile_of_few(const float *x, int64_t row_stride, const float *w, int64_t depth, int rows, float *sums,
                        int is_first) {
    switch (rows) {
        case 1: tile(x, row_stride, 1, w, depth, 1, VECTORS, 1, AHEAD, sums, is_first); break;
        case 2: tile(x, row_stride, 1, w, depth, 2, VECTORS, 1, AHEAD, sums, is_first); break;
        case 3: tile(x, row_stride, 1, w, depth, 3, VECTORS, 1, AHEAD, sums, is_first); break;
        case 4: tile(x, row_stride, 1, w, depth, 4, VECTORS, 1, AHEAD, sums, is_first); break;
        case 5: tile(x, row_stride, 1, w, depth, 5, VECTORS, 1, AHEAD, sums, is_first); break;
        case 6: tile(x, row_stride, 1, w, depth, 6, VECTORS, 1, AHEAD, sums, is_first); break;
#if !defined(__x86_64__) || defined(__AVX512F__)
        case 7: tile(x, row_stride, 1, w, depth, 7, VECTORS, 1, AHEAD, sums, is_first); break;
        case 8: tile(x, row_stride, 1, w, depth, 8, VECTORS, 1, AHEAD, sums, is_first); break;
#endif
    }
}

/* Rearrange rows into tiles of ROWS, column by column. The last row is repeated to fill the last tile. */
static void arrange(const float *x, int64_t num_rows, int64_t num_inputs, float *to) {
    for (int64_t m = 0; m < num_rows; m += ROWS, to += ROWS * num_inputs)
        for (int r = 0; r < ROWS; r++) {
            const float *from = x + (m + r < num_rows ? m + r : num_rows - 1) * num_inputs;
            for (int64_t k = 0; k < num_inputs; k++) to[k * ROWS + r] = from[k];
        }
}

static void finish(const float *sums, const float *bias, void *y, int64_t first, int64_t num_outputs, int is_wide,
                   int applies_gelu) {
    float whole[PANEL] __attribute__((aligned(64)));
    stored narrowed[PANEL];
    memcpy(whole, sums, sizeof whole);
    if (bias)
        for (int64_t i = 0; i < num_outputs; i++) whole[i] += bias[i];
    if (applies_gelu)
        for (int v = 0; v < VECTORS; v++) *(vec *)(whole + v * LANES) = gelu(load(whole + v * LANES));
    for (int i = 0; i < PANEL; i++) narrowed[i] = narrow(whole[i]);
    if (is_wide)
        memcpy((float *)y + first, whole, num_outputs * sizeof(float));
    else
        memcpy((stored *)y + first, narrowed, num_outputs * sizeof(stored));
}

/* y[W, T, O] = x[W, T, I] W^T + bias of every way, then GELU if `applies_gelu`. x and w are words, and I counts words;
   `w` is [ways, panels, I, PANEL] with zeros past O; `bias`, [W, O], may be null; y is float32 if `is_wide`. One
   parallel region computes all ways, since starting one takes time. Returns 0, or 1 if there is no memory. */
int32_t kraken_linear(const float *x, const float *w, const float *bias, void *y, int64_t num_ways, int64_t num_rows,
                      int64_t num_inputs, int64_t num_outputs, int32_t is_wide, int32_t applies_gelu,
                      int32_t num_threads) {
    int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    int64_t chunk = CHUNK_VALUES / num_inputs < MAX_CHUNK_ROWS ? CHUNK_VALUES / num_inputs : MAX_CHUNK_ROWS;
    chunk = chunk < ROWS ? ROWS : chunk / ROWS * ROWS;
    if (chunk > num_rows) chunk = (num_rows + ROWS - 1) / ROWS * ROWS;
    int64_t num_chunks = (num_rows + chunk - 1) / chunk;
    int is_arranged = num_rows > 2 * ROWS; /* pays only if many panels read it */
    int64_t step = is_arranged ? DEPTH_OF_MANY : DEPTH;
    int32_t failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *sums = aligned_alloc(64, chunk * PANEL * sizeof(float));
        float *arranged = is_arranged ? malloc(chunk * num_inputs * sizeof(float)) : NULL;
        int64_t held = -1;
        if (!sums || (is_arranged && !arranged))
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_ways * num_chunks * num_panels; task++) {
            if (!sums || (is_arranged && !arranged)) continue;
            int64_t part = task / num_panels, panel = task % num_panels;
            int64_t way = part / num_chunks, begin = part % num_chunks * chunk, first = way * num_rows + begin;
            int64_t rows = num_rows - begin < chunk ? num_rows - begin : chunk;
            if (is_arranged && held != part) {
                arrange(x + first * num_inputs, rows, num_inputs, arranged);
                held = part;
            }
            for (int64_t k = 0; k < num_inputs; k += step) {
                int64_t depth = num_inputs - k < step ? num_inputs - k : step;
                const float *weights = w + ((way * num_panels + panel) * num_inputs + k) * PANEL;
                for (int64_t m = 0; m < rows; m += ROWS) {
                    float *to = sums + m * PANEL;
                    if (is_arranged)
                        tile(arranged + m * num_inputs + k * ROWS, 1, ROWS, weights, depth, ROWS, VECTORS, 1, AHEAD,
                             to, k == 0);
                    else
                        tile_of_few(x + (first + m) * num_inputs + k, num_inputs, weights, depth,
                                    rows - m < ROWS ? rows - m : ROWS, to, k == 0);
                }
            }
            int64_t start = panel * PANEL, width = num_outputs - start < PANEL ? num_outputs - start : PANEL;
            for (int64_t m = 0; m < rows; m++)
                finish(sums + m * PANEL, bias ? bias + way * num_outputs + start : NULL, y,
                       (first + m) * num_outputs + start, width, is_wide, applies_gelu);
        }
        free(sums);
        free(arranged);
    }
    return failed;
}

static float mean_of(const float *x, int64_t size) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(x + i);
    float total = sum_of(sum);
    for (; i < size; i++) total += x[i];
    return total / size;
}

static float variance_of(const float *x, int64_t size, float mean) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += (load(x + i) - mean) * (load(x + i) - mean);
    float total = sum_of(sum);
    for (; i < size; i++) total += (x[i] - mean) * (x[i] - mean);
    return total / size;
}

/* Residual add and norm: a[W, T, D] = x + addend, and unless `normed` is null its LayerNorm. If `adds_ways`, the LayerNorm
   is of a + S - x, S being the sum of x over all ways: `part`[T, D] if `is_total`, else the sum of this rank's ways and
   of `part`, which may be null. `bias`[W, D] may be null. */
void kraken_add_norm(const stored *restrict x, const stored *restrict addend, const stored *restrict part,
                     const stored *restrict gain, const stored *restrict bias, stored *restrict a,
                     stored *restrict normed, int64_t num_ways, int64_t num_tokens, int64_t width, float epsilon,
                     int32_t adds_ways, int32_t is_total, int32_t num_threads) {
    int has_own = adds_ways && (num_ways > 1 || is_total); /* else S - x is the part itself */
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_ways * num_tokens * width > FEW_VALUES)
    for (int64_t t = 0; t < num_tokens; t++) {
        float total[width], summed[width];
        for (int64_t i = 0; i < width; i++) total[i] = adds_ways && part ? widen(part[t * width + i]) : 0.0f;
        for (int64_t w = 0; w < num_ways && has_own && !is_total; w++)
            for (int64_t i = 0; i < width; i++) total[i] += widen(x[(w * num_tokens + t) * width + i]);
        for (int64_t w = 0; w < num_ways; w++) {
            int64_t row = (w * num_tokens + t) * width;
            for (int64_t i = 0; i < width; i++) a[row + i] = narrow(widen(x[row + i]) + widen(addend[row + i]));
            if (!normed) continue;
            for (int64_t i = 0; i < width; i++)
                summed[i] = widen(a[row + i]) + (total[i] - (has_own ? widen(x[row + i]) : 0.0f));
            float mean = mean_of(summed, width), scale = 1.0f / sqrtf(variance_of(summed, width, mean) + epsilon);
            for (int64_t i = 0; i < width; i++) {
                float value = (summed[i] - mean) * scale * widen(gain[w * width + i]);
                normed[row + i] = narrow(bias ? value + widen(bias[w * width + i]) : value);
            }
        }
    }
}

/* keys[N, S, H] and values at slot slots[t] become k[t] and v[t]. */
void kraken_store(const stored *k, const stored *v, int64_t token_stride, int64_t head_stride, stored *keys,
                  stored *values, int64_t num_slots, const int64_t *slots, int64_t num_tokens, int64_t num_heads,
                  int64_t head_size) {
    for (int64_t n = 0; n < num_heads; n++)
        for (int64_t t = 0; t < num_tokens; t++) {
            int64_t from = t * token_stride + n * head_stride, to = (n * num_slots + slots[t]) * head_size;
            memcpy(keys + to, k + from, head_size * sizeof(stored));
            memcpy(values + to, v + from, head_size * sizeof(stored));
        }
}

INLINE float dot(const float *a, const stored *b, int64_t size) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(a + i) * load_stored(b + i);
    float total = sum_of(sum);
    for (; i < size; i++) total += a[i] * widen(b[i]);
    return total;
}

/* out[i] += sum over j of weights[j] values[j, i] */
INLINE void weigh(const float *weights, const stored *values, int64_t num_keys, int64_t size, float *out) {
    enum { WIDTH = 4 * LANES };
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        vec sums[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sums[v] = load(out + i + v * LANES);
        for (int64_t j = 0; j < num_keys; j++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) sums[v] += weights[j] * load_stored(values + j * size + i + v * LANES);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) *(vec *)(out + i + v * LANES) = sums[v];
    }
    for (; i + LANES <= size; i += LANES) {
        vec sum = load(out + i);
        for (int64_t j = 0; j < num_keys; j++) sum += weights[j] * load_stored(values + j * size + i);
        *(vec *)(out + i) = sum;
    }
    for (; i < size; i++)
        for (int64_t j = 0; j < num_keys; j++) out[i] += weights[j] * widen(values[j * size + i]);
}

/* Attention of one head of one token over `length` keys in blocks: out[H]. */
static void attend_one(const stored *q, const stored *keys, const stored *values, const int32_t *blocks, int64_t length,
                       int64_t tokens_per_block, int64_t head_size, float scale, stored *out) {
    float weights[MAX_KEYS + LANES] __attribute__((aligned(64)));
    float highest = -INFINITY, total = 0.0f, query[head_size], sums[head_size];
    for (int64_t i = 0; i < head_size; i++) query[i] = widen(q[i]), sums[i] = 0.0f;
    for (int64_t begin = 0; begin < length; begin += MAX_KEYS) {
        int64_t end = length - begin < MAX_KEYS ? length : begin + MAX_KEYS, num_keys = end - begin;
        float chunk_highest = highest;
        for (int64_t j = begin, run; j < end; j += run) {
            int64_t offset = j % tokens_per_block;
            run = tokens_per_block - offset < end - j ? tokens_per_block - offset : end - j;
            const stored *from = keys + (blocks[j / tokens_per_block] * tokens_per_block + offset) * head_size;
            const stored *later = values + (from - keys); /* prefetched now and read after all keys */
            for (int64_t i = 0; i < run; i++) {
                for (int64_t c = 0; c < head_size; c += LINE) {
                    __builtin_prefetch(from + (i + KEYS_AHEAD) * head_size + c, 0, 2);
                    __builtin_prefetch(later + i * head_size + c, 0, 2);
                }
                float score = scale * dot(query, from + i * head_size, head_size);
                weights[j - begin + i] = score;
                chunk_highest = score > chunk_highest ? score : chunk_highest;
            }
        }
        if (begin > 0 && chunk_highest > highest) {
            float shrink = expf(highest - chunk_highest);
            total *= shrink;
            for (int64_t i = 0; i < head_size; i++) sums[i] *= shrink;
        }
        highest = chunk_highest;
        for (int64_t j = num_keys; j < num_keys + LANES; j++) weights[j] = -INFINITY;
        for (int64_t j = 0; j < num_keys; j += LANES) *(vec *)(weights + j) = exponential(load(weights + j) - highest);
        for (int64_t j = 0; j < num_keys; j++) total += weights[j];
        for (int64_t j = begin, run; j < end; j += run) {
            int64_t offset = j % tokens_per_block;
            run = tokens_per_block - offset < end - j ? tokens_per_block - offset : end - j;
            const stored *from = values + (blocks[j / tokens_per_block] * tokens_per_block + offset) * head_size;
            weigh(weights + (j - begin), from, run, head_size, sums);
        }
    }
    for (int64_t i = 0; i < head_size; i++) out[i] = narrow(sums[i] / total);
}

/* Attention of one token of each of B sequences, whose key and value are stored already. `rows` are the tokens' rows in
   q and out, `tables` is [B, num_blocks]. */
void kraken_attend(const stored *q, int64_t token_stride, int64_t head_stride, const stored *keys, const stored *values,
                   int64_t num_slots, const int64_t *rows, const int32_t *tables, const int64_t *lengths,
                   int64_t num_blocks, int64_t tokens_per_block, int64_t num_sequences, int64_t num_heads,
                   int64_t head_size, float scale, stored *out, int32_t num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t task = 0; task < num_sequences * num_heads; task++) {
        int64_t b = task / num_heads, n = task % num_heads;
        const int64_t head = n * num_slots * head_size;
        attend_one(q + rows[b] * token_stride + n * head_stride, keys + head, values + head, tables + b * num_blocks,
                   lengths[b], tokens_per_block, head_size, scale, out + (rows[b] * num_heads + n) * head_size);
    }
}

static float *floats(int64_t num) { return aligned_alloc(64, (num + 15) / 16 * 64); }

/* One head's keys as [panels, H, PANEL] and values as [column panels, panels * PANEL, COLUMNS], zeros past the end. */
static void pack(const stored *keys, const stored *values, const int32_t *blocks, int64_t num_keys,
                 int64_t tokens_per_block, int64_t head_size, float *packed_keys, float *packed_values) {
    int64_t padded = (num_keys + PANEL - 1) / PANEL * PANEL;
    for (int64_t j = 0; j < padded; j++) {
        int64_t slot = j < num_keys ? blocks[j / tokens_per_block] * tokens_per_block + j % tokens_per_block : 0;
        const stored *key = keys + slot * head_size, *value = values + slot * head_size;
        float *to = packed_keys + j / PANEL * PANEL * head_size + j % PANEL;
        for (int64_t i = 0; i < head_size; i++) to[i * PANEL] = j < num_keys ? widen(key[i]) : 0.0f;
        for (int64_t i = 0; i < head_size; i += COLUMNS) {
            int64_t width = head_size - i < COLUMNS ? head_size - i : COLUMNS;
            to = packed_values + i * padded + j * COLUMNS;
            memset(to, 0, COLUMNS * sizeof(float));
            for (int64_t c = 0; c < width && j < num_keys; c++) to[c] = widen(value[i + c]);
        }
    }
}

/* Replace one row's scores (PANEL of every ROWS * PANEL values) by unnormalised softmax weights; returns their sum. */
static float softmax(float *scores, int64_t num_panels, int64_t num_seen, float scale) {
    vec highest = {0}, sum = {0};
    highest -= INFINITY;
    for (int64_t p = 0; p < num_panels; p++) {
        float *part = scores + p * ROWS * PANEL;
        for (int64_t j = num_seen - p * PANEL > 0 ? num_seen - p * PANEL : 0; j < PANEL; j++) part[j] = -INFINITY;
        for (int64_t j = 0; j < PANEL; j += LANES) highest = choose(load(part + j) > highest, load(part + j), highest);
    }
    float most = highest[0];
    for (int lane = 1; lane < LANES; lane++) most = highest[lane] > most ? highest[lane] : most;
    for (int64_t p = 0; p < num_panels; p++) {
        float *part = scores + p * ROWS * PANEL;
        for (int64_t j = 0; j < PANEL; j += LANES) {
            vec x = load(part + j), weight = exponential((x - most) * scale);
            weight = choose(x == -INFINITY, (vec){0}, weight);
            *(vec *)(part + j) = weight;
            sum += weight;
        }
    }
    return sum_of(sum);
}

/* Causal attention of neighbouring tokens of one sequence, whose keys and values are stored already: out[T, N, H].
   Returns 0, or 1 if there is no memory. */
int32_t kraken_attend_prompt_chunk(const stored *q, int64_t token_stride, int64_t head_stride, const stored *keys,
                           const stored *values, int64_t num_slots, const int32_t *blocks, int64_t tokens_per_block,
                           int64_t start, int64_t num_tokens, int64_t num_heads, int64_t head_size, float scale,
                           stored *out, int32_t num_threads) {
    int64_t num_keys = start + num_tokens, num_panels = (num_keys + PANEL - 1) / PANEL, padded = num_panels * PANEL;
    int64_t columns = (head_size + COLUMNS - 1) / COLUMNS * COLUMNS;
    int64_t num_tiles = (num_tokens + ROWS - 1) / ROWS;
    /* one thread per head, unless that would leave threads without work */
    int64_t num_shares = num_heads % num_threads ? (4 * num_threads + num_heads - 1) / num_heads : 1;
    int32_t failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *packed_keys = floats(padded * head_size), *packed_values = floats(padded * columns);
        float *scores = floats(padded * ROWS), *queries = floats(ROWS * head_size);
        float sums[ROWS * COLUMNS] __attribute__((aligned(64)));
        int has_memory = packed_keys && packed_values && scores && queries;
        if (!has_memory)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_heads * num_shares; task++) {
            if (!has_memory) continue;
            int64_t n = task / num_shares, head = n * num_slots * head_size;
            pack(keys + head, values + head, blocks, num_keys, tokens_per_block, head_size, packed_keys, packed_values);
            for (int64_t m = task % num_shares; m < num_tiles; m += num_shares) {
                int64_t first = m * ROWS, rows = num_tokens - first < ROWS ? num_tokens - first : ROWS;
                int64_t seen_panels = (start + first + rows + PANEL - 1) / PANEL;
                float totals[ROWS];
                for (int64_t r = 0; r < ROWS; r++) { /* the last row is repeated to fill the tile */
                    const stored *from = q + (first + (r < rows ? r : rows - 1)) * token_stride + n * head_stride;
                    for (int64_t i = 0; i < head_size; i++) queries[r * head_size + i] = widen(from[i]);
                }
                for (int64_t p = 0; p < seen_panels; p++)
                    tile(queries, head_size, 1, packed_keys + p * PANEL * head_size, head_size, ROWS, VECTORS, 0, 0,
                         scores + p * ROWS * PANEL, 1);
                for (int64_t r = 0; r < ROWS; r++)
                    totals[r] = softmax(scores + r * PANEL, seen_panels,
                                        start + first + (r < rows ? r : rows - 1) + 1, scale);
                for (int64_t i = 0; i < head_size; i += COLUMNS) {
                    for (int64_t p = 0; p < seen_panels; p++)
                        tile(scores + p * ROWS * PANEL, PANEL, 1, packed_values + i * padded + p * PANEL * COLUMNS,
                             PANEL, ROWS, 2, 0, 0, sums, p == 0);
                    int64_t width = head_size - i < COLUMNS ? head_size - i : COLUMNS;
                    for (int64_t r = 0; r < rows; r++) {
                        stored *to = out + ((first + r) * num_heads + n) * head_size + i;
                        for (int64_t c = 0; c < width; c++) to[c] = narrow(sums[r * COLUMNS + c] / totals[r]);
                    }
                }
            }
        }
        free(packed_keys);
        free(packed_values);
        free(scores);
        free(queries);
    }
    return failed;
}

typedef struct {
    float logit;
    int64_t id;
} candidate;

/* Insert into a list of at most `most`, sorted by descending logit; equal logits keep their order. */
static int64_t insert(candidate *best, int64_t num, int64_t most, float logit, int64_t id) {
    if (num == most && !(logit > best[num - 1].logit)) return num;
    int64_t i = num < most ? num++ : num - 1;
    for (; i > 0 && logit > best[i - 1].logit; i--) best[i] = best[i - 1];
    best[i] = (candidate){logit, id};
    return num;
}

/* The largest logit of every GROUP ids. Returns 0 if a logit is NaN. */
static int maxima_of(const float *logits, int64_t num_ids, float *maxima) {
    ivec is_odd = {0};
    int has_odd = 0;
    int64_t begin = 0;
    for (; begin + GROUP <= num_ids; begin += GROUP) {
        vec highest = load(logits + begin);
        is_odd |= highest != highest;
        for (int64_t i = LANES; i < GROUP; i += LANES) {
            vec x = load(logits + begin + i);
            is_odd |= x != x;
            highest = choose(x > highest, x, highest);
        }
        float most = highest[0];
        for (int lane = 1; lane < LANES; lane++) most = highest[lane] > most ? highest[lane] : most;
        maxima[begin / GROUP] = most;
    }
    for (int lane = 0; lane < LANES; lane++) has_odd |= is_odd[lane] != 0;
    if (begin < num_ids) maxima[begin / GROUP] = -INFINITY;
    for (int64_t i = begin; i < num_ids; i++) {
        has_odd |= logits[i] != logits[i];
        if (logits[i] > maxima[begin / GROUP]) maxima[begin / GROUP] = logits[i];
    }
    return !has_odd;
}

/* Sample one of the top_k < MAX_CANDIDATES most likely ids; top_k 0 returns the most likely one. */
static int64_t sample_few(const float *logits, int64_t num_ids, const float *maxima, int64_t top_k, float temperature,
                          double uniform) {
    candidate best[MAX_CANDIDATES] = {{0}}, other;
    int64_t num_groups = (num_ids + GROUP - 1) / GROUP, num = 0;
    int64_t most = top_k == 0 ? 1 : top_k < num_ids ? top_k + 1 : num_ids, kept = top_k < num_ids ? top_k : num_ids;
    for (int64_t g = 0; g < num_groups; g++) num = insert(best, num, most, maxima[g], g);
    /* the maxima of `most` groups are at least this large, so that smaller logits are not among the most likely */
    float least = num < most ? -INFINITY : best[most - 1].logit;
    if (!isfinite(best[0].logit)) return NOT_FINITE;
    num = 0;
    for (int64_t g = 0; g < num_groups; g++) {
        if (!(maxima[g] >= least)) continue;
        int64_t end = (g + 1) * GROUP < num_ids ? (g + 1) * GROUP : num_ids;
        for (int64_t id = g * GROUP; id < end; id++)
            if (logits[id] >= least) num = insert(best, num, most, logits[id], id);
        if (top_k == 0) return best[0].id;
    }
    float highest = best[0].logit;
    for (int64_t i = 0; i < num; i++) best[i].logit = (best[i].logit - highest) / temperature;
    if (kept < num && best[kept].logit == best[kept - 1].logit) return UNDECIDED;
    double total = 0.0, mass = 0.0;
    for (int64_t i = 1; i < kept; i++) { /* sort by id: the distribution is walked in the order of the ids */
        int64_t to = i;
        for (other = best[i]; to > 0 && best[to - 1].id > other.id; to--) best[to] = best[to - 1];
        best[to] = other;
    }
    for (int64_t i = 0; i < kept; i++) total += best[i].logit = expf(best[i].logit);
    int64_t last = best[0].id;
    for (int64_t i = 0; i < kept; i++) {
        if (best[i].logit == 0.0f) continue;
        last = best[i].id;
        if ((mass += best[i].logit) > uniform * total) break;
    }
    return last;
}

/* The weight of every id, 1 for the most likely one, and the sum of every GROUP weights. */
static void weights_of(const float *logits, int64_t num_ids, float temperature, float highest, float *weights,
                  double *totals) {
    float last[GROUP];
    for (int64_t begin = 0; begin < num_ids; begin += GROUP) {
        const float *group = logits + begin;
        if (begin + GROUP > num_ids) {
            for (int64_t i = 0; i < GROUP; i++) last[i] = begin + i < num_ids ? group[i] : -INFINITY;
            group = last;
        }
        dvec sums = {0};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            vec x = (load(group + i) - highest) / temperature;
            vec weight = choose(x < -87.0f, (vec){0}, exponential(x));
            *(vec *)(weights + begin + i) = weight;
            sums += __builtin_convertvector(weight, dvec);
        }
        double total = 0.0;
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        totals[begin / GROUP] = total;
    }
}

/* The first id at which the cumulative weight exceeds the target. Rounding may leave none; then the last id with a
   positive weight. */
static int64_t walk(const float *weights, const double *totals, int64_t num_groups, double target) {
    double before = 0.0, mass = 0.0;
    int64_t found = 0, last = 0;
    for (int64_t g = 0; g < num_groups && mass <= target; g++) {
        if (totals[g] == 0.0) continue;
        found = g;
        before = mass;
        mass += totals[g];
    }
    for (int64_t id = found * GROUP; id < (found + 1) * GROUP; id++) {
        if (weights[id] == 0.0f) continue;
        last = id;
        if ((before += weights[id]) > target) break;
    }
    return last;
}

/* Truncation by radix select. Of the ids (ascending), keep those with the largest weights, of equal weights the lowest
   ids, while the kept mass is below `mass_limit` and their number below `count_limit`; at least one. Returns the
   smallest weight kept; *num_equal is how many ids of that weight are kept. */
static float least_kept(const float *weights, const int32_t *ids, int64_t num_ids, double mass_limit,
                        int64_t count_limit, int64_t *num_equal) {
    double masses[DIGITS], mass = 0.0;
    int64_t counts[DIGITS], count = 0;
    uint32_t prefix = 0, bits; /* of the smallest weight kept: positive floats are ordered like their bits */
    float least;
    *num_equal = INT64_MAX;
    for (int shift = 2 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        memset(masses, 0, sizeof masses);
        memset(counts, 0, sizeof counts);
        for (int64_t i = 0; i < num_ids; i++) {
            memcpy(&bits, weights + ids[i], sizeof bits);
            if (bits >> shift >> DIGIT_BITS != prefix) continue;
            masses[bits >> shift & (DIGITS - 1)] += weights[ids[i]];
            counts[bits >> shift & (DIGITS - 1)]++;
        }
        int digit = DIGITS - 1;
        for (; digit >= 0; digit--) {
            if (mass + masses[digit] >= mass_limit || count + counts[digit] >= count_limit) break;
            mass += masses[digit];
            count += counts[digit];
        }
        if (digit < 0) { /* all ids with this prefix are kept */
            bits = prefix << shift << DIGIT_BITS;
            memcpy(&least, &bits, sizeof least);
            return least;
        }
        prefix = prefix << DIGIT_BITS | (uint32_t)digit;
    }
    memcpy(&least, &prefix, sizeof least);
    int64_t num = counts[prefix & (DIGITS - 1)];
    *num_equal = 0;
    for (; *num_equal < num && mass < mass_limit && count < count_limit; ++*num_equal, count++) mass += least;
    return least;
}

/* Sample one of the ids that top-k, top-p and min-p keep, for any number of ids.
   weights, totals, ids: memory for whole groups of ids. */
static int64_t sample_many(const float *logits, int64_t num_ids, float highest, int64_t top_k, float temperature,
                           float top_p, float min_p, double uniform, float *weights, double *totals, int32_t *ids) {
    int64_t num_groups = (num_ids + GROUP - 1) / GROUP, num = 0, num_equal;
    weights_of(logits, num_ids, temperature, highest, weights, totals);
    double total = 0.0, kept = 0.0, mass = 0.0;
    for (int64_t g = 0; g < num_groups; g++) total += totals[g];
    if (!top_k && top_p == 1.0f && min_p == 0.0f) return walk(weights, totals, num_groups, uniform * total);
    /* all ids below the second bound together weigh at most what top-p drops */
    double bound = min_p, bound_of_mass = (1.0 - top_p) * total / num_ids * (1.0 - 1e-9);
    if (bound_of_mass > bound) bound = bound_of_mass;
    for (int64_t g = 0; g < num_groups; g++) {
        if (totals[g] < bound) continue;
        for (int64_t id = g * GROUP; id < (g + 1) * GROUP; id++) {
            ids[num] = (int32_t)id;
            num += weights[id] >= bound && weights[id] != 0.0f;
        }
    }
    double mass_limit = top_p < 1.0f ? top_p * total : INFINITY;
    float least = least_kept(weights, ids, num, mass_limit, top_k ? top_k : num_ids, &num_equal);
    int64_t num_kept = 0;
    for (int64_t i = 0; i < num; i++) {
        float weight = weights[ids[i]];
        if (weight < least || (weight == least && num_equal-- <= 0)) continue;
        ids[num_kept++] = ids[i];
        kept += weight;
    }
    for (int64_t i = 0; i < num_kept - 1; i++)
        if ((mass += weights[ids[i]]) > uniform * kept) return ids[i];
    return ids[num_kept - 1];
}

/* The next token of every row of logits[B, V]: the most likely id if the temperature is 0, else the id that the uniform
   number selects among those that top-k (0: all), top-p (1: all) and min-p (0: all) keep. NOT_FINITE if the logits are
   not finite. Returns 0, or 1 if there is no memory. */
int32_t kraken_sample(const float *logits, int64_t row_stride, int64_t num_rows, int64_t num_ids, const int64_t *top_k,
                      const float *temperatures, const float *top_p, const float *min_p, const double *uniforms,
                      int64_t *chosen, int32_t num_threads) {
    int32_t failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        int64_t num_groups = (num_ids + GROUP - 1) / GROUP;
        int64_t group_bytes = sizeof(double) + sizeof(float) + GROUP * (sizeof(float) + sizeof(int32_t));
        double *totals = malloc(num_groups * group_bytes);
        float *maxima = (float *)(totals + num_groups), *weights = maxima + num_groups;
        int32_t *ids = (int32_t *)(weights + num_groups * GROUP);
        if (!totals)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < num_rows; b++) {
            if (!totals) continue;
            const float *row = logits + b * row_stride;
            int64_t k = temperatures[b] > 0.0f ? top_k[b] : 0;
            chosen[b] = UNDECIDED;
            if (!maxima_of(row, num_ids, maxima)) chosen[b] = NOT_FINITE;
            else if (temperatures[b] == 0.0f || (0 < k && k < MAX_CANDIDATES && top_p[b] == 1.0f && min_p[b] == 0.0f))
                chosen[b] = sample_few(row, num_ids, maxima, k, temperatures[b], uniforms[b]);
            if (chosen[b] != UNDECIDED) continue;
            float highest = -INFINITY;
            for (int64_t g = 0; g < num_groups; g++) highest = maxima[g] > highest ? maxima[g] : highest;
            chosen[b] = isfinite(highest) ? sample_many(row, num_ids, highest, k, temperatures[b], top_p[b], min_p[b],
                                                        uniforms[b], weights, totals, ids)
                                          : NOT_FINITE;
        }
        free(totals);
    }
    return failed;
}
