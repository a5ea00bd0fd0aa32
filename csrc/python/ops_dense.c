/* Wrappers of the matrix products and what routes between them, and of hyper-connections. */
#include "binding.h"

enum { MAX_WEIGHTS = 7 }; /* of one linear: three buffers each, within KL_PY_MAX_BUFFERS */

static PyObject *py_embedding(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *oids, *otable;
    long long T;
    if (!PyArg_ParseTuple(args, "OOOOL:embedding", &ctx, &oy, &oids, &otable, &T))
        return NULL;
    kl_py_on(&c, ctx);
    const kl_weight table = kl_py_weight(&c, otable, "table");
    float *y = kl_py_out(&c, oy, KL_PY_F32, kl_py_size(&c, "out", T, table.cols, 1, 1), "out");
    const int32_t *ids = kl_py_host_in(&c, oids, KL_PY_I32, T, "ids");
    if (!c.failed && table.n != 1)
        kl_py_refuse(&c, PyExc_ValueError, "table must be one matrix");
    if (kl_py_begin(&c, ctx))
        c.status = kl_embedding(c.ctx, y, ids, &table, T);
    return kl_py_end(&c);
}

/* The i-th weight; one that is stored [cols, rows] comes with those sizes and the flag. */
static kl_weight weight_of(kl_py_call *c, PyObject *o, int transposed)
{
    kl_weight w = kl_py_weight(c, o, "w");
    if (transposed) {
        const int64_t rows = w.cols;
        w.cols = w.rows;
        w.rows = rows;
        w.transposed = 1;
    }
    return w;
}

/* linear(ctx, [out], x, [weight], [bias or None], [transposed], T, D) */
static PyObject *py_linear(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *ox, *lists[4]; /* out, w, bias, transposed */
    long long T, D;
    kl_weight w[MAX_WEIGHTS];
    float *y[MAX_WEIGHTS];
    const float *bias[MAX_WEIGHTS];
    if (!PyArg_ParseTuple(args, "OOOOOOLL:linear", &ctx, &lists[0], &ox, &lists[1], &lists[2],
                          &lists[3], &T, &D))
        return NULL;
    PyObject *items[4] = { NULL };
    for (int i = 0; i < 4 && !c.failed; i++) {
        items[i] = kl_py_items(lists[i], "out, w, bias and transposed must be lists");
        c.failed = items[i] == NULL;
    }
    const Py_ssize_t n = c.failed ? 0 : PyTuple_Size(items[1]);
    for (int i = 0; i < 4 && !c.failed; i++)
        c.failed = n > MAX_WEIGHTS || PyTuple_Size(items[i]) != n;
    if (c.failed && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError,
                     "w has %zd weights; it must be up to %d, with an out, a bias and a flag each",
                     n, MAX_WEIGHTS);
    kl_py_on(&c, ctx);
    const float *x = kl_py_in(&c, ox, KL_PY_F32, kl_py_size(&c, "x", T, D, 1, 1), "x");
    for (Py_ssize_t i = 0; i < n && !c.failed; i++) {
        const int transposed = PyObject_IsTrue(PyTuple_GetItem(items[3], i));
        if (transposed < 0) {
            c.failed = true;
            break;
        }
        w[i] = weight_of(&c, PyTuple_GetItem(items[1], i), transposed);
        const int64_t rows = kl_py_size(&c, "w", w[i].n, w[i].rows, 1, 1);
        y[i] = kl_py_out(&c, PyTuple_GetItem(items[0], i), KL_PY_F32,
                         kl_py_size(&c, "out", T, rows, 1, 1), "out");
        bias[i] = kl_py_in_opt(&c, PyTuple_GetItem(items[2], i), KL_PY_F32, rows, "bias");
    }
    if (kl_py_begin(&c, ctx))
        c.status = kl_linear(c.ctx, y, x, w, bias, (int)n, T, D);
    PyObject *result = kl_py_end(&c);
    for (int i = 0; i < 4; i++)
        Py_XDECREF(items[i]);
    return result;
}

static PyObject *py_route(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oids, *oweights, *oscores, *obias;
    long long T, E, k, groups, top_groups;
    int function, renormalise;
    double scale;
    if (!PyArg_ParseTuple(args, "OOOOOLLLLLipd:route", &ctx, &oids, &oweights, &oscores, &obias, &T,
                          &E, &k, &groups, &top_groups, &function, &renormalise, &scale))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "ids", T, k, 1, 1);
    int32_t *ids = kl_py_out(&c, oids, KL_PY_I32, n, "ids");
    float *weights = kl_py_out(&c, oweights, KL_PY_F32, n, "weights");
    const float *scores =
        kl_py_in(&c, oscores, KL_PY_F32, kl_py_size(&c, "scores", T, E, 1, 1), "scores");
    const float *bias = kl_py_in_opt(&c, obias, KL_PY_F32, E, "bias");
    const kl_route_args a = {
        T, E, k, groups, top_groups, (kl_router)function, renormalise, (float)scale, 0
    };
    if (kl_py_begin(&c, ctx))
        c.status = kl_route(c.ctx, ids, weights, scores, bias, &a);
    return kl_py_end(&c);
}

