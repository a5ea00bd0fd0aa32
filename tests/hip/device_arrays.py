"""Arrays on the device under test, and others' that tell of them by DLPack or by the CUDA array interface."""

import numpy as np
from hip_build import context
from judge import normal

import kimi_linear as kl

PIECE = 8 << 20  # csrc/hip/upload.hip


def put(x):
    return kl.DeviceArray.from_numpy(x, context())


class Foreign:
    """Another library's array, by DLPack: nothing else of it can be seen."""

    def __init__(self, x):
        self.x = x

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)


class Interface:
    """Another library's array, by the CUDA array interface."""

    def __init__(self, x, **changes):
        self.x, self.changes = x, changes

    @property
    def __cuda_array_interface__(self):
        return self.x.__cuda_array_interface__ | self.changes


class Told:
    """Any memory, as the CUDA array interface tells of it."""

    def __init__(self, **told):
        self.__cuda_array_interface__ = {"version": 3, "shape": (4,), "typestr": "<f4", "strides": None} | told


KINDS = [lambda x: x, Foreign, Interface]


def delta_inputs():
    rng = np.random.default_rng(3)
    return dict(q=normal(20, 2, 16), k=normal(20, 2, 16, seed=1) / 4, v=normal(20, 4, 16, seed=2),
                g=-rng.random((20, 4, 16), np.float32), beta=rng.random((20, 4), np.float32))


def same(got, wanted):
    return got.numpy().tobytes() == wanted.tobytes()
