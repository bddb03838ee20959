/* What attention in float32 and in bfloat16 share. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* Strides, in elements. */
typedef struct {
    long long image, head, token;
} Strides;

typedef struct {
    const void *queries, *keys, *values;
    const float *bias;
    void *out;
    long long batch, heads, rows, tokens, dim;
    Strides of_queries, of_keys, of_values;
    float scale;
} Problem;

/* Attention in one type: whether the processor can, how many bytes of room it needs, at a multiple of 64, and attention
   itself. All of them NULL where it was compiled for no such processor. */
typedef struct {
    int (*is_supported)(void);
    int64_t (*room)(const Problem *p);
    void (*attend)(const Problem *p, char *room);
} Way;

extern const Way in_float, in_half;

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline)) WIDE

enum { LANES = 16 };

/* What no logit comes near, and what 2 to the power of is 0. */
static const float LEAST = -1e30f;

/* Powers of 2 in place of e cost one product less. */
static const float PER_NAT = 1.44269504f;

static inline int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

/* How many of size `part` hold so many. */
static inline int64_t parts(int64_t whole, int64_t part)
{
    return (whole + part - 1) / part;
}

static inline int64_t place(Strides apart, int64_t image, int64_t head)
{
    return image * apart.image + head * apart.head;
}

static inline int64_t place_out(const Problem *p, int64_t image, int64_t head, int64_t row)
{
    return ((image * p->rows + row) * p->heads + head) * p->dim;
}

/* The first `count` lanes. */
INLINE __mmask16 first_16(int64_t count)
{
    return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)-1;
}

/* Turns rows into columns: halves of the rows swapped, then halves of these, and so on. */
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

/* What is added to the logits of one image's keys, and LEAST where there are none. */
static inline void raise_logits(const Problem *p, int64_t image, float *raised, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        raised[i] = i >= p->tokens ? LEAST : p->bias == NULL ? 0 : p->bias[image * p->tokens + i] * PER_NAT;
}

/* A power of 2 that is a whole number, and the rest of the exponent, from -0.5 to 0.5. What isn't a number stays so: of
   two numbers, one of them none, the second is the maximum. */
INLINE __m512 whole_of(__m512 *x)
{
    __m512 bounded = _mm512_max_ps(_mm512_set1_ps(LEAST), *x);
    __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *x = _mm512_sub_ps(bounded, whole);
    return whole;
}

#endif
#endif
