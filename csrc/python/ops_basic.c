/* Wrappers of the elementwise ops, the norms and attn_res. */
#include "binding.h"

static PyObject *py_add(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *oa, *ob;
    long long n;
    if (!PyArg_ParseTuple(args, "OOOOL:add", &ctx, &oy, &oa, &ob, &n))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *a = kl_py_in(&c, oa, KL_PY_F32, n, "a"), *b = kl_py_in(&c, ob, KL_PY_F32, n, "b");
    if (kl_py_begin(&c, ctx))
        c.status = kl_add(c.ctx, y, a, b, n);
    return kl_py_end(&c);
}

static PyObject *py_sigmoid(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    long long n;
    if (!PyArg_ParseTuple(args, "OOOL:sigmoid", &ctx, &oy, &ox, &n))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_sigmoid(c.ctx, y, x, n);
    return kl_py_end(&c);
}

static PyObject *py_swiglu(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ogate, *oup;
    long long n;
    float limit;
    if (!PyArg_ParseTuple(args, "OOOOLf:swiglu", &ctx, &oy, &ogate, &oup, &n, &limit))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *gate = kl_py_in(&c, ogate, KL_PY_F32, n, "gate"),
                *up = kl_py_in(&c, oup, KL_PY_F32, n, "up");
    if (kl_py_begin(&c, ctx))
        c.status = kl_swiglu(c.ctx, y, gate, up, n, limit);
    return kl_py_end(&c);
}

static PyObject *py_situ(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ogate, *oup;
    long long n;
    kl_situ_betas betas;
    if (!PyArg_ParseTuple(args, "OOOOLff:situ", &ctx, &oy, &ogate, &oup, &n, &betas.beta,
                          &betas.linear_beta))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *gate = kl_py_in(&c, ogate, KL_PY_F32, n, "gate"),
                *up = kl_py_in(&c, oup, KL_PY_F32, n, "up");
    if (kl_py_begin(&c, ctx))
        c.status = kl_situ(c.ctx, y, gate, up, n, &betas);
    return kl_py_end(&c);
}

static PyObject *py_sigmoid_gate(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *ogate;
    long long T, D, G;
    if (!PyArg_ParseTuple(args, "OOOOLLL:sigmoid_gate", &ctx, &oy, &ox, &ogate, &T, &D, &G))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1), n_gate = kl_py_size(&c, "gate", T, G, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"),
                *gate = kl_py_in(&c, ogate, KL_PY_F32, n_gate, "gate");
    if (kl_py_begin(&c, ctx))
        c.status = kl_sigmoid_gate(c.ctx, y, x, gate, T, D, G);
    return kl_py_end(&c);
}

static PyObject *py_softmax(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    long long T, D;
    if (!PyArg_ParseTuple(args, "OOOLL:softmax", &ctx, &oy, &ox, &T, &D))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_softmax(c.ctx, y, x, T, D);
    return kl_py_end(&c);
}

static PyObject *py_rms_norm(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *ow;
    long long T, D;
    double eps;
    if (!PyArg_ParseTuple(args, "OOOOLLd:rms_norm", &ctx, &oy, &ox, &ow, &T, &D, &eps))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"), *w = kl_py_in(&c, ow, KL_PY_F32, D, "w");
    if (kl_py_begin(&c, ctx))
        c.status = kl_rms_norm(c.ctx, y, x, w, T, D, (float)eps);
    return kl_py_end(&c);
}

static PyObject *py_layer_norm(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *ow, *ob;
    long long T, D;
    double eps;
    if (!PyArg_ParseTuple(args, "OOOOOLLd:layer_norm", &ctx, &oy, &ox, &ow, &ob, &T, &D, &eps))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"), *w = kl_py_in(&c, ow, KL_PY_F32, D, "w"),
                *b = kl_py_in(&c, ob, KL_PY_F32, D, "b");
    if (kl_py_begin(&c, ctx))
        c.status = kl_layer_norm(c.ctx, y, x, w, b, T, D, (float)eps);
    return kl_py_end(&c);
}

static PyObject *py_gated_rms_norm(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *oz, *ow;
    long long T, D;
    double eps;
    int activation;
    if (!PyArg_ParseTuple(args, "OOOOOLLdi:gated_rms_norm", &ctx, &oy, &ox, &oz, &ow, &T, &D, &eps,
                          &activation))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"), *z = kl_py_in(&c, oz, KL_PY_F32, n, "z");
    const float *w = kl_py_in(&c, ow, KL_PY_F32, D, "w");
    if (kl_py_begin(&c, ctx))
        c.status =
            kl_gated_rms_norm(c.ctx, y, x, z, w, T, D, (float)eps, (kl_activation)activation);
    return kl_py_end(&c);
}

static PyObject *py_l2_norm(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    long long T, D;
    double eps;
    if (!PyArg_ParseTuple(args, "OOOLLd:l2_norm", &ctx, &oy, &ox, &T, &D, &eps))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_l2_norm(c.ctx, y, x, T, D, (float)eps);
    return kl_py_end(&c);
}

static PyObject *py_attn_res(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *osnapshots, *ox, *ow;
    long long n, T, D;
    double eps;
    if (!PyArg_ParseTuple(args, "OOOOOLLLd:attn_res", &ctx, &oy, &osnapshots, &ox, &ow, &n, &T, &D,
                          &eps))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t size = kl_py_size(&c, "x", T, D, 1, 1),
                  past = kl_py_size(&c, "snapshots", n, T, D, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, size, "out");
    const float *snapshots = kl_py_in(&c, osnapshots, KL_PY_F32, past, "snapshots"),
                *x = kl_py_in(&c, ox, KL_PY_F32, size, "x"),
                *w = kl_py_in(&c, ow, KL_PY_F32, D, "w");
    if (kl_py_begin(&c, ctx))
        c.status = kl_attn_res(c.ctx, y, snapshots, x, w, n, T, D, (float)eps);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_basic[] = {
    { "add", py_add, METH_VARARGS, NULL },
    { "sigmoid", py_sigmoid, METH_VARARGS, NULL },
    { "swiglu", py_swiglu, METH_VARARGS, NULL },
    { "situ", py_situ, METH_VARARGS, NULL },
    { "sigmoid_gate", py_sigmoid_gate, METH_VARARGS, NULL },
    { "softmax", py_softmax, METH_VARARGS, NULL },
    { "rms_norm", py_rms_norm, METH_VARARGS, NULL },
    { "layer_norm", py_layer_norm, METH_VARARGS, NULL },
    { "gated_rms_norm", py_gated_rms_norm, METH_VARARGS, NULL },
    { "l2_norm", py_l2_norm, METH_VARARGS, NULL },
    { "attn_res", py_attn_res, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
