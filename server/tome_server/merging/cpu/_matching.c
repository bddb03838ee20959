/* Matching and merging of tokens on the CPU. matching.py defines and explains the results; tests compare the two.

   Arguments are addresses and sizes of memory; matching_c.py checks that they fit each other. Tokens and keys are
   float32, or bfloat16 if `bf16` is set. The interpreter's lock is released while it runs. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
/* Compiled several times, for processors with registers of different widths; the loader chooses. */
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

static inline float from_bf16(uint16_t value_bits)
{
    uint32_t bits = (uint32_t)value_bits << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even. */
static inline uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void add(float *restrict sum, const void *restrict addend, int64_t count, int bf16)
{
    const uint16_t *bf16_addend = addend;
    const float *float_addend = addend;
    if (bf16)
        for (int64_t i = 0; i < count; i++)
            sum[i] += from_bf16(bf16_addend[i]);
    else
        for (int64_t i = 0; i < count; i++)
            sum[i] += float_addend[i];
}

/* Writes the sum of one token's keys over the heads, scaled to length 1. */
FOR_EACH_PROCESSOR
static void normalized_key_sum(const char *keys, int64_t heads, int64_t head_bytes, int64_t dim, int bf16,
                               float *restrict sum)
{
    memset(sum, 0, dim * sizeof(float));
    for (int64_t head = 0; head < heads; head++)
        add(sum, keys + head * head_bytes, dim, bf16);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++)
        squares += sum[i] * sum[i];
    float length = fmaxf(sqrtf(squares), 1e-12f);
    for (int64_t i = 0; i < dim; i++)
        sum[i] /= length;
}

/* The similarity of a source to its most similar destination. */
typedef struct {
    float similarity;
    int64_t source;
} Proposal;

/* Orders by falling similarity, ties by position. */
static int by_similarity(const void *one, const void *other)
{
    const Proposal *a = one, *b = other;
    if (a->similarity != b->similarity)
        return a->similarity > b->similarity ? -1 : 1;
    return a->source < b->source ? -1 : 1;
}

static int by_source(const void *one, const void *other)
{
    const Proposal *a = one, *b = other;
    return a->source < b->source ? -1 : 1;
}

FOR_EACH_PROCESSOR
static float maximum(const float *values, int64_t count)
{
    /* NaN compares as smaller, so it is never chosen. */
    float result = -INFINITY;
#pragma omp simd reduction(max : result)
    for (int64_t i = 0; i < count; i++)
        result = values[i] > result ? values[i] : result;
    return result;
}

static int64_t first_equal(const float *values, int64_t count, float wanted)
{
    for (int64_t i = 0; i < count; i++)
        if (values[i] == wanted)
            return i;
    return 0;
}

/* Matches the tokens of one image. They start at `row` before the merge, and at `row_after` after it. */
static void match_image(const float *similarity, int64_t sources, int64_t destinations, int64_t r, int64_t prefix,
                        int64_t row, int64_t row_after, Proposal *proposals, int64_t *order, int64_t *merged,
                        int64_t *into)
{
    int64_t first_source = row + prefix + prefix % 2, first_destination = row + prefix + 1 - prefix % 2;
    for (int64_t s = 0; s < sources; s++)
        proposals[s] = (Proposal){maximum(similarity + s * destinations, destinations), s};
    qsort(proposals, sources, sizeof(Proposal), by_similarity);
    for (int64_t i = 0; i < r; i++) {
        const float *row_of_source = similarity + proposals[i].source * destinations;
        merged[i] = first_source + 2 * proposals[i].source;
        into[i] = row_after + prefix + (sources - r) + first_equal(row_of_source, destinations, proposals[i].similarity);
    }
    qsort(proposals + r, sources - r, sizeof(Proposal), by_source);
    for (int64_t t = 0; t < prefix; t++)
        *order++ = row + t;
    for (int64_t i = r; i < sources; i++)
        *order++ = first_source + 2 * proposals[i].source;
    for (int64_t d = 0; d < destinations; d++)
        *order++ = first_destination + 2 * d;
}

