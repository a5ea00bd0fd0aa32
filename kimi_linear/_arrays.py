"""Arrays from anywhere, to what the C core takes: contiguous NumPy buffers of the right type and shape.

An input is anything with the buffer protocol, ``__array__`` or ``__dlpack__`` (NumPy, torch on the CPU, ml_dtypes).
float16 and bfloat16 widen exactly to float32; float64 and integers are refused with the cast to write.

What lies on a device (a DeviceArray, a tensor of torch on a GPU) becomes a DeviceArray over the same memory, with the
attributes that ops look at; its values are not looked at, and nothing is converted. `output` makes a result where its
`like` lies.
"""

import ml_dtypes
import numpy as np

from ._masks import unmasked
from .device_array import DeviceArray, from_device
from .quantized import Quantized, storage_types

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", BFLOAT16: "BF16"}
TYPE_IDS = {dtype: storage_types[name].id for dtype, name in _FLOATS.items()}


def as_array(x, name):
    """`x` as a NumPy array of its own dtype; TypeError says what to do where there is none."""
    if isinstance(x, np.ndarray):
        return unmasked(x, name)
    if isinstance(x, DeviceArray):
        raise TypeError(f"{name} lies on a device; give {name}.numpy()")
    if any(c.__module__.split(".")[0] == "torch" for c in type(x).__mro__):
        return _from_torch(x, name)
    if str(getattr(x, "dtype", "")) == "mlx.core.bfloat16":
        return _from_mlx(x)
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        try:
            return np.from_dlpack(x)
        except (BufferError, TypeError, RuntimeError, ValueError) as error:
            raise TypeError(f"{name}: a {type(x).__name__} that NumPy cannot read ({error})") from None
    try:
        a = np.asarray(x)
    except ValueError as error:  # a list of lists of several lengths
        raise ValueError(f"{name} is a {type(x).__name__} that makes no array ({error})") from None
    if a.dtype == object and all(isinstance(v, int) for v in a.flat):
        raise ValueError(f"{name} holds {max(a.flat, key=abs)}; integers must fit 64 bits")
    if a.dtype == object:
        raise TypeError(f"{name} is a {type(x).__name__}; it must be an array of numbers")
    return a


def as_tuple(results):
    """The results of an op, one alone too, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def as_either(x, name):
    """`x` as a NumPy array or, where it lies on a device, as a DeviceArray."""
    device = from_device(x, name)
    return as_array(x, name) if device is None else device


def contiguous(a):
    """`a` with its values in order and at addresses of their size, copied where they are not."""
    if isinstance(a, DeviceArray):
        return a
    a = np.ascontiguousarray(a).reshape(a.shape)
    return a if a.flags.aligned else a.copy()


def share_memory(a, b):
    """Whether two arrays may have memory in common."""
    if isinstance(a, DeviceArray) and isinstance(b, DeviceArray):
        (begin, end), (other_begin, other_end) = a._range, b._range
        return begin < other_end and other_begin < end
    return not isinstance(a, DeviceArray) and not isinstance(b, DeviceArray) and np.may_share_memory(a, b)


def first_where(a, wrong):
    """Index of the first value for which `wrong` is true, or None; the values on a device are not looked at."""
    if isinstance(a, DeviceArray):
        return None
    bad = wrong(a)
    return tuple(int(i) for i in np.argwhere(bad)[0]) if bad.any() else None


def _from_torch(x, name):
    """A torch tensor's memory; bfloat16, which NumPy does not know, as ml_dtypes.bfloat16."""
    if x.device.type != "cpu":
        raise TypeError(f"{name} is a tensor on {x.device}; give {name}.cpu()")
    x = x.detach().resolve_conj().resolve_neg()
    if str(x.dtype) == "torch.bfloat16":
        import torch

        return x.contiguous().view(torch.uint16).numpy().view(BFLOAT16)
    try:
        return x.numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantised, of a type that NumPy has not
        raise TypeError(f"{name}: a tensor of {x.dtype} that NumPy cannot read ({error})") from None


def _from_mlx(x):
    """An mlx array of bfloat16, which the buffer protocol has no letter for."""
    import mlx.core as mx

    return np.asarray(x.view(mx.uint16)).view(BFLOAT16)


