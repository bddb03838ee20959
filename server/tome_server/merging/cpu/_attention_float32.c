/* Attention in float32, for processors with registers of 512 bits (AVX-512). */

#include <string.h>

#include "_attention.h"

#if defined(__GNUC__) && defined(__x86_64__)

/* The sums of a product are ROWS x VECTORS registers of LANES floats. With their factors they take nearly all of the 32
   registers. Each float that is loaded is used in several products, so that the processor never waits for loads. */
enum { ROWS = 6, VECTORS = 4 };

/* Lays out keys [tokens, dim] as panels, each [dim, up to VECTORS * LANES tokens]. Copies of the last token pad the last
   panel. */
WIDE static void pack_keys(const float *from, int64_t stride, int64_t tokens, int64_t dim, __m512 *panels)
{
    int64_t width = ceil_div(tokens, LANES);
    for (int64_t first = 0; first < width; first += VECTORS, panels += VECTORS * dim) {
        int64_t vectors = min(VECTORS, width - first);
        for (int64_t j = 0; j < vectors; j++)
            for (int64_t d = 0; d < dim; d += LANES) {
                __m512 block[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) {
                    int64_t token = min((first + j) * LANES + i, tokens - 1);
                    block[i] = _mm512_maskz_loadu_ps(first_lanes(dim - d), from + token * stride + d);
                }
                transpose(block);
                for (int64_t i = 0; i < min(LANES, dim - d); i++)
                    panels[(d + i) * vectors + j] = block[i];
            }
    }
}

/* Lays out values [tokens, dim] as panels, each [tokens, up to VECTORS * LANES channels]. Zeros pad the last panel. */
WIDE static void pack_values(const float *from, int64_t stride, int64_t tokens, int64_t dim, __m512 *panels)
{
    int64_t width = ceil_div(dim, LANES);
    for (int64_t first = 0; first < width; first += VECTORS) {
        int64_t vectors = min(VECTORS, width - first);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t j = first; j < first + vectors; j++)
                *panels++ = _mm512_maskz_loadu_ps(first_lanes(dim - j * LANES), from + token * stride + j * LANES);
    }
}