static PyObject *py_moe(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *oids, *oweights, *ogate, *oup, *odown, *oshared;
    long long T, D, F, k;
    kl_situ_betas betas; /* beta 0: swiglu */
    float limit;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOLLLLfff:moe", &ctx, &oy, &ox, &oids, &oweights, &ogate,
                          &oup, &odown, &oshared, &T, &D, &F, &k, &betas.beta, &betas.linear_beta,
                          &limit))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, D, 1, 1), pairs = kl_py_size(&c, "ids", T, k, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
    const int32_t *ids = kl_py_in(&c, oids, KL_PY_I32, pairs, "ids");
    const float *weights = kl_py_in(&c, oweights, KL_PY_F32, pairs, "weights");
    const kl_weight gate = kl_py_weight(&c, ogate, "w_gate"), up = kl_py_weight(&c, oup, "w_up");
    const kl_weight down = kl_py_weight(&c, odown, "w_down");
    const float *shared = kl_py_in_opt(&c, oshared, KL_PY_F32, n, "shared");
    if (kl_py_begin(&c, ctx))
        c.status = kl_moe(c.ctx, y, x, ids, weights, &gate, &up, &down, shared, T, D, F, k,
                          betas.beta == 0.0f ? NULL : &betas, limit);
    return kl_py_end(&c);
}

static PyObject *py_mhc_pre(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *opost, *ocomb, *ox, *ofn, *obase, *oscale;
    kl_mhc_args a;
    long long T, n, D, iters;
    if (!PyArg_ParseTuple(args, "OOOOOOOOLLLffL:mhc_pre", &ctx, &oy, &opost, &ocomb, &ox, &ofn,
                          &obase, &oscale, &T, &n, &D, &a.norm_eps, &a.eps, &iters))
        return NULL;
    a.T = T, a.n = n, a.D = D, a.iters = iters;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, kl_py_size(&c, "out", T, D, 1, 1), "out"),
          *post = kl_py_out(&c, opost, KL_PY_F32, kl_py_size(&c, "post", T, n, 1, 1), "post"),
          *comb = kl_py_out(&c, ocomb, KL_PY_F32, kl_py_size(&c, "comb", T, n, n, 1), "comb");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, kl_py_size(&c, "x", T, n, D, 1), "x");
    const kl_weight fn = kl_py_weight(&c, ofn, "fn");
    const float *base = kl_py_in(&c, obase, KL_PY_F32,
                                 /* n is no longer than comb by now */
                                 c.failed ? 0 : kl_py_size(&c, "base", 2 + n, n, 1, 1), "base"),
                *scale = kl_py_in(&c, oscale, KL_PY_F32, 3, "scale");
    if (kl_py_begin(&c, ctx))
        c.status = kl_mhc_pre(c.ctx, y, post, comb, x, &fn, base, scale, &a);
    return kl_py_end(&c);
}

static PyObject *py_mhc_post(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oout, *oy, *ox, *opost, *ocomb;
    long long T, n, D;
    if (!PyArg_ParseTuple(args, "OOOOOOLLL:mhc_post", &ctx, &oout, &oy, &ox, &opost, &ocomb, &T, &n,
                          &D))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t size = kl_py_size(&c, "x", T, n, D, 1);
    float *out = kl_py_out(&c, oout, KL_PY_F32, size, "out");
    const float *y = kl_py_in(&c, oy, KL_PY_F32, kl_py_size(&c, "y", T, D, 1, 1), "y"),
                *x = kl_py_in(&c, ox, KL_PY_F32, size, "x"),
                *post = kl_py_in(&c, opost, KL_PY_F32, kl_py_size(&c, "post", T, n, 1, 1), "post"),
                *comb = kl_py_in(&c, ocomb, KL_PY_F32, kl_py_size(&c, "comb", T, n, n, 1), "comb");
    if (kl_py_begin(&c, ctx))
        c.status = kl_mhc_post(c.ctx, out, y, x, post, comb, T, n, D);
    return kl_py_end(&c);
}

static PyObject *py_mhc_expand(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    long long T, n, D;
    if (!PyArg_ParseTuple(args, "OOOLLL:mhc_expand", &ctx, &oy, &ox, &T, &n, &D))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, kl_py_size(&c, "out", T, n, D, 1), "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, kl_py_size(&c, "x", T, D, 1, 1), "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_mhc_expand(c.ctx, y, x, T, n, D);
    return kl_py_end(&c);
}

static PyObject *py_mhc_collapse(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox;
    long long T, n, D;
    if (!PyArg_ParseTuple(args, "OOOLLL:mhc_collapse", &ctx, &oy, &ox, &T, &n, &D))
        return NULL;
    kl_py_on(&c, ctx);
    float *y = kl_py_out(&c, oy, KL_PY_F32, kl_py_size(&c, "out", T, D, 1, 1), "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, kl_py_size(&c, "x", T, n, D, 1), "x");
    if (kl_py_begin(&c, ctx))
        c.status = kl_mhc_collapse(c.ctx, y, x, T, n, D);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_dense[] = {
    { "embedding", py_embedding, METH_VARARGS, NULL },
    { "linear", py_linear, METH_VARARGS, NULL },
    { "route", py_route, METH_VARARGS, NULL },
    { "moe", py_moe, METH_VARARGS, NULL },
    { "mhc_expand", py_mhc_expand, METH_VARARGS, NULL },
    { "mhc_collapse", py_mhc_collapse, METH_VARARGS, NULL },
    { "mhc_pre", py_mhc_pre, METH_VARARGS, NULL },
    { "mhc_post", py_mhc_post, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
