"""A small call of each op of `kl.ops`, for what is tested of all of them alike."""

import numpy as np

import kimi_linear as kl


def calls_of_every_op():
    """op -> arguments by name, small; tests/test_docs.py sees to it that no op is missing."""
    rng = np.random.default_rng(7)
    T, D, H, K, C, W, E, F, R, P = 9, 20, 2, 6, 12, 3, 8, 7, 5, 3

    def x(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    delta = dict(q=x(T, H, K), k=x(T, H, K) / 3, v=x(T, H, K), g=-np.abs(x(T, H, K)), beta=np.abs(np.tanh(x(T, H))))
    ids = np.sort(rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :2], axis=1).astype(np.int32)
    return {
        "add": dict(a=x(T, D), b=x(T, D)), "sigmoid": dict(x=x(T, D)), "swiglu": dict(gate=x(T, D), up=x(T, D)),
        "situ": dict(gate=x(T, D), up=x(T, D), beta=4.0, linear_beta=25.0),
        "softmax": dict(x=x(T, D)), "rms_norm": dict(x=x(T, D), w=x(D), eps=1e-5),
        "layer_norm": dict(x=x(T, D), w=x(D), b=x(D), eps=1e-6),
        "gated_rms_norm": dict(x=x(T, D), z=x(T, D), w=x(D), eps=1e-5, activation="silu"), "l2_norm": dict(x=x(T, D)),
        "attn_res": dict(snapshots=x(3, T, D), x=x(T, D), w=x(D), eps=1e-5),
        "mhc_expand": dict(x=x(T, D), n=H), "mhc_collapse": dict(x=x(T, H, D)),
        "mhc_pre": dict(x=x(T, H, D), fn=x((2 + H) * H, H * D), base=x((2 + H) * H), scale=x(3), norm_eps=1e-5),
        "mhc_post": dict(y=x(T, D), x=x(T, H, D), post=x(T, H), comb=x(T, H, H)),
        "embedding": dict(ids=np.array([3, 0, 3]), table=x(E, D)), "linear": dict(x=x(T, D), w=x(F, D), bias=x(F)),
        "short_conv": dict(x=x(T, C), w=x(C, W), history=x(W - 1, C)),
        "decay_gate": dict(f=x(T, H, K), rate=np.abs(x(H)), dt_bias=x(H, K)), "delta_rule": delta,
        "delta_rule_intra": delta | {"chunk": 4}, "decay_cumsum": dict(g=delta["g"], chunk=4),
        "delta_rule_inter": dict(q=x(T, H, K), k=x(T, H, K), g=delta["g"], P=x(T, H, 4), W=x(T, H, K), U=x(T, H, K),
                                 initial_state=x(H, K, K), chunk=4),
        "latent_attention": dict(q=x(T, H, K + P), latent=x(T, R), k_shared=x(T, P), w_uk=x(H, K, R), w_uv=x(H, F, R),
                                 scale=0.3),
        "index_pool": dict(k=x(T, D), gate=x(T, D), ape=x(4, D)),
        "index_scores": dict(q=x(T, H, D), keys=x(5, D), weights=x(T, H), scale=0.3, pool=4, positions=23),
        "index_select": dict(q=x(T, H, D), keys=x(5, D), weights=x(T, H), topk=8, pool=4, positions=23),
        "rope": dict(x=x(T, H, K), positions=np.arange(2, T + 2), base=1e4, rotary=K // 2 * 2),
        "attention": dict(q=x(T, 2 * H, K), k=x(T, H, K), v=x(T, H, F), scale=0.3),
        "sigmoid_gate": dict(x=x(T, D), gate=x(T, D)),
        "route": dict(scores=x(T, E), bias=x(E), k=2, scale=2.4),
        "moe": dict(x=x(T, D), ids=ids, weights=np.abs(x(T, 2)), w_gate=x(E, F, D), w_up=x(E, F, D), w_down=x(E, D, F),
                    shared=(x(F, D), x(F, D), x(D, F))),
        "sample": dict(logits=x(D), temperature=0.8, seed=3, position=5),
        "quantize": dict(x=x(2, 256), type="Q4_K"), "dequantize": dict(q=kl.ops.quantize(x(2, 256), "Q4_K")),
    }
