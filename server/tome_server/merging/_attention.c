/* Attention on one thread of a CPU with registers of 512 bits. What is computed is said in attention.py; tests hold it
   equal to torch's.

   Small matrices, one image's one head at a time: what is read again and again stays in the core's own cache, laid out
   as the products read it. Arguments are addresses of floats and numbers of them; attention.py sees to it that they are
   right. The interpreter's lock is not held meanwhile. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDE __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline)) WIDE

/* A product's sums are ROWS x VECTORS registers of LANES floats: with what they are made of, nearly all 32 that there
   are. Each float that is read then counts for several products, which is what lets the processor multiply all the time. */
enum { LANES = 16, ROWS = 6, VECTORS = 4 };

/* What no logit comes near, and what 2 to the power of is 0. */
static const float LEAST = -1e30f;

typedef struct {
    long long image, head, token;
} Strides;

typedef struct {
    const float *at;
    Strides apart;
} Heads;

static inline int64_t vectors_of(int64_t floats)
{
    return (floats + LANES - 1) / LANES;
}

static inline int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

static inline const float *head_of(const Heads *heads, int64_t image, int64_t head)
{
    return heads->at + image * heads->apart.image + head * heads->apart.head;
}

/* Which lanes are among `count` floats. */
INLINE __mmask16 among(int64_t count)
{
    return count < LANES ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff;
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

/* Lays out keys [tokens, dim] as panels, each [dim, up to VECTORS * LANES tokens]. The last is filled up with copies. */
WIDE static void lay_out_keys(const float *from, int64_t apart, int64_t tokens, int64_t dim, __m512 *panels)
{
    for (int64_t across = vectors_of(tokens), first = 0; first < across; first += VECTORS, panels += VECTORS * dim) {
        int64_t vectors = least(VECTORS, across - first);
        for (int64_t j = 0; j < vectors; j++)
            for (int64_t d = 0; d < dim; d += LANES) {
                __m512 block[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) {
                    int64_t token = least((first + j) * LANES + i, tokens - 1);
                    block[i] = _mm512_maskz_loadu_ps(among(dim - d), from + token * apart + d);
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
    for (int64_t across = vectors_of(dim), first = 0; first < across; first += VECTORS) {
        int64_t vectors = least(VECTORS, across - first);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t j = first; j < first + vectors; j++)
                *panels++ = _mm512_maskz_loadu_ps(among(dim - j * LANES), from + token * apart + j * LANES);
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

/* 2 to the power of x. The polynomial is that of the least relative error, 9.1e-8, from -0.5 to 0.5. */
INLINE __m512 power_of_2(__m512 x)
{
    /* Of two numbers, one of them none, the second is the maximum: what is not a number stays so. */
    x = _mm512_max_ps(_mm512_set1_ps(LEAST), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), power = _mm512_set1_ps(1.32647271e-3f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.67151286e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.55073375e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.40222421e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93146978e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1));
    return _mm512_scalef_ps(power, whole);
}

/* Turns logits, in powers of 2, into weights, of which the largest is 1, and returns their sum. */
WIDE static float weigh(__m512 *logits, int64_t vectors)
{
    __m512 most = logits[0], sum = _mm512_setzero_ps();
    for (int64_t j = 1; j < vectors; j++)
        most = _mm512_max_ps(most, logits[j]);
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < vectors; j++) {
        logits[j] = power_of_2(_mm512_sub_ps(logits[j], most));
        sum = _mm512_add_ps(sum, logits[j]);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Room for what is laid out, and for what belongs to ROWS queries. */
typedef struct {
    __m512 *keys, *values, *bias, *none, *queries, *logits, *found;
} Room;

static Room divided(__m512 *all, int64_t tokens, int64_t dim)
{
    int64_t across = vectors_of(tokens), deep = vectors_of(dim);
    Room room = {.keys = all};
    room.values = room.keys + across * dim;
    room.bias = room.values + deep * tokens;
    room.none = room.bias + across;
    room.queries = room.none + deep;
    room.logits = room.queries + deep * ROWS;
    room.found = room.logits + across * ROWS;
    return room;
}

/* In registers. */
static int64_t room_for(int64_t tokens, int64_t dim)
{
    return vectors_of(tokens) * (dim + 1 + ROWS) + vectors_of(dim) * (tokens + 1 + 2 * ROWS);
}

/* Attends for up to ROWS queries of one head, keys and values of which are laid out. */
WIDE static void ask(const float *queries, int64_t apart, int64_t rows, int64_t tokens, int64_t dim, float scale,
                     const Room *room, float *out, int64_t out_apart)
{
    int64_t across = vectors_of(tokens), deep = vectors_of(dim);
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t d = 0; d < deep; d++) {
            /* Rows that there are not are copies of the last. */
            const float *from = queries + least(i, rows - 1) * apart + d * LANES;
            __m512 query = _mm512_maskz_loadu_ps(among(dim - d * LANES), from);
            room->queries[i * deep + d] = _mm512_mul_ps(query, _mm512_set1_ps(scale));
        }
    product(room->queries, deep, room->keys, dim, across, room->bias, room->logits);
    float sums[ROWS];
    for (int64_t i = 0; i < rows; i++)
        sums[i] = weigh(room->logits + i * across, across);
    product(room->logits, across, room->values, tokens, deep, room->none, room->found);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < deep; d++)
            _mm512_mask_storeu_ps(out + i * out_apart + d * LANES, among(dim - d * LANES),
                                  _mm512_mul_ps(room->found[i * deep + d], _mm512_set1_ps(1 / sums[i])));
}

static PyObject *attend(PyObject *module, PyObject *arguments)
{
    unsigned long long queries_at, keys_at, values_at, bias_at, out_at;
    long long batch, heads, queries, tokens, dim;
    Heads asking, keys, values;
    float scale;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKKKK(LLLLL)(LLL)(LLL)(LLL)f", &queries_at, &keys_at, &values_at, &bias_at, &out_at,
                          &batch, &heads, &queries, &tokens, &dim, &asking.apart.image, &asking.apart.head,
                          &asking.apart.token, &keys.apart.image, &keys.apart.head, &keys.apart.token,
                          &values.apart.image, &values.apart.head, &values.apart.token, &scale))
        return NULL;
    __m512 *all = aligned_alloc(sizeof(__m512), room_for(tokens, dim) * sizeof(__m512));
    if (all == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    const Room room = divided(all, tokens, dim);
    asking.at = (const float *)(uintptr_t)queries_at;
    keys.at = (const float *)(uintptr_t)keys_at;
    values.at = (const float *)(uintptr_t)values_at;
    const float *bias = (const float *)(uintptr_t)bias_at;
    float *out = (float *)(uintptr_t)out_at, *raised = (float *)room.bias;
    /* Powers of 2 in place of e cost one product less. */
    const float per_nat = 1.44269504f;
    memset(room.none, 0, vectors_of(dim) * sizeof(__m512));
    for (int64_t image = 0; image < batch; image++) {
        for (int64_t i = 0; i < vectors_of(tokens) * LANES; i++)
            raised[i] = i >= tokens ? LEAST : bias == NULL ? 0 : bias[image * tokens + i] * per_nat;
        for (int64_t head = 0; head < heads; head++) {
            const float *from = head_of(&asking, image, head);
            lay_out_keys(head_of(&keys, image, head), keys.apart.token, tokens, dim, room.keys);
            lay_out_values(head_of(&values, image, head), values.apart.token, tokens, dim, room.values);
            for (int64_t row = 0; row < queries; row += ROWS)
                ask(from + row * asking.apart.token, asking.apart.token, least(ROWS, queries - row), tokens, dim,
                    scale * per_nat, &room, out + ((image * queries + row) * heads + head) * dim, heads * dim);
        }
    }
    Py_END_ALLOW_THREADS
    free(all);
    Py_RETURN_NONE;
}

static int is_wide(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

#else

static PyObject *attend(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    PyErr_SetString(PyExc_NotImplementedError, "written for x86-64 alone");
    return NULL;
}

static int is_wide(void)
{
    return 0;
}

#endif

static PyObject *supported(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    return PyBool_FromLong(is_wide());
}

static PyMethodDef functions[] = {
    {"supported", supported, METH_NOARGS, "whether this processor can"},
    {"attend", attend, METH_VARARGS, "queries, keys, values, bias or 0, out, (batch, heads, queries, tokens, dim), strides, scale"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_attention", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__attention(void)
{
    return PyModule_Create(&definition);
}
