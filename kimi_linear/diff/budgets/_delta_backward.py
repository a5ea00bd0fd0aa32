"""Budget of the delta rule's gradients: docs/math.md#delta_rule_backward."""

import numpy as np

from ..._float64 import f64, sequences
from ...reference_delta import chunks_of, key_heads, of_value_heads, states_from
from ...reference_delta_backward import delta_rule_backward as exact
from ._basic import FLUSH, U
from ._delta import EXP, column_norm

__all__ = ["delta_rule_backward"]

CHUNK = 64  # tokens whose terms a kernel may add up apart


def delta_rule_backward(ref, do, q, k, v, g, beta, dstate=None, scale=None, initial_state=None, offsets=None,
                        l2_norm=False, l2_eps=1e-6, head_map="grouped", form="chunked", stored=0.0):
    """Running bounds beside both passes in float64: of the state's error on the way up, of that of its gradient on the
    way down, each carried by element and by the 2-norm of columns, as in `delta_rule`. What meets in a chunk's sums is
    carried beside them by size, of which a kernel loses `count` roundings.

    Chunked kernels make dg of running sums, in which the terms of pairs of tokens cancel that are both behind a token.
    Those of a token with itself and those of the last with what follows have no decay: they are the same products on
    both sides and may lose what sums in float32 lose, not what a narrow type rounds. With form="recurrent" nothing is
    allowed for all this, and a chunk is a token.
    """
    given, (T, Hv, V), (_, Hk, K) = (f64(q), f64(k)), np.shape(v), np.shape(q)
    do, v, beta = f64(do), f64(v), f64(beta)
    gate, scale = f64(g), K**-0.5 if scale is None else scale
    key, normed = 4 * stored, given
    if l2_norm:
        normed = [x / np.sqrt((x * x).sum(-1, keepdims=True) + l2_eps) for x in given]
        key += (K / 32 + 8) * U + 2 * stored
    q, k, g = of_value_heads(*normed, gate, Hv, scale, head_map)
    step = 1 if form == "recurrent" else CHUNK
    lost = (K + V + 4 * step + 16) * U + key
    ranges = sequences(T, offsets)
    S = states_from(initial_state, (len(ranges), Hv, K, V))
    A = states_from(dstate, S.shape)
    bounds = [np.zeros(x.shape) for x in (q, k, v, g, beta, S)]
    with np.errstate(invalid="ignore", over="ignore"):
        for n, r in enumerate(ranges):
            up, kept = _Up(S[n], lost), []
            for part in chunks_of(r, step):
                up.begin()
                kept.append([up.token(*row) for row in zip(k[part], v[part], g[part], beta[part])])
            down, chunks = _Down(A[n], lost, lost - key, scale), chunks_of(r, step)
            for part, tokens in zip(reversed(chunks), reversed(kept)):
                down.begin(tokens[-1], form)
                for t, token in reversed(list(zip(range(part.start, part.stop), tokens))):
                    for whole, bound in zip(bounds, down.token(token, do[t], q[t], k[t], g[t], beta[t])):
                        whole[t] = bound
            bounds[-1][n] = (down.B + lost * down.M) if r.stop > r.start else 0.0
        dq, dk, dv, dg, dbeta, dS = bounds
        if l2_norm:
            ref = exact(do, *normed, v, gate, beta, dstate=dstate, scale=scale, initial_state=initial_state,
                        offsets=offsets, head_map=head_map)
        heads = key_heads(Hk, Hv, head_map)
        dq, dk = (_of_key_heads(x, r, heads, Hv // Hk) for x, r in ((dq, ref[0]), (dk, ref[1])))
        if l2_norm:
            dq, dk = (_through_norm(e, r, x, l2_eps, (K / 16 + 16) * U + 2 * stored)
                      for e, r, x in zip((dq, dk), ref, given))
    return dq, dk, dv, dg if gate.ndim == 3 else dg.sum(-1), dbeta, dS.reshape(np.shape(ref[5]))


class _Up:
    """The recurrence of `delta_rule`: S [H, K, V]; E and e, what its error is by element and by column; M, the size of
    what has met in it since the chunk began."""

    def __init__(self, S, lost):
        self.S, self.lost = S, lost
        self.E = np.zeros(S.shape)
        self.e = np.zeros((S.shape[0], 1, S.shape[2]))

    def begin(self):
        """A chunk begins: its state is one value."""
        self.M = np.abs(self.S) + self.E

    def token(self, k, v, g, beta):
        """What the way down needs of one token, each [H, ..]: the state before its write and behind it, the correction
        and the error of the read; of each its error and its size."""
        a, k, v, beta = np.exp(g)[:, :, None], k[:, :, None], v[:, None], beta[:, None, None]
        beta1 = np.abs(beta)
        k1, k2, K = np.abs(k), column_norm(k), k.shape[1]
        here = EXP * U * a * (np.abs(self.S) + self.E) + FLUSH * (1 + np.abs(self.S))
        S, E, M = a * self.S, a * self.E + here, a * self.M
        e = np.minimum(a.max(1, keepdims=True) * self.e + column_norm(here), column_norm(E))
        before = S, E + self.lost * M + FLUSH, M

        size = np.abs(v) + (k1 * M).sum(1, keepdims=True)
        rounded = self.lost * size + FLUSH * (K + (1 + M).sum(1, keepdims=True))
        inherited = np.minimum(k2 * e, (k1 * E).sum(1, keepdims=True))
        error = v - (k * S).sum(1, keepdims=True)
        d = beta * error, beta1 * (inherited + rounded) + U * rounded + FLUSH  # beta 0: T may have been pivoted
        wide = np.abs(d[0]) + d[1]

        E, M = E + k1 * d[1], M + k1 * wide
        e = np.minimum(_grow(beta, k2) * e + k2 * ((beta1 + U) * rounded + FLUSH), column_norm(E))
        self.S, self.E, self.e, self.M = S + k * d[0], np.minimum(E, e), e, M
        return before, (self.S, self.E + self.lost * M + FLUSH, M), d, (error, inherited + rounded, size)


class _Down:
    """The gradient A [H, K, V] of the state; B and b, what its error is by element and by column; M, the size of what
    has met in it since the chunk's last token; X, of what cancels in a running sum of terms of g, and Y, of what
    cancels there undecayed."""

    def __init__(self, A, lost, summed, scale):
        self.A, self.lost, self.summed, self.scale = A, lost, summed, abs(scale)
        self.B = np.zeros(A.shape)
        self.b = np.zeros((A.shape[0], 1, A.shape[2]))
        self.M = np.abs(A)

    def begin(self, last, form):
        """A chunk whose last token is `last`."""
        self.M = np.abs(self.A) + self.B
        self.sums, self.first = form != "recurrent", True
        self.X, self.Y = (last[0][2] * self.M).sum(-1), 0.0

    def token(self, token, do, q, k, g, beta):
        """The bounds of dq, dk [H, K], dv [H, V], dg [H, K], dbeta [H] of one token."""
        (R, e_R, M_R), (_, e_S, M_S), (d, e_d), (error, e_error, size) = token
        a, q, k, do = np.exp(g)[:, :, None], q[:, :, None], k[:, :, None], do[:, None]
        q1, k1, k2, do1, beta = np.abs(q), np.abs(k), column_norm(k), np.abs(do), beta[:, None, None]
        beta1 = np.abs(beta)
        lost, K, V = self.lost, k.shape[1], do.shape[2]
        wide_d = np.abs(d) + e_d

        dq = self.scale * ((e_S + lost * M_S) * do1).sum(-1) + FLUSH * (V + (1 + M_S).sum(-1) + do1.sum(-1))
        of_q, of_k = (q1 * M_R * do1).sum(-1), (k1 * self.M * wide_d).sum(-1)
        undecayed = (q1 * k1 * do1 * wide_d).sum(-1)

        # A + q do^T, and what the key reads of it
        A, M = self.A + q * do, self.M + q1 * do1
        read = (k * A).sum(1, keepdims=True)
        rounded = lost * (k1 * M).sum(1, keepdims=True) + FLUSH * (K + (1 + M).sum(1, keepdims=True))
        e_read = np.minimum(k2 * self.b, (k1 * self.B).sum(1, keepdims=True)) + rounded
        wide_read = np.abs(read) + e_read
        dbeta = (e_read * np.abs(error) + wide_read * (e_error + lost * size) + FLUSH * (2 + wide_read + size)).sum(-1)
        e_v = beta1 * (e_read + 2 * U * wide_read) + FLUSH
        dv, wide_v = beta * read, beta1 * wide_read + FLUSH

        e_A = self.B + lost * M + FLUSH
        dk = (e_A * wide_d + np.abs(A) * e_d + e_R * wide_v + (np.abs(R) + e_R) * e_v + lost * M_R * wide_v).sum(-1)
        dk = dk + FLUSH * (2 * V + (wide_d + wide_v + M + M_R).sum(-1))

        # A - k dv^T, and through the decay
        A, B, M = A - k * dv, self.B + k1 * e_v, M + k1 * wide_v
        b = np.minimum(_grow(beta, k2) * self.b + k2 * (beta1 * (rounded + 2 * U * wide_read) + FLUSH), column_norm(B))
        B = np.minimum(B, b)
        dg = ((B + lost * M + FLUSH) * (np.abs(R) + e_R) + np.abs(A) * e_R + FLUSH * (2 + M + M_R)).sum(-1)
        self.X = self.X + of_q + (k1 * M_R * wide_v).sum(-1) + (0.0 if self.first else of_k)
        self.Y, self.first = self.Y + undecayed + (of_k if self.first else 0.0), False
        dg = dg + (lost * self.X + self.summed * self.Y if self.sums else lost * (M * M_R).sum(-1))
        here = EXP * U * a * (np.abs(A) + B) + FLUSH * (1 + np.abs(A))
        self.A, self.M = a * A, a * M
        B = a * B + here
        self.b = np.minimum(a.max(1, keepdims=True) * b + column_norm(here), column_norm(B))
        self.B = np.minimum(B, self.b)
        return dq, dk, e_v[:, 0], dg, dbeta[:, 0]


def _grow(beta, k2):
    """The 2-norm of I - beta k k^T."""
    return np.maximum(1, np.abs(1 - beta * k2 * k2))



def _of_key_heads(error, ref, heads, group):
    """Bounds of a sum over the value heads of each key head; what cancels in it is covered by the sum of bounds."""
    out = np.zeros(np.shape(ref))
    np.add.at(out, (slice(None), heads), error)
    return out + group * U * np.abs(ref)


def _through_norm(error, dy, x, eps, lost):
    """The bound of inverse (dy - y <y, dy>), y = inverse x, where `error` is dy's."""
    inverse = 1 / np.sqrt((x * x).sum(-1, keepdims=True) + eps)
    y, wide = np.abs(x * inverse), np.abs(dy) + error
    return inverse * (error + y * (y * error).sum(-1, keepdims=True)
                      + lost * (wide + y * (y * wide).sum(-1, keepdims=True))) + FLUSH * (1 + inverse)
