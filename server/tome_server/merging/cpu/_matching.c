/* Matching and merging of tokens on the CPU. What is computed, and why, is said in matching.py; tests hold the two equal.

   Arguments are addresses of memory and sizes of it; matching_c.py sees to it that they are right. Tokens and keys are
   float, or bfloat16 where `bf16` is set. The interpreter's lock is not held meanwhile. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
/* Built for any processor and once more for those with wider registers: the loader chooses. */
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

static inline float from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, and to the even one of two that are as near. */
static inline uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void add(float *restrict sum, const void *restrict more, int64_t count, int bf16)
{
    const uint16_t *halves = more;
    const float *floats = more;
    if (bf16)
        for (int64_t i = 0; i < count; i++)
            sum[i] += from_bf16(halves[i]);
    else
        for (int64_t i = 0; i < count; i++)
            sum[i] += floats[i];
}

/* Sums the keys of one token over its heads, and scales the sum to length 1. */
FOR_EACH_PROCESSOR
static void direct(const char *keys, int64_t heads, int64_t bytes_a_head, int64_t dim, int bf16, float *restrict sum)
{
    memset(sum, 0, dim * sizeof(float));
    for (int64_t head = 0; head < heads; head++)
        add(sum, keys + head * bytes_a_head, dim, bf16);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++)
        squares += sum[i] * sum[i];
    float length = fmaxf(sqrtf(squares), 1e-12f);
    for (int64_t i = 0; i < dim; i++)
        sum[i] /= length;
}

typedef struct {
    float similarity;
    int64_t source;
} Proposal;

static int by_strength(const void *one, const void *other)
{
    const Proposal *a = one, *b = other;
    if (a->similarity != b->similarity)
        return a->similarity > b->similarity ? -1 : 1;
    return a->source < b->source ? -1 : 1;
}

static int by_place(const void *one, const void *other)
{
    const Proposal *a = one, *b = other;
    return a->source < b->source ? -1 : 1;
}

FOR_EACH_PROCESSOR
static float largest(const float *values, int64_t count)
{
    /* What is not a number is nobody's choice. */
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++)
        most = values[i] > most ? values[i] : most;
    return most;
}

static int64_t first_equal(const float *values, int64_t count, float wanted)
{
    for (int64_t i = 0; i < count; i++)
        if (values[i] == wanted)
            return i;
    return 0;
}

/* Matches one image, whose tokens begin at `row`, and after the merge at `row_after`. */
static void choose(const float *similarity, int64_t sources, int64_t destinations, int64_t r, int64_t prefix,
                   int64_t row, int64_t row_after, Proposal *proposals, int64_t *order, int64_t *merged, int64_t *into)
{
    int64_t first_source = row + prefix + prefix % 2, first_destination = row + prefix + 1 - prefix % 2;
    for (int64_t s = 0; s < sources; s++)
        proposals[s] = (Proposal){largest(similarity + s * destinations, destinations), s};
    qsort(proposals, sources, sizeof(Proposal), by_strength);
    for (int64_t i = 0; i < r; i++) {
        const float *of = similarity + proposals[i].source * destinations;
        merged[i] = first_source + 2 * proposals[i].source;
        into[i] = row_after + prefix + (sources - r) + first_equal(of, destinations, proposals[i].similarity);
    }
    qsort(proposals + r, sources - r, sizeof(Proposal), by_place);
    for (int64_t t = 0; t < prefix; t++)
        *order++ = row + t;
    for (int64_t i = r; i < sources; i++)
        *order++ = first_source + 2 * proposals[i].source;
    for (int64_t d = 0; d < destinations; d++)
        *order++ = first_destination + 2 * d;
}

/* Moves one token by a share of the way from what a destination was to a source. */
FOR_EACH_PROCESSOR
static void step(void *token, const void *source, const void *destination, float share, int64_t channels, int bf16)
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
            direct((const char *)(uintptr_t)keys + (image * by_image + token * by_token) * bytes, heads,
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
        choose((const float *)(uintptr_t)similarity + image * sources * destinations, sources, destinations, r, prefix,
               image * tokens, image * left, proposals, (int64_t *)(uintptr_t)order + image * left,
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
        step(out + into[i] * bytes, x + merged[i] * bytes, x + order[into[i]] * bytes,
             size[merged[i]] / size_out[into[i]], channels, bf16);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"directions", directions, METH_VARARGS, "keys, out, (batch, heads, tokens, dim), strides of the first three, bf16"},
    {"match", match, METH_VARARGS, "similarity, order, merged, into, (batch, sources, destinations), r, prefix"},
    {"combine", combine, METH_VARARGS, "x, size, order, merged, into, out, sizes out, rows left, rows merged, channels, bf16"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_matching", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__matching(void)
{
    return PyModule_Create(&definition);
}
