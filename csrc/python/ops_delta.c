/* Wrappers of the delta rule, of its halves and of the cumulative gate. */
#include "binding.h"

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
    kl_py_on(&c, ctx);
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
    const int64_t *offsets = kl_py_offsets(&c, ooffsets, N, "offsets");
    const kl_slots out = kl_py_slots(&c, state_out, N, state),
                   in = kl_py_slots(&c, state_in, N, state);
    const int64_t *marks = kl_py_in_opt(&c, omarks, KL_PY_I64, n_marks, "checkpoints");
    const int64_t *of = oof == Py_None ? NULL : kl_py_offsets(&c, oof, N, "checkpoint_offsets");
    if (!c.failed && of != NULL && of[N] > n_marks) /* that they rise to it, the op checks */
        kl_py_refuse(&c, PyExc_ValueError,
                     "checkpoint_offsets end at %lld; there are %lld checkpoints", (long long)of[N],
                     n_marks);
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

/* What the halves share: the buffers that both read, and the sizes of those that one reads and the other writes. */
typedef struct halves {
    PyObject *q, *k, *g, *offsets;
    long long N, T, Hk, Hv, K, V, chunk;
    double scale;
    int gate, head_map;
    int64_t squares, keys, values, states; /* values in L, P, T; in W; in U, o, d; in all states */
    const float *q_values, *k_values, *g_values;
    kl_delta_rule_args args;
} halves;

static void borrow(kl_py_call *c, halves *h)
{
    const int64_t keys = kl_py_size(c, "q", h->T, h->Hk, h->K, 1);
    const int64_t gates = kl_py_size(c, "g", h->T, h->Hv, h->gate == KL_GATE_CHANNEL ? h->K : 1, 1);
    h->squares = kl_py_size(c, "P", h->T, h->Hv, h->chunk, 1);
    h->keys = kl_py_size(c, "W", h->T, h->Hv, h->K, 1);
    h->values = kl_py_size(c, "U", h->T, h->Hv, h->V, 1);
    h->states = kl_py_size(c, "state", h->N, h->Hv, h->K, h->V);
    h->q_values = kl_py_in(c, h->q, KL_PY_F32, keys, "q");
    h->k_values = kl_py_in(c, h->k, KL_PY_F32, keys, "k");
    h->g_values = h->gate == KL_GATE_NONE ? NULL : kl_py_in(c, h->g, KL_PY_F32, gates, "g");
    h->args = (kl_delta_rule_args){
        .offsets = kl_py_offsets(c, h->offsets, h->N, "offsets"),
        .N = h->N,
        .T = h->T,
        .Hk = h->Hk,
        .Hv = h->Hv,
        .K = h->K,
        .V = h->V,
        .scale = (float)h->scale,
        .gate = (kl_gate)h->gate,
        .head_map = (kl_head_map)h->head_map,
        .chunk = h->chunk,
    };
}

static PyObject *py_delta_rule_intra(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    halves h = { 0 };
    PyObject *ctx, *oL, *oP, *oT, *oW, *oU, *ov, *obeta;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOOLLLLLLdiiL:delta_rule_intra", &ctx, &oL, &oP, &oT, &oW,
                          &oU, &h.q, &h.k, &ov, &h.g, &obeta, &h.offsets, &h.N, &h.T, &h.Hk, &h.Hv,
                          &h.K, &h.V, &h.scale, &h.gate, &h.head_map, &h.chunk))
        return NULL;
    kl_py_on(&c, ctx);
    borrow(&c, &h);
    float *L = kl_py_out(&c, oL, KL_PY_F32, h.squares, "out[0]"),
          *P = kl_py_out(&c, oP, KL_PY_F32, h.squares, "out[1]"),
          *T = kl_py_out(&c, oT, KL_PY_F32, h.squares, "out[2]"),
          *W = kl_py_out(&c, oW, KL_PY_F32, h.keys, "out[3]"),
          *U = kl_py_out(&c, oU, KL_PY_F32, h.values, "out[4]");
    const float *v = kl_py_in(&c, ov, KL_PY_F32, h.values, "v");
    const int64_t rates = kl_py_size(&c, "beta", h.T, h.Hv, 1, 1);
    const float *beta = kl_py_in(&c, obeta, KL_PY_F32, rates, "beta");
    if (kl_py_begin(&c, ctx))
        c.status = kl_delta_rule_intra(c.ctx, L, P, T, W, U, h.q_values, h.k_values, v, h.g_values,
                                       beta, &h.args);
    return kl_py_end(&c);
}

static PyObject *py_delta_rule_inter(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    halves h = { 0 };
    PyObject *ctx, *oo, *oout, *od, *oP, *oW, *oU, *oin;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOOLLLLLLdiiL:delta_rule_inter", &ctx, &oo, &oout, &od,
                          &h.q, &h.k, &h.g, &oP, &oW, &oU, &oin, &h.offsets, &h.N, &h.T, &h.Hk,
                          &h.Hv, &h.K, &h.V, &h.scale, &h.gate, &h.head_map, &h.chunk))
        return NULL;
    kl_py_on(&c, ctx);
    borrow(&c, &h);
    const int64_t state = kl_py_size(&c, "state", h.Hv, h.K, h.V, 1);
    float *o = kl_py_out(&c, oo, KL_PY_F32, h.values, "out[0]"),
          *d = kl_py_out(&c, od, KL_PY_F32, h.values, "out[2]");
    void *state_out = kl_py_out_opt(&c, oout, KL_PY_F32, h.states, "final_state");
    const float *P = kl_py_in(&c, oP, KL_PY_F32, h.squares, "P"),
                *W = kl_py_in(&c, oW, KL_PY_F32, h.keys, "W"),
                *U = kl_py_in(&c, oU, KL_PY_F32, h.values, "U");
    const void *state_in = kl_py_in_opt(&c, oin, KL_PY_F32, h.states, "initial_state");
    const kl_slots out = kl_py_slots(&c, state_out, h.N, state),
                   in = kl_py_slots(&c, state_in, h.N, state);
    if (kl_py_begin(&c, ctx))
        c.status = kl_delta_rule_inter(c.ctx, o, out, d, h.q_values, h.k_values, h.g_values, P, W,
                                       U, in, &h.args);
    return kl_py_end(&c);
}

static PyObject *py_decay_cumsum(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *out, *og, *ooffsets;
    long long N, T, D, chunk;
    if (!PyArg_ParseTuple(args, "OOOOLLLL:decay_cumsum", &ctx, &out, &og, &ooffsets, &N, &T, &D,
                          &chunk))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "g", T, D, 1, 1);
    float *sums = kl_py_out(&c, out, KL_PY_F32, n, "out");
    const float *g = kl_py_in(&c, og, KL_PY_F32, n, "g");
    const int64_t *offsets = kl_py_offsets(&c, ooffsets, N, "offsets");
    if (kl_py_begin(&c, ctx))
        c.status = kl_decay_cumsum(c.ctx, sums, g, offsets, N, T, D, chunk);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_delta[] = {
    { "delta_rule", py_delta_rule, METH_VARARGS, NULL },
    { "delta_rule_intra", py_delta_rule_intra, METH_VARARGS, NULL },
    { "delta_rule_inter", py_delta_rule_inter, METH_VARARGS, NULL },
    { "decay_cumsum", py_decay_cumsum, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
