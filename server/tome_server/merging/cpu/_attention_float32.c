/* Attention in float32, where registers are of 512 bits. */

#include <string.h>

#include "_attention.h"

#if defined(__GNUC__) && defined(__x86_64__)

/* A product's sums are ROWS x VECTORS registers of LANES floats: with what they are made of, nearly all 32 that there
   are. Each float that is read then counts for several products, which is what lets the processor multiply all the time. */
enum { ROWS = 6, VECTORS = 4 };

/* Lays out keys [tokens, dim] as panels, each [dim, up to VECTORS * LANES tokens]. The last is filled up with copies. */
WIDE static void lay_out_keys(const float *from, int64_t apart, int64_t tokens, int64_t dim, __m512 *panels)
{
    for (int64_t across = parts(tokens, LANES), first = 0; first < across; first += VECTORS, panels += VECTORS * dim) {
        int64_t vectors = least(VECTORS, across - first);
        for (int64_t j = 0; j < vectors; j++)
            for (int64_t d = 0; d < dim; d += LANES) {
                __m512 block[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) {
                    int64_t token = least((first + j) * LANES + i, tokens - 1);
                    block[i] = _mm512_maskz_loadu_ps(first_16(dim - d), from + token * apart + d);
                }
                transpose(block);
                for (int64_t i = 0; i < least(LANES, dim - d); i++)
                    panels[(d + i) * vectors + j] = block[i];
            }
    }
}

/* Lays out values [tokens, dim] as panels, each [tokens, up to VECTORS * LANES channels]. The last is filled up with 0. */
WIDE static void lay_out_values(const float *from, int64_t apart, int64_t tokens, int64_t dim, __m512 *panels)
{
    for (int64_t across = parts(dim, LANES), first = 0; first < across; first += VECTORS) {
        int64_t vectors = least(VECTORS, across - first);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t j = first; j < first + vectors; j++)
                *panels++ = _mm512_maskz_loadu_ps(first_16(dim - j * LANES), from + token * apart + j * LANES);
    }
}

/* out [ROWS, vectors] = begin [vectors], the same for each row, + left [ROWS, depth] panel [depth, vectors] */
INLINE void multiply(const float *left, int64_t left_apart, const __m512 *panel, int64_t depth, const int vectors,
                     const __m512 *begin, __m512 *out, int64_t out_apart)
{
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sums[i][j] = begin[j];
    for (int64_t d = 0; d < depth; d++) {
        __m512 right[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            right[j] = panel[d * vectors + j];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            __m512 one = _mm512_set1_ps(left[i * left_apart + d]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sums[i][j] = _mm512_fmadd_ps(one, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            out[i * out_apart + j] = sums[i][j];
}

/* out [ROWS, width] = begin [width] + left [ROWS, depth] right [depth, width], of which `right` is laid out in panels.
   Widths, and how far apart rows of `left` and `out` are, in registers. */
WIDE static void product(const __m512 *left, int64_t left_apart, const __m512 *right, int64_t depth, int64_t width,
                         const __m512 *begin, __m512 *out)
{
    const float *rows = (const float *)left;
    int64_t apart = left_apart * LANES;
    for (int64_t first = 0; first < width; first += VECTORS, right += VECTORS * depth, begin += VECTORS, out += VECTORS)
        /* Each number of registers is compiled for itself, so that they are registers indeed. */
        switch (least(VECTORS, width - first)) {
        case 1:
            multiply(rows, apart, right, depth, 1, begin, out, width);
            break;
        case 2:
            multiply(rows, apart, right, depth, 2, begin, out, width);
            break;
        case 3:
            multiply(rows, apart, right, depth, 3, begin, out, width);
            break;
        default:
            multiply(rows, apart, right, depth, VECTORS, begin, out, width);
        }
}

/* Turns logits, in powers of 2, into weights, of which the largest is 1, and returns their sum. The polynomial is that of
   the least relative error, 9.1e-8. */
WIDE static float weigh(__m512 *logits, int64_t vectors)
{
    __m512 most = logits[0], sum = _mm512_setzero_ps();
    for (int64_t j = 1; j < vectors; j++)
        most = _mm512_max_ps(most, logits[j]);
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < vectors; j++) {
        __m512 rest = _mm512_sub_ps(logits[j], most), whole = whole_of(&rest), power = _mm512_set1_ps(1.32647271e-3f);
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.67151286e-3f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.55073375e-2f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.40222421e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93146978e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1));
        logits[j] = _mm512_scalef_ps(power, whole);
        sum = _mm512_add_ps(sum, logits[j]);
    }
    return _mm512_reduce_add_ps(sum);
}

static int64_t room_for(const Problem *p)
{
    int64_t across = parts(p->tokens, LANES), deep = parts(p->dim, LANES);
    return (across * (p->dim + 1 + ROWS) + deep * (p->tokens + 1 + 2 * ROWS)) * sizeof(__m512);
}

WIDE static void attend(const Problem *p, char *room)
{
    int64_t across = parts(p->tokens, LANES), deep = parts(p->dim, LANES), apart = p->of_queries.token;
    __m512 *keys = (__m512 *)room, *values = keys + across * p->dim, *raised = values + deep * p->tokens;
    __m512 *none = raised + across, *queries = none + deep, *logits = queries + deep * ROWS;
    __m512 *found = logits + across * ROWS, scale = _mm512_set1_ps(p->scale * PER_NAT);
    memset(none, 0, deep * sizeof(__m512));
    for (int64_t image = 0; image < p->batch; image++) {
        raise_logits(p, image, (float *)raised, across * LANES);
        for (int64_t head = 0; head < p->heads; head++) {
            const float *asking = (const float *)p->queries + place(p->of_queries, image, head);
            lay_out_keys((const float *)p->keys + place(p->of_keys, image, head), p->of_keys.token, p->tokens, p->dim, keys);
            lay_out_values((const float *)p->values + place(p->of_values, image, head), p->of_values.token, p->tokens,
                           p->dim, values);
            for (int64_t row = 0; row < p->rows; row += ROWS) {
                /* Rows that there are not are copies of the last. */
                for (int64_t i = 0; i < ROWS; i++)
                    for (int64_t d = 0; d < deep; d++) {
                        const float *query = asking + least(row + i, p->rows - 1) * apart + d * LANES;
                        __m512 part = _mm512_maskz_loadu_ps(first_16(p->dim - d * LANES), query);
                        queries[i * deep + d] = _mm512_mul_ps(part, scale);
                    }
                product(queries, deep, keys, p->dim, across, raised, logits);
                float sums[ROWS];
                for (int64_t i = 0; i < ROWS; i++)
                    sums[i] = weigh(logits + i * across, across);
                product(logits, across, values, p->tokens, deep, none, found);
                for (int64_t i = 0; i < least(ROWS, p->rows - row); i++)
                    for (int64_t d = 0; d < deep; d++) {
                        float *out = (float *)p->out + place_out(p, image, head, row + i) + d * LANES;
                        __m512 mean = _mm512_mul_ps(found[i * deep + d], _mm512_set1_ps(1 / sums[i]));
                        _mm512_mask_storeu_ps(out, first_16(p->dim - d * LANES), mean);
                    }
            }
        }
    }
}

static int is_supported(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

const Way in_float = {is_supported, room_for, attend};

#else

const Way in_float = {0};

#endif