def as_float32(x, name, *shapes):
    """`x` as C-contiguous float32, its shape checked.

    Parameters
    ----------
    x : array
    name : str
        The argument, for the message.
    *shapes : tuple of (int or str)
        Shapes allowed; a str is an axis of any length, named for the message.
    """
    a = as_either(x, name)
    if isinstance(a, DeviceArray):
        if a.dtype != np.float32:
            raise TypeError(f"{name} is {a.dtype} on a device; it must be float32 there")
    elif a.dtype in (np.float16, BFLOAT16):
        a = a.astype(np.float32)
    elif a.dtype != np.float32:
        cast = f"{name}.astype('float32')" if hasattr(x, "astype") else f"numpy.asarray({name}, 'float32')"
        raise TypeError(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16: {cast}")
    check_shape(a, name, *shapes)
    return contiguous(a)


def as_integers(x, name, *shapes, dtype=np.int32, low=None, high=None, on_device=False):
    """`x` as C-contiguous `dtype`, every value in [low, high); the first value that is not is named with its place.

    With `on_device` it may lie there, and the op looks at its values; without, it is control data of the host.
    """
    a = from_device(x, name)
    if a is not None:
        if not on_device:
            raise TypeError(f"{name} lies on a device; it must be in host memory")
        if a.dtype != dtype:
            raise TypeError(f"{name} is {a.dtype} on a device; it must be {np.dtype(dtype)} there")
        check_shape(a, name, *shapes)
        return a
    a = as_array(x, name)
    if a.size == 0 and a.dtype == np.float64 and not isinstance(x, np.ndarray):
        a = a.astype(dtype)  # an empty list
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name} is {a.dtype}; it must be an array of integers")
    check_shape(a, name, *shapes)
    if low is not None and a.size:
        bad = (a < low) | (a >= high)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            at = at[0] if len(at) == 1 else at
            raise ValueError(f"{name}[{at}] is {a[at]}; it must be {low} <= {name} < {high}")
    return contiguous(a.astype(dtype, copy=False))


def check_shape(a, name, *shapes):
    """ValueError unless `a.shape` is one of `shapes` (a str is an axis of any length; no shapes: anything)."""
    for shape in shapes:
        if len(shape) == a.ndim and all(isinstance(n, str) or n == m for n, m in zip(shape, a.shape, strict=True)):
            return
    if shapes:
        wanted = " or ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)
        raise ValueError(f"{name} has shape {list(a.shape)}; it must be {wanted}")


def output(out, shape, name="out", dtype=np.float32, like=None):
    """A new array of `shape`, or `out` when it is writable, C-contiguous and of exactly that shape and dtype.

    A new one lies where `like` does; on a device it gets its memory from the context of the call that writes it.
    """
    shape = tuple(shape)
    if out is None:
        return DeviceArray(None, shape, dtype) if isinstance(like, DeviceArray) else np.empty(shape, dtype)
    device = from_device(out, name)
    if device is None and not isinstance(out, np.ndarray):
        raise TypeError(f"{name} is a {type(out).__name__}; it must be a NumPy array, or one on a device")
    out = unmasked(out, name) if device is None else device
    if out.dtype != dtype:
        raise TypeError(f"{name} is {out.dtype}; it must be {np.dtype(dtype)}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {list(out.shape)}; it must be {list(shape)}")
    if device is not None:
        if device._memory.read_only:
            raise ValueError(f"{name} is read-only")
        return device
    if not out.flags.c_contiguous:
        raise ValueError(f"{name} is strided; it must be C-contiguous")
    if not out.flags.aligned:
        raise ValueError(f"{name} begins at an address that is no multiple of {out.itemsize}; it must be aligned")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return out


def outputs(out, count):
    """`out=` of an op with several results, as a ufunc takes it: None, or a tuple with None for those to make."""
    if out is None:
        return (None,) * count
    if not isinstance(out, tuple) or len(out) != count:
        raise TypeError(f"out must be a tuple of {count} arrays (or None each)")
    return out


def refuse_shared(out, **inputs):
    """ValueError where `out` would be written over an input that is still to be read; None and other objects pass."""
    for name, given in inputs.items():
        if isinstance(given, (np.ndarray, DeviceArray)) and share_memory(out, given):
            raise ValueError(f"out shares memory with {name}; it must be another array")


def refuse_shared_outputs(*outs):
    """ValueError where two results of one call would be written to the same memory."""
    for i, o in enumerate(outs):
        for j in range(i):
            if share_memory(outs[j], o):
                raise ValueError(f"out[{i}] shares memory with out[{j}]; each result needs its own")


def as_weight(w, name, ndim=2):
    """A weight as the C core's tuple (buffer, type id, n, rows, cols), and its shape.

    float32, float16, bfloat16 and blocks are used as they lie; `w` is [rows, cols], or [n, rows, cols] with `ndim` 3.
    """
    a = w if isinstance(w, Quantized) else as_either(w, name)
    if not isinstance(a, Quantized) and a.dtype not in TYPE_IDS:
        raise TypeError(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16, or a kl.Quantized: "
                        f"{name}.astype('float32')")
    if a.ndim != ndim:
        axes = "[rows, cols]" if ndim == 2 else "[n, rows, cols]"
        raise ValueError(f"{name} has shape {list(a.shape)}; it must be {axes}")
    n, rows, cols = (1, *a.shape) if ndim == 2 else a.shape
    if isinstance(a, Quantized):
        return (contiguous(a.data), a.storage.id, n, rows, cols), a.shape
    a = contiguous(a)
    buffer = a if a.dtype == np.float32 else a.view(np.uint16)
    return (buffer, TYPE_IDS[a.dtype], n, rows, cols), a.shape