/* out [ROWS, vectors] = initial [vectors], the same for each row, + left [ROWS, depth] panel [depth, vectors] */
INLINE void multiply(const float *left, int64_t left_stride, const __m512 *panel, int64_t depth, const int vectors,
                     const __m512 *initial, __m512 *out, int64_t out_stride)
{
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sums[i][j] = initial[j];
    for (int64_t d = 0; d < depth; d++) {
        __m512 right[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            right[j] = panel[d * vectors + j];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            __m512 one = _mm512_set1_ps(left[i * left_stride + d]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sums[i][j] = _mm512_fmadd_ps(one, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            out[i * out_stride + j] = sums[i][j];
}

/* out [ROWS, width] = initial [width] + left [ROWS, depth] right [depth, width]. `right` is laid out in panels. Widths
   and strides are in registers. */
WIDE static void product(const __m512 *left, int64_t left_stride, const __m512 *right, int64_t depth, int64_t width,
                         const __m512 *initial, __m512 *out)
{
    const float *rows = (const float *)left;
    int64_t stride = left_stride * LANES;
    for (int64_t first = 0; first < width; first += VECTORS, right += VECTORS * depth, initial += VECTORS, out += VECTORS)
        /* `vectors` must be a compile-time constant for the sums to stay in registers. */
        switch (min(VECTORS, width - first)) {
        case 1:
            multiply(rows, stride, right, depth, 1, initial, out, width);
            break;
        case 2:
            multiply(rows, stride, right, depth, 2, initial, out, width);
            break;
        case 3:
            multiply(rows, stride, right, depth, 3, initial, out, width);
            break;
        default:
            multiply(rows, stride, right, depth, VECTORS, initial, out, width);
        }
}

/* Turns one row of logits (base 2) into softmax weights, of which the largest is 1, and returns their sum. Powers of 2
   come from the polynomial of the least relative error, 9.1e-8. */
WIDE static float softmax_row(__m512 *logits, int64_t vectors)
{
    __m512 maximum = logits[0], sum = _mm512_setzero_ps();
    for (int64_t j = 1; j < vectors; j++)
        maximum = _mm512_max_ps(maximum, logits[j]);
    maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maximum));
    for (int64_t j = 0; j < vectors; j++) {
        __m512 rest = _mm512_sub_ps(logits[j], maximum), whole = split_exponent(&rest);
        __m512 power = _mm512_set1_ps(1.32647271e-3f);
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

static int64_t workspace_bytes(const Problem *p)
{
    int64_t key_vectors = ceil_div(p->tokens, LANES), dim_vectors = ceil_div(p->dim, LANES);
    return (key_vectors * (p->dim + 1 + ROWS) + dim_vectors * (p->tokens + 1 + 2 * ROWS)) * sizeof(__m512);
}

WIDE static void attend(const Problem *p, char *workspace)
{
    int64_t key_vectors = ceil_div(p->tokens, LANES), dim_vectors = ceil_div(p->dim, LANES);
    int64_t query_stride = p->query_strides.token;
    __m512 *keys = (__m512 *)workspace, *values = keys + key_vectors * p->dim;
    __m512 *bias_row = values + dim_vectors * p->tokens, *zeros = bias_row + key_vectors, *queries = zeros + dim_vectors;
    __m512 *logits = queries + dim_vectors * ROWS, *out_tile = logits + key_vectors * ROWS;
    __m512 scale = _mm512_set1_ps(p->scale * LOG2_E);
    memset(zeros, 0, dim_vectors * sizeof(__m512));
    for (int64_t image = 0; image < p->batch; image++) {
        fill_bias_row(p, image, (float *)bias_row, key_vectors * LANES);
        for (int64_t head = 0; head < p->heads; head++) {
            const float *head_queries = (const float *)p->queries + offset(p->query_strides, image, head);
            const float *head_keys = (const float *)p->keys + offset(p->key_strides, image, head);
            pack_keys(head_keys, p->key_strides.token, p->tokens, p->dim, keys);
            const float *head_values = (const float *)p->values + offset(p->value_strides, image, head);
            pack_values(head_values, p->value_strides.token, p->tokens, p->dim, values);
            for (int64_t row = 0; row < p->rows; row += ROWS) {
                /* Copies of the last query pad the last rows. */
                for (int64_t i = 0; i < ROWS; i++)
                    for (int64_t d = 0; d < dim_vectors; d++) {
                        const float *query = head_queries + min(row + i, p->rows - 1) * query_stride + d * LANES;
                        __m512 part = _mm512_maskz_loadu_ps(first_lanes(p->dim - d * LANES), query);
                        queries[i * dim_vectors + d] = _mm512_mul_ps(part, scale);
                    }
                product(queries, dim_vectors, keys, p->dim, key_vectors, bias_row, logits);
                float sums[ROWS];
                for (int64_t i = 0; i < ROWS; i++)
                    sums[i] = softmax_row(logits + i * key_vectors, key_vectors);
                product(logits, key_vectors, values, p->tokens, dim_vectors, zeros, out_tile);
                for (int64_t i = 0; i < min(ROWS, p->rows - row); i++)
                    for (int64_t d = 0; d < dim_vectors; d++) {
                        float *out = (float *)p->out + out_offset(p, image, head, row + i) + d * LANES;
                        __m512 mean = _mm512_mul_ps(out_tile[i * dim_vectors + d], _mm512_set1_ps(1 / sums[i]));
                        _mm512_mask_storeu_ps(out, first_lanes(p->dim - d * LANES), mean);
                    }
            }
        }
    }
}

static int is_supported(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

const Kernel float32_kernel = {is_supported, workspace_bytes, attend};

#else

const Kernel float32_kernel = {0};

#endif
