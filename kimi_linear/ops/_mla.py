"""Multi-head latent attention over its cache."""

from .. import _core
from .._arrays import as_integers, as_weight, check_shape, output, refuse_shared
from .._names import choice
from .._scalars import as_finite
from ..context import current
from ._cached import both_offsets, one_axis, typed

_FORMS = {"auto": 0, "absorbed": 3, "expanded": 4}


def latent_attention(q, latent, k_shared, w_uk, w_uv, *, scale, offsets=None, kv_offsets=None, select=None,
                     form="auto", out=None, ctx=None):
    """Causal attention whose keys and values are linear in a cached latent vector.

    Head h has the keys ``[w_uk[h] @ latent | k_shared]`` and the values ``w_uv[h] @ latent``; the result is
    ``sum_s softmax_s(scale * q . key_s) value_s``. The new tokens' own positions are the last of the cache:
    query t of T sees the first ``S - T + t + 1`` of S positions, and nothing of the others, NaN included. With `select`
    a query attends to some of those alone, the softmax being over them, and has nothing of the rest.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; selected positions: DeepSeek-V3.2, arXiv:2512.02556.
    Derivation: docs/math.md#latent_attention.

    Parameters
    ----------
    q : (T, H, K + P) float32
        Per head the part that meets `w_uk`, then the part that meets `k_shared`.
    latent : (S, R) float32 or float16
        The cache, after its norm; used as it lies.
    k_shared : (S, P) float32 or float16
        The key part that all heads share; P may be 0.
    w_uk : (H, K, R) float32, float16 or bfloat16
    w_uv : (H, V, R) float32, float16 or bfloat16
    scale : float
        On the scores: (K + P) ** -0.5 in the model, whatever the form.
    offsets : (N+1,) int, optional
        Where the queries of each of N sequences begin; without it, one sequence.
    kv_offsets : (N+1,) int, optional
        Where the positions of each sequence begin; `offsets` where it is not given.
    select : (T, W) integers, optional
        For each query the positions that it attends to, all heads alike: counted from the first of its own sequence,
        rising, none after the query's own, and -1 behind the last. A query with -1 alone gets zeros.
    form : {"auto", "expanded", "absorbed"}
        Compute keys and values, or work on the latents. "auto" decides for each piece of 64 new tokens of a
        sequence: absorbed up to 16 tokens, else expanded. The forms differ by rounding. With `select` it is absorbed.
    out : (T, H, V) float32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    o : (T, H, V) float32
        With a leading batch axis on q, latent, k_shared and `select` (equal lengths, no offsets), so has the result.

    Raises
    ------
    ValueError
        If shapes or offsets disagree, or a sequence has fewer positions than queries, or `out` overlaps an input; if a
        row of `select` has a position that its query does not see, a number below -1, or does not rise, or `form` is
        "expanded" beside it.
    TypeError
        If an array is of another type.
    """
    form = _FORMS[choice(form, "form", _FORMS)]
    scale = as_finite(scale, "scale")
    w_uk, (H, K, R) = as_weight(w_uk, "w_uk", ndim=3)
    w_uv, (uv_heads, V, uv_rank) = as_weight(w_uv, "w_uv", ndim=3)
    if (uv_heads, uv_rank) != (H, R):
        raise ValueError(f"w_uv has shape {[uv_heads, V, uv_rank]}; it must be [{H}, V, {R}], w_uk being "
                         f"[{H}, {K}, {R}]")
    if min(H, K, V, R) < 1:
        raise ValueError(f"w_uk is [{H}, {K}, {R}] and w_uv [{H}, {V}, {R}]; no axis may be empty")
    q, (latent, k_shared), batch, offsets, kv_offsets = one_axis(
        (q, ("T", "H", "K + P")), {"latent": (latent, ("S", "R")), "k_shared": (k_shared, ("S", "P"))}, offsets,
        kv_offsets)
    T, S, P = len(q), len(latent), k_shared.shape[-1]
    check_shape(q, "q", ("T", H, K + P))
    check_shape(latent, "latent", ("S", R))
    check_shape(k_shared, "k_shared", (S, P))
    offsets, kv_offsets = both_offsets(offsets, kv_offsets, T, S)
    select, W = _rows_of(select, batch or (T,))
    o = output(out, (*(batch or (T,)), H, V), like=q)
    refuse_shared(o, q=q, latent=latent, k_shared=k_shared, w_uk=w_uk[0], w_uv=w_uv[0], select=select)
    sizes = (len(offsets) - 1, T, S, H, K, P, V, R, W, 0)
    _core.latent_attention(current(ctx)._core, o, q, *typed(latent), *typed(k_shared), w_uk, w_uv, offsets,
                           kv_offsets, select, sizes, scale, form)
    return o


def _rows_of(select, tokens):
    """(rows of positions, their width); (None, 0) without. The op looks at the positions themselves."""
    if select is None:
        return None, 0
    select = as_integers(select, "select", (*tokens, "W"), low=-(2**31), high=2**31, on_device=True)
    if select.shape[-1] < 1:
        raise ValueError(f"select has shape {list(select.shape)}; W must be >= 1")
    return select, select.shape[-1]
