/* Declarations and functions that attention in float32 and in bfloat16 share. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* Strides of queries, keys or values, in elements. */
typedef struct {
    long long image, head, token;
} Strides;

/* The arguments: queries [batch, heads, rows, dim], keys and values [batch, heads, tokens, dim], bias [batch, tokens] or
   NULL, out [batch, rows, heads, dim]. */
typedef struct {
    const void *queries, *keys, *values;
    const float *bias;
    void *out;
    long long batch, heads, rows, tokens, dim;
    Strides query_strides, key_strides, value_strides;
    float scale;
} Problem;

/* Attention in one dtype. All members are NULL if it was compiled for another kind of processor. */
typedef struct {
    /* whether this processor has the instructions */
    int (*is_supported)(void);
    /* size of the workspace, a multiple of 64 bytes */
    int64_t (*workspace_bytes)(const Problem *p);
    /* `workspace` is aligned to 64 bytes */
    void (*attend)(const Problem *p, char *workspace);
} Kernel;

extern const Kernel float32_kernel, bfloat16_kernel;

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline)) WIDE

enum { LANES = 16 };

/* Far below any logit; 2 to the power of it is 0. */
static const float LEAST = -1e30f;

/* Logits are scaled by it, so that powers of 2 take the place of powers of e; they cost one product less. */
static const float LOG2_E = 1.44269504f;

static inline int64_t min(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

static inline int64_t ceil_div(int64_t whole, int64_t part)
{
    return (whole + part - 1) / part;
}

static inline int64_t offset(Strides strides, int64_t image, int64_t head)
{
    return image * strides.image + head * strides.head;
}

static inline int64_t out_offset(const Problem *p, int64_t image, int64_t head, int64_t row)
{
    return ((image * p->rows + row) * p->heads + head) * p->dim;
}

/* A mask of the first `count` lanes. */
INLINE __mmask16 first_lanes(int64_t count)
{
    return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)-1;
}

/* Transposes a block of 16 x 16: swaps quadrants, then the quadrants of each, and so on. */
INLINE void transpose(__m512 rows[LANES])
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int width = LANES / 2; width > 0; width /= 2) {
        const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(width));
        const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(LANES - width));
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(width));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & width)) {
                __m512 one = rows[i], other = rows[i + width];
                rows[i] = _mm512_permutex2var_ps(one, low, other);
                rows[i + width] = _mm512_permutex2var_ps(one, high, other);
            }
    }
}

/* Writes what to add to the logits of one image's keys, and LEAST for the padding up to `width`. */
static inline void fill_bias_row(const Problem *p, int64_t image, float *bias_row, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        bias_row[i] = i >= p->tokens ? LEAST : p->bias == NULL ? 0 : p->bias[image * p->tokens + i] * LOG2_E;
}

/* Splits exponents of 2: returns their nearest whole numbers, and leaves the rest, from -0.5 to 0.5, in `x`. NaN stays
   NaN, since the maximum instruction returns its second operand if one of them is NaN. */
INLINE __m512 split_exponent(__m512 *x)
{
    __m512 bounded = _mm512_max_ps(_mm512_set1_ps(LEAST), *x);
    __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *x = _mm512_sub_ps(bounded, whole);
    return whole;
}

#endif
#endif
