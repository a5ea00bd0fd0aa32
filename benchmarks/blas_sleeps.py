"""To be imported before NumPy: threads of its OpenBLAS sleep between two calls.

They would spin for 2**28 cycles, a tenth of a second, and the next contender would share a core with one.
"""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2**4 cycles, the least