def as_offsets(offsets, total, name="offsets"):
    """int64 [N+1], 0 first, never falling, `total` last; None is one sequence."""
    if offsets is None:
        return np.array([0, total], np.int64)
    a = as_integers(offsets, name, ("N+1",), dtype=np.int64)
    if a.size == 0 or a[0] != 0:
        raise ValueError(f"{name} must begin with 0; it is {a[:4].tolist()}")
    falls = np.flatnonzero(np.diff(a) < 0)
    if falls.size:
        i = int(falls[0])
        raise ValueError(f"{name}[{i + 1}] is {a[i + 1]} after {a[i]}; {name} must not fall")
    if a[-1] != total:
        raise ValueError(f"{name} ends at {a[-1]}; it must end at T = {total}")
    return a


def sequences_of(x, name, axes, offsets):
    """Offsets of the sequences in x, and the axes that its states have in front: none, (N,) or (B,)."""
    if x.ndim > axes:
        if offsets is not None:
            raise ValueError(f"offsets is given, and {name} has shape {list(x.shape)}, with a batch axis; it "
                             f"must be one of them")
        B, T = x.shape[:2]
        return np.arange(B + 1, dtype=np.int64) * T, (B,)
    given = as_offsets(offsets, len(x))
    return given, () if offsets is None else (len(given) - 1,)


def checkpoint_counts(checkpoints, lengths):
    """Token counts after which a state is kept: a list for each sequence of these lengths."""
    if checkpoints is None:
        return [[] for _ in lengths]
    if isinstance(checkpoints, int | np.integer) and not isinstance(checkpoints, bool):
        if checkpoints < 1:
            raise ValueError(f"checkpoints is {checkpoints}; it must be >= 1, or a list of token counts")
        step = int(checkpoints)
        return [list(range(step, n + 1, step)) for n in lengths]
    if not np.iterable(checkpoints) or isinstance(checkpoints, str | bytes | dict):
        raise TypeError(f"checkpoints is {checkpoints!r:.40}; it must be an int >= 1, or a list of token counts")
    lists = list(checkpoints)
    if not any(np.ndim(c) for c in lists):
        lists = [lists]
    if len(lists) != len(lengths):
        raise ValueError(f"checkpoints has {len(lists)} lists; there are {len(lengths)} sequences, and each "
                         f"must have one")
    result = []
    for n, (given, length) in enumerate(zip(lists, lengths, strict=True)):
        counts = as_integers(given, f"checkpoints[{n}]", ("n",), dtype=np.int64).tolist()
        if any(a >= b for a, b in zip([-1, *counts], [*counts, length + 1])):
            raise ValueError(f"checkpoints[{n}] is {counts}; it must rise within 0..{length}, its tokens")
        result.append(counts)
    return result


def apart(a, *written, same=None):
    """`a`, copied where it shares memory with an output; `same` is the one output that it may be.

    On a device nothing is copied: ValueError.
    """
    if a is None:
        return None
    for o in written:
        if share_memory(a, o) and not (o is same and _begin(a) == _begin(o)):
            if isinstance(a, DeviceArray):
                raise ValueError(f"out shares memory with an input of shape {list(a.shape)}; on a device it must be "
                                 f"another array")
            return a.copy()
    return a


def _begin(a):
    return a._range[0] if isinstance(a, DeviceArray) else a.ctypes.data


def pack(arrays):
    """Sequences one after another: a list of [T_i, ...] to ([T, ...], offsets [N+1]).

    Source: api of the ragged batches, docs/math.md#ragged. ``unpack`` is the inverse.
    """
    if not np.iterable(arrays):
        raise TypeError(f"arrays is a {type(arrays).__name__}; it must be a list of arrays")
    arrays = [as_array(a, f"arrays[{i}]") for i, a in enumerate(arrays)]
    if not arrays:
        raise ValueError("pack: the list is empty; it must hold one array or more")
    for i, a in enumerate(arrays):
        if a.ndim == 0:
            raise ValueError(f"arrays[{i}] has shape []; it must be [T, ...]")
        check_shape(a, f"arrays[{i}]", ("T", *arrays[0].shape[1:]))
    lengths = [len(a) for a in arrays]
    return np.concatenate(arrays), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def unpack(x, offsets):
    """The sequences of a packed array, as a list of views."""
    if np.ndim(x) == 0:
        raise ValueError("x has shape []; it must be [T, ...]")
    offsets = as_offsets(offsets, len(x))
    return [x[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
