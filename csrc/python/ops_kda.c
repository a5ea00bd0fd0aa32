/* Wrappers of the KDA ops, but for the delta rule. */
#include "binding.h"

static PyObject *py_short_conv(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *oout, *ox, *ow, *oin, *ooffsets;
    long long N, T, C, W;
    int activation;
    if (!PyArg_ParseTuple(args, "OOOOOOOLLLLi:short_conv", &ctx, &oy, &oout, &ox, &ow, &oin,
                          &ooffsets, &N, &T, &C, &W, &activation))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, C, 1, 1), taps = kl_py_size(&c, "w", C, W, 1, 1);
    const int64_t kept = kl_py_size(&c, "history", W > 0 ? W - 1 : 0, C, 1, 1);
    const int64_t all = kl_py_size(&c, "history", N, kept, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    void *history_out = kl_py_out_opt(&c, oout, KL_PY_F32, all, "history_out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"),
                *w = kl_py_in(&c, ow, KL_PY_F32, taps, "w");
    const void *history_in = kl_py_in_opt(&c, oin, KL_PY_F32, all, "history");
    const int64_t *offsets = kl_py_offsets(&c, ooffsets, N, "offsets");
    const kl_slots out = kl_py_slots(&c, history_out, N, kept),
                   in = kl_py_slots(&c, history_in, N, kept);
    if (kl_py_begin(&c, ctx))
        c.status =
            kl_short_conv(c.ctx, y, out, x, w, in, offsets, N, T, C, W, (kl_activation)activation);
    return kl_py_end(&c);
}

static PyObject *py_decay_gate(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *og, *of, *orate, *obias;
    long long T, H, K;
    double lower_bound;
    if (!PyArg_ParseTuple(args, "OOOOOLLLd:decay_gate", &ctx, &og, &of, &orate, &obias, &T, &H, &K,
                          &lower_bound))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t width = kl_py_size(&c, "dt_bias", H, K, 1, 1),
                  n = kl_py_size(&c, "f", T, width, 1, 1);
    float *g = kl_py_out(&c, og, KL_PY_F32, n, "out");
    const float *f = kl_py_in(&c, of, KL_PY_F32, n, "f"),
                *rate = kl_py_in(&c, orate, KL_PY_F32, H, "rate");
    const float *bias = kl_py_in(&c, obias, KL_PY_F32, width, "dt_bias");
    if (kl_py_begin(&c, ctx))
        c.status = kl_decay_gate(c.ctx, g, f, rate, bias, T, H, K, (float)lower_bound);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_kda[] = {
    { "short_conv", py_short_conv, METH_VARARGS, NULL },
    { "decay_gate", py_decay_gate, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
