/* Wrappers of the block types: their table, and rows to blocks and back. */
#include "binding.h"

#include "../quant/iq_grids.h"

/* types() -> [(name, id, values a block, bytes a block, can be written)], in the order of their ids */
static PyObject *py_types(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    PyObject *list = PyList_New(0);
    for (int id = 0; list != NULL && id < KL_TYPE_END; id++) {
        const kl_type type = (kl_type)id;
        const int64_t values = kl_type_block(type);
        if (values == 0)
            continue;
        const kl_block_type *blocks = kl_block_type_of(type);
        kl_py_append(&list, Py_BuildValue("siLnO", kl_type_name(type), id, (long long)values,
                                          (Py_ssize_t)kl_type_bytes(type, values),
                                          blocks == NULL || blocks->quantize ? Py_True : Py_False));
    }
    return list;
}

/* codebooks() -> {name: (values a row, bytes)}: constants of the IQ formats, for the reference */
static PyObject *py_codebooks(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
#define BOOK(table) (int)sizeof table[0], (const char *)table, (Py_ssize_t)sizeof table
    return Py_BuildValue("{s(iy#)s(iy#)s(iy#)s(iy#)s(iy#)s(iy#)}", "iq1", BOOK(kl_iq1_grid),
                         "iq2_xxs", BOOK(kl_iq2_xxs_grid), "iq2_xs", BOOK(kl_iq2_xs_grid), "iq2_s",
                         BOOK(kl_iq2_s_grid), "iq3_xxs", BOOK(kl_iq3_xxs_grid), "iq3_s",
                         BOOK(kl_iq3_s_grid));
#undef BOOK
}

/* number of bytes of the rows; fails the call where the sizes are no rows of the type */
static int64_t bytes_of(kl_py_call *c, int type, int64_t rows, int64_t cols)
{
    const int64_t n = kl_py_size(c, "x", rows, cols, 1, 1), block = kl_type_block((kl_type)type);
    if (!c->failed && (block == 0 || cols % block != 0))
        kl_py_refuse(
            c, PyExc_ValueError,
            "type is %d with rows of %lld values; it must be a known type and whole blocks", type,
            (long long)cols);
    return c->failed ? 0 : (int64_t)kl_type_bytes((kl_type)type, n);
}

static PyObject *py_quantize(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    int type;
    long long rows, cols;
    if (!PyArg_ParseTuple(args, "OOOiLL:quantize", &ctx, &oy, &ox, &type, &rows, &cols))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_bytes = bytes_of(&c, type, rows, cols);
    void *y = kl_py_out(&c, oy, KL_PY_U8, n_bytes, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, c.failed ? 0 : rows * cols, "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_quantize(c.ctx, y, x, (kl_type)type, rows, cols);
    return kl_py_end(&c);
}

static PyObject *py_dequantize(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    int type;
    long long rows, cols;
    if (!PyArg_ParseTuple(args, "OOOiLL:dequantize", &ctx, &oy, &ox, &type, &rows, &cols))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_bytes = bytes_of(&c, type, rows, cols);
    float *y = kl_py_out(&c, oy, KL_PY_F32, c.failed ? 0 : rows * cols, "out");
    const void *x = kl_py_in(&c, ox, KL_PY_U8, n_bytes, "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_dequantize(c.ctx, y, x, (kl_type)type, rows, cols);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_quant[] = {
    { "types", py_types, METH_NOARGS,
      "Storage types: (name, id, values a block, bytes a block, can be written)." },
    { "codebooks", py_codebooks, METH_NOARGS, "The IQ types' codebooks." },
    { "quantize", py_quantize, METH_VARARGS, NULL },
    { "dequantize", py_dequantize, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
