/* Attention on one thread of an x86-64 CPU. What is computed is said in attention.py; tests hold it equal to torch's.

   Small matrices, one image's one head at a time: what is read again and again stays in the core's own cache, laid out
   as the products read it. Arguments are addresses of memory and sizes of it; attention.py sees to it that they are
   right. The interpreter's lock is not held meanwhile. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_attention.h"

static PyObject *attend(PyObject *module, PyObject *arguments)
{
    unsigned long long queries, keys, values, bias, out;
    Problem p;
    int bf16;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKKKK(LLLLL)(LLL)(LLL)(LLL)fp", &queries, &keys, &values, &bias, &out, &p.batch,
                          &p.heads, &p.rows, &p.tokens, &p.dim, &p.of_queries.image, &p.of_queries.head,
                          &p.of_queries.token, &p.of_keys.image, &p.of_keys.head, &p.of_keys.token, &p.of_values.image,
                          &p.of_values.head, &p.of_values.token, &p.scale, &bf16))
        return NULL;
    p.queries = (const void *)(uintptr_t)queries;
    p.keys = (const void *)(uintptr_t)keys;
    p.values = (const void *)(uintptr_t)values;
    p.bias = (const float *)(uintptr_t)bias;
    p.out = (void *)(uintptr_t)out;
    const Way *way = bf16 ? &in_half : &in_float;
    char *room = aligned_alloc(64, way->room(&p));
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    way->attend(&p, room);
    Py_END_ALLOW_THREADS
    free(room);
    Py_RETURN_NONE;
}

static PyObject *supported(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    return Py_BuildValue("(NN)", PyBool_FromLong(in_float.is_supported != NULL && in_float.is_supported()),
                         PyBool_FromLong(in_half.is_supported != NULL && in_half.is_supported()));
}

static PyMethodDef functions[] = {
    {"supported", supported, METH_NOARGS, "whether this processor can in float32, and in bfloat16"},
    {"attend", attend, METH_VARARGS,
     "queries, keys, values, bias or 0, out, (batch, heads, queries, tokens, dim), strides of queries, keys and values, "
     "scale, bf16"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_attention", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__attention(void)
{
    return PyModule_Create(&definition);
}
