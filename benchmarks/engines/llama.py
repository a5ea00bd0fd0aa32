"""llama.cpp, by the ctypes API of llama-cpp-python 0.3.36 or by that of xllamacpp: a script for a process of its own.

The settings are its defaults but for the threads, a batch of 512 tokens, which is its default micro-batch, and a
context as long as is needed, for one sequence. The state at a depth is copied out by ``llama_state_seq_get_data`` and
brought back by ``llama_state_seq_set_data``, which restores both kinds of layers.
"""

import base64
import ctypes
import importlib.metadata
import os
import time

from serve import own_memory, serve

BATCH = 512
LOAD_MODES = {-1: "auto", 0: "none", 1: "mmap", 2: "mlock", 3: "mmap, mlock", 4: "direct io"}


class Engine:
    """A model, its context, and the states that were kept."""

    def __init__(self):
        import llama_cpp

        self.lib, self.model, self.context, self.states = llama_cpp, None, None, {}
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.before = own_memory()

    def about(self):
        flags = self.lib.llama_print_system_info().decode().split(":", 1)[-1].split("|")
        on = [flag.split("=")[0].strip() for flag in flags if flag.strip().endswith("= 1")]
        version = importlib.metadata.version("llama-cpp-python")
        mode = LOAD_MODES.get(self.lib.llama_model_default_params().load_mode, "unknown")
        return f"llama.cpp of llama-cpp-python {version}; load mode {mode}; {', '.join(on)}"

    def open(self, path, threads, context, repack=True):
        """Seconds until there is a context."""
        begin = time.perf_counter()
        params = self.lib.llama_model_default_params()
        params.use_extra_bufts, params.n_gpu_layers = repack, 0
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not open {path}")
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = -(-context // 256) * 256, 1
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        return time.perf_counter() - begin

    def run(self, tokens, step):
        """Read tokens, `step` at once; seconds of each call, until its last logits are there."""
        seconds = []
        for i in range(0, len(tokens), step):
            piece = tokens[i : i + step]
            ids = (self.lib.llama_token * len(piece))(*piece)
            begin = time.perf_counter()
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(piece))) != 0:
                raise RuntimeError(f"llama_decode failed at token {i} of {len(tokens)}")
            self.last = self.lib.llama_get_logits_ith(self.context, -1)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def logits(self):
        """Of the last token read, float32 in base64."""
        return base64.b64encode(ctypes.string_at(self.last, 4 * self.vocab)).decode()

    def empty(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def keep(self, name):
        """Keep a copy of the state; its bytes."""
        size = self.lib.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self.states[name] = buffer, self.lib.llama_state_seq_get_data(self.context, buffer, size, 0)
        return size

    def restore(self, name):
        self.empty()
        buffer, size = self.states[name]
        if self.lib.llama_state_seq_set_data(self.context, buffer, size, 0) == 0:
            raise RuntimeError(f"llama.cpp does not take its state {name} back")

    def memory(self):
        """Bytes that the process grew by, without mapped files and copies of states."""
        return {"measured": own_memory() - self.before - sum(size for _, size in self.states.values())}


if __name__ == "__main__":
    serve(Engine())
