/* Wrappers of the KDA ops. States come as one array of N states, one behind the other, or None. */
#include "binding.h"

/* Slots over an array of N states of `values` float32 each. */
static kl_slots slots_of(kl_py_call *c, const void *states, int64_t N, int64_t values)
{
    kl_slots slots = { 0 };
    if (states != NULL)
        slots.base = (void *const *)kl_py_pointers(c, N, states, values * (int64_t)sizeof(float));
    return slots;
}

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
    const int64_t n = kl_py_size(&c, "x", T, C, 1, 1), taps = kl_py_size(&c, "w", C, W, 1, 1);
    const int64_t kept = kl_py_size(&c, "history", W > 0 ? W - 1 : 0, C, 1, 1);
    const int64_t all = kl_py_size(&c, "history", N, kept, 1, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    void *history_out = kl_py_out_opt(&c, oout, KL_PY_F32, all, "history_out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x"),
                *w = kl_py_in(&c, ow, KL_PY_F32, taps, "w");
    const void *history_in = kl_py_in_opt(&c, oin, KL_PY_F32, all, "history");
    const int64_t *offsets = kl_py_in(&c, ooffsets, KL_PY_I64, N + 1, "offsets");
    const kl_slots out = slots_of(&c, history_out, N, kept), in = slots_of(&c, history_in, N, kept);
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

static PyObject *py_delta_rule(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oo, *oout, *oq, *ok, *ov, *og, *obeta, *oin, *ooffsets, *omarks, *oof, *okept;
    long long N, T, Hk, Hv, K, V, chunk, n_marks;
    double scale, l2_eps;
    int gate, form, head_map, l2_norm;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOLLLLLLdiiiLpdOOOL:delta_rule", &ctx, &oo, &oout, &oq,
                          &ok, &ov, &og, &obeta, &oin, &ooffsets, &N, &T, &Hk, &Hv, &K, &V, &scale,
                          &gate, &form, &head_map, &chunk, &l2_norm, &l2_eps, &omarks, &oof, &okept,
                          &n_marks))
        return NULL;
    const int64_t keys = kl_py_size(&c, "q", T, Hk, K, 1),
                  values = kl_py_size(&c, "v", T, Hv, V, 1);
    const int64_t state = kl_py_size(&c, "state", Hv, K, V, 1),
                  all = kl_py_size(&c, "state", N, state, 1, 1);
    const int64_t gates = kl_py_size(&c, "g", T, Hv, gate == KL_GATE_CHANNEL ? K : 1, 1);
    float *o = kl_py_out(&c, oo, KL_PY_F32, values, "out");
    void *state_out = kl_py_out_opt(&c, oout, KL_PY_F32, all, "final_state");
    const float *q = kl_py_in(&c, oq, KL_PY_F32, keys, "q"),
                *k = kl_py_in(&c, ok, KL_PY_F32, keys, "k");
    const float *v = kl_py_in(&c, ov, KL_PY_F32, values, "v");
    const float *g = gate == KL_GATE_NONE ? NULL : kl_py_in(&c, og, KL_PY_F32, gates, "g");
    const float *beta = kl_py_in(&c, obeta, KL_PY_F32, kl_py_size(&c, "beta", T, Hv, 1, 1), "beta");
    const void *state_in = kl_py_in_opt(&c, oin, KL_PY_F32, all, "initial_state");
    const int64_t *offsets = kl_py_in(&c, ooffsets, KL_PY_I64, N + 1, "offsets");
    const kl_slots out = slots_of(&c, state_out, N, state), in = slots_of(&c, state_in, N, state);
    const int64_t *marks = kl_py_in_opt(&c, omarks, KL_PY_I64, n_marks, "checkpoints");
    const int64_t *of = kl_py_in_opt(&c, oof, KL_PY_I64, N + 1, "checkpoint_offsets");
    float *kept = kl_py_out_opt(&c, okept, KL_PY_F32,
                                kl_py_size(&c, "checkpoints", n_marks, state, 1, 1), "kept");
    const kl_delta_rule_args a = { .offsets = offsets,
                                   .N = N,
                                   .T = T,
                                   .Hk = Hk,
                                   .Hv = Hv,
                                   .K = K,
                                   .V = V,
                                   .scale = (float)scale,
                                   .gate = (kl_gate)gate,
                                   .form = (kl_form)form,
                                   .head_map = (kl_head_map)head_map,
                                   .chunk = chunk,
                                   .l2_norm = l2_norm,
                                   .l2_eps = (float)l2_eps,
                                   .checkpoints = marks,
                                   .checkpoint_offsets = of,
                                   .kept = kept };
    if (kl_py_begin(&c, ctx))
        c.status = kl_delta_rule(c.ctx, o, out, q, k, v, g, beta, in, &a);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_kda[] = {
    { "short_conv", py_short_conv, METH_VARARGS, NULL },
    { "decay_gate", py_decay_gate, METH_VARARGS, NULL },
    { "delta_rule", py_delta_rule, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
