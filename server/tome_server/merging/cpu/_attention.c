/* Attention on one thread of an x86-64 CPU: softmax(scale * q k^T + bias) v. Tests compare it with torch's.

   It works on one head of one image at a time, so that all that is read repeatedly stays in the core's own cache, laid
   out in the order in which the products read it. Arguments are addresses and sizes of memory; attention_c.py checks
   that they fit each other. The interpreter's lock is released while it runs. */

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
                          &p.heads, &p.rows, &p.tokens, &p.dim, &p.query_strides.image, &p.query_strides.head,
                          &p.query_strides.token, &p.key_strides.image, &p.key_strides.head, &p.key_strides.token,
                          &p.value_strides.image, &p.value_strides.head, &p.value_strides.token, &p.scale, &bf16))
        return NULL;
    p.queries = (const void *)(uintptr_t)queries;
    p.keys = (const void *)(uintptr_t)keys;
    p.values = (const void *)(uintptr_t)values;
    p.bias = (const float *)(uintptr_t)bias;
    p.out = (void *)(uintptr_t)out;
    const Kernel *kernel = bf16 ? &bfloat16_kernel : &float32_kernel;
    char *workspace = aligned_alloc(64, kernel->workspace_bytes(&p));
    if (workspace == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    kernel->attend(&p, workspace);
    Py_END_ALLOW_THREADS
    free(workspace);
    Py_RETURN_NONE;
}

static PyObject *supported(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    return Py_BuildValue("(NN)", PyBool_FromLong(float32_kernel.is_supported != NULL && float32_kernel.is_supported()),
                         PyBool_FromLong(bfloat16_kernel.is_supported != NULL && bfloat16_kernel.is_supported()));
}

static PyMethodDef functions[] = {
    {"supported", supported, METH_NOARGS, "whether this processor supports it in float32, and in bfloat16"},
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
