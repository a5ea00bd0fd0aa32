"""This library's engine: a script for a process of its own."""

import base64
import time

from serve import own_memory, serve

import kimi_linear as kl


class Engine:
    """A model, one state, and the snapshots that were kept."""

    def __init__(self):
        self.snapshots, self.before = {}, own_memory()

    def open(self, path, threads, context, isa=None, activations="int8", cache="float16"):
        """Seconds until there is a state for `context` tokens."""
        self.ctx = kl.Context(threads=threads, isa=isa)
        begin = time.perf_counter()
        self.model = kl.Model.from_pretrained(path, activations=activations, cache=cache, ctx=self.ctx)
        self.state = self.model.new_state(context=context)
        self.context = context
        return time.perf_counter() - begin

    def about(self):
        return f"kimi_linear {kl.__version__}; {self.ctx.isa}; activations {self.model.activations}"

    def run(self, tokens, step):
        """Read tokens, `step` at once; seconds of each call, until its last logits are there."""
        seconds = []
        for i in range(0, len(tokens), step):
            piece = tokens[i : i + step]
            begin = time.perf_counter()
            self.last = self.model.forward(piece, state=self.state, logits="last")
            seconds.append(time.perf_counter() - begin)
        return seconds

    def logits(self):
        """Of the last token read, float32 in base64."""
        return base64.b64encode(self.last.tobytes()).decode()

    def empty(self):
        self.state.reset()

    def keep(self, name):
        """Keep a copy of the state; its bytes."""
        self.snapshots[name] = self.state.snapshot()
        return self.snapshots[name].nbytes

    def restore(self, name):
        self.state.restore(self.snapshots[name])

    def memory(self):
        """Bytes that the process grew by, without mapped files and snapshots; beside what was planned."""
        plan = self.model.plan(context=self.context)
        return {"measured": own_memory() - self.before - sum(s.nbytes for s in self.snapshots.values()),
                "planned": plan.anonymous}

    def profile(self, tokens, step):
        """Calls, seconds, flops and bytes of each op while tokens are read; the seconds of it all."""
        core = self.ctx._core
        core.profile(True)
        try:
            seconds = sum(self.run(tokens, step))
        finally:
            core.profile(False)
        return {"seconds": seconds, "ops": core.profile_result()}


if __name__ == "__main__":
    serve(Engine())