/* Adds to one token a share of the difference between a source and what its destination was before the merge. */
FOR_EACH_PROCESSOR
static void move_towards(void *token, const void *source, const void *destination, float share, int64_t channels,
                         int bf16)
{
    if (bf16) {
        uint16_t *out = token;
        const uint16_t *to = source, *from = destination;
        for (int64_t c = 0; c < channels; c++)
            out[c] = to_bf16(from_bf16(out[c]) + (from_bf16(to[c]) - from_bf16(from[c])) * share);
    } else {
        float *out = token;
        const float *to = source, *from = destination;
        for (int64_t c = 0; c < channels; c++)
            out[c] += (to[c] - from[c]) * share;
    }
}

static PyObject *directions(PyObject *module, PyObject *arguments)
{
    unsigned long long keys, out;
    long long batch, heads, tokens, dim, by_image, by_head, by_token;
    int bf16;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KK(LLLL)(LLL)p", &keys, &out, &batch, &heads, &tokens, &dim, &by_image, &by_head,
                          &by_token, &bf16))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    int64_t bytes = bf16 ? sizeof(uint16_t) : sizeof(float);
    float *sum = (float *)(uintptr_t)out;
    for (int64_t image = 0; image < batch; image++)
        for (int64_t token = 0; token < tokens; token++, sum += dim)
            normalized_key_sum((const char *)(uintptr_t)keys + (image * by_image + token * by_token) * bytes, heads,
                               by_head * bytes, dim, bf16, sum);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *match(PyObject *module, PyObject *arguments)
{
    unsigned long long similarity, order, merged, into;
    long long batch, sources, destinations, r, prefix;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKKK(LLL)LL", &similarity, &order, &merged, &into, &batch, &sources,
                          &destinations, &r, &prefix))
        return NULL;
    Proposal *proposals = malloc(sources * sizeof(Proposal));
    if (proposals == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    int64_t tokens = prefix + sources + destinations, left = tokens - r;
    for (int64_t image = 0; image < batch; image++)
        match_image((const float *)(uintptr_t)similarity + image * sources * destinations, sources, destinations, r,
                    prefix, image * tokens, image * left, proposals, (int64_t *)(uintptr_t)order + image * left,
                    (int64_t *)(uintptr_t)merged + image * r, (int64_t *)(uintptr_t)into + image * r);
    Py_END_ALLOW_THREADS
    free(proposals);
    Py_RETURN_NONE;
}

static PyObject *combine(PyObject *module, PyObject *arguments)
{
    unsigned long long x_at, size_at, order_at, merged_at, into_at, out_at, size_out_at;
    long long left, merges, channels;
    int bf16;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKKKKKKLLLp", &x_at, &size_at, &order_at, &merged_at, &into_at, &out_at,
                          &size_out_at, &left, &merges, &channels, &bf16))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    const char *x = (const char *)(uintptr_t)x_at;
    const float *size = (const float *)(uintptr_t)size_at;
    const int64_t *order = (const int64_t *)(uintptr_t)order_at, *merged = (const int64_t *)(uintptr_t)merged_at,
                  *into = (const int64_t *)(uintptr_t)into_at;
    char *out = (char *)(uintptr_t)out_at;
    float *size_out = (float *)(uintptr_t)size_out_at;
    int64_t bytes = channels * (bf16 ? sizeof(uint16_t) : sizeof(float));
    for (int64_t row = 0; row < left; row++) {
        memcpy(out + row * bytes, x + order[row] * bytes, bytes);
        size_out[row] = size[order[row]];
    }
    for (int64_t i = 0; i < merges; i++)
        size_out[into[i]] += size[merged[i]];
    for (int64_t i = 0; i < merges; i++)
        move_towards(out + into[i] * bytes, x + merged[i] * bytes, x + order[into[i]] * bytes,
                     size[merged[i]] / size_out[into[i]], channels, bf16);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"directions", directions, METH_VARARGS, "keys, out, (batch, heads, tokens, dim), strides of the first three, bf16"},
    {"match", match, METH_VARARGS, "similarity, order, merged, into, (batch, sources, destinations), r, prefix"},
    {"combine", combine, METH_VARARGS,
     "x, size, order, merged, into, out, size out, rows left, rows merged, channels, bf16"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_matching", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__matching(void)
{
    return PyModule_Create(&definition);
}
