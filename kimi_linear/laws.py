"""The laws: what must give the same bytes, and what must stay within the budget, checked on a model.

Each law is a function of its name: it runs the model in two ways that the law says are one, and raises `Broken`
at the first difference. `laws(model)` runs all that are asked of the model's device, and reports.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._names import Named, choice
from .context import Context, current, isa_list

__all__ = ["BUDGET", "LAWS", "OF_THE_CPU", "TOKEN_BUDGET", "Broken", "Law", "LawsReport", "laws"]

#: Largest root mean square difference of the logits of two runs that are one within the budget, as a share of their
#: size: over a run, and at one token. docs/determinism.md#budget says where they come from.
BUDGET, TOKEN_BUDGET = 1e-5, 1e-4


class Broken(AssertionError):
    """A law that does not hold: the sentence names the first difference."""


@dataclass(frozen=True)
class Law:
    """One law on one model.

    Attributes
    ----------
    name : str
    says : str
        The law in one line.
    tried : str
        What was run; empty where nothing was.
    difference : str
        The first difference; empty where the law holds.
    unasked : str
        Why the law is not asked of this device; empty where it is.
    """

    name: str
    says: str
    tried: str = ""
    difference: str = ""
    unasked: str = ""

    @property
    def holds(self):
        """True where nothing differed; None where it is not asked."""
        return None if self.unasked else not self.difference


@dataclass(frozen=True)
class LawsReport:
    """What `laws` found on a model and its device: ``rows`` is a Law each; true where all that are asked hold."""

    model: str
    rows: tuple
    device: str = "cpu"

    @property
    def ok(self):
        """True where every law that is asked holds."""
        return all(law.holds is not False for law in self.rows)

    def __bool__(self):
        return self.ok

    @property
    def verdict(self):
        """One line."""
        model = self.model if self.device == "cpu" else f"{self.model} ({self.device})"
        broken = [law.name for law in self.rows if law.holds is False]
        if broken:
            return f"broken on {model}: {', '.join(broken)}"
        unasked = sum(law.holds is None for law in self.rows)
        rest = f"; {unasked} are not asked of a device" if unasked else ""
        return f"ok: all {len(self.rows) - unasked} laws hold on {model}{rest}"

    def to_dict(self):
        """Plain values, for JSON."""
        return {
            "model": self.model, "device": self.device, "ok": self.ok, "verdict": self.verdict,
            "laws": [{"name": w.name, "says": w.says, "tried": w.tried, "holds": w.holds, "difference": w.difference,
                      "unasked": w.unasked} for w in self.rows],
        }

    def __str__(self):
        width = max(len(law.name) for law in self.rows)
        lines = []
        for law in self.rows:
            word = {True: "holds", False: "BROKEN", None: "-"}[law.holds]
            lines.append(f"{word:<6}  {law.name:<{width}}  {law.tried or f'not asked: {law.unasked}'}")
            if law.difference:
                lines.append(f"{'':{width + 8}}  {law.difference}")
        return "\n".join([*lines, "", self.verdict])

    __repr__ = __str__


def laws(model, names=None, *, seed=0, progress=None):
    """Check the laws on a model.

    Parameters
    ----------
    model : Model
    names : str or list of str, optional
        Which, of `LAWS`; by default all. On a device those of `OF_THE_CPU` are then not asked, and the report says so.
    seed : int
        Of the random token ids.
    progress : callable(done, total, name), optional
        Called before each law and after the last.

    Returns
    -------
    LawsReport

    Raises
    ------
    ValueError
        No name, one that is no law, or of a law that is not asked of the model's device.
    """
    device = current(model.ctx).device
    unasked = {} if device == "cpu" else OF_THE_CPU
    rows, names = [], _chosen(names, device, unasked)
    for i, name in enumerate(names):
        if progress is not None:
            progress(i, len(names), name)
        rows.append(_asked(name, model, seed) if name not in unasked else Law(name, _says(name), unasked=unasked[name]))
    if progress is not None:
        progress(len(names), len(names), "")
    return LawsReport(model.name, tuple(rows), device)


def _chosen(names, device, unasked):
    """The names of laws as a list: all, or those given, each of which must be one and be asked of the device."""
    if names is None:
        return list(LAWS)
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("names is empty; it must name a law or more, or be None for all")
    for name in names:
        choice(name, "names", LAWS)
        if name in unasked:
            raise ValueError(f"{name} is not asked of {device}: {unasked[name]}")
    return names


def _says(name):
    return LAWS[name].__doc__.splitlines()[0]


def _asked(name, model, seed):
    try:
        return Law(name, _says(name), LAWS[name](model, seed))
    except Broken as error:
        return Law(name, _says(name), *error.args)


# ---- runs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _context(model, ctx):
    """The model's calls go through `ctx` inside the block."""
    before = model.ctx
    model.ctx = ctx if ctx is not None else before
    try:
        yield
    finally:
        model.ctx = before


def _ids(model, T, seed):
    """[T] random token ids."""
    return np.random.default_rng([seed, T]).integers(0, model.config.vocab_size, T).astype(np.int32)


def _read(model, tokens, cuts=(), *, state=None, ctx=None, taps=None, experts=None):
    """What reading `tokens` in calls that end at `cuts` gives: {"logits" or tap: [T, ...], "state name": array}."""
    parts = []
    with _context(model, ctx):
        state = model.new_state() if state is None else state
        for a, b in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
            given = None if experts is None else {layer: ids[a:b] for layer, ids in experts.items()}
            out = model.forward(tokens[a:b], state=state, taps=taps, expert_ids=given)
            logits, trace = (out, {}) if taps is None else out
            parts.append({**trace, "logits": logits})
    return _joined(parts) | _arrays(state)


def _joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _arrays(state):
    return {f"state {name}": value for name, value in state.items()}


def _bytes(a):
    return np.ascontiguousarray(a).view(np.uint8)


def _first_difference(a, b):
    """Name, place and both values where two results first differ; None where they are the same bytes."""
    for name in a:
        x, y = a[name], b[name]
        if x.shape != y.shape:
            return f"{name} has shape {x.shape} and {y.shape}"
        if x.tobytes() == y.tobytes():
            continue
        at = np.argwhere(_bytes(x).reshape(*x.shape, -1) != _bytes(y).reshape(*x.shape, -1))[0][:-1]
        place = tuple(int(i) for i in at)
        where = f"{name}{list(place)}" if name.startswith("state ") else f"{name}, token {place[0]}, {list(place[1:])}"
        return f"{where}: {x[place]!r} and {y[place]!r}"
    return None


def _same(tried, one, *others):
    """Compares one() with each of the others, callable(taps) -> results; names the first tap when they differ."""
    wanted = one(None)
    for other in others:
        found = _first_difference(wanted, other(None))
        if found is not None:
            raise Broken(tried, _first_difference(one("*"), other("*")) or found)


def _near(tried, whole, other):
    """Logits of two runs differ by rounding: over the run, and at the token that rounding moves most."""
    scale = np.sqrt(np.mean(whole["logits"].astype(np.float64) ** 2))
    error = np.sqrt(np.mean((whole["logits"].astype(np.float64) - other["logits"]) ** 2, axis=-1)) / scale
    total, worst = np.sqrt(np.mean(error**2)), int(np.argmax(error))
    if not (total <= BUDGET and error.max() <= TOKEN_BUDGET):
        raise Broken(tried, f"logits differ by {total:.1e} of their size, by {error.max():.1e} at token {worst}; the "
                            f"budget is {BUDGET:.0e}, and {TOKEN_BUDGET:.0e} at one token")


# ---- the same bytes -----------------------------------------------------------------------------------

LENGTHS = (70, 3, 1, 129, 17, 16, 64, 0, 5)


def batch_is_alone(model, seed=0):
    """Each sequence of a batch has the bytes it has alone, whoever joins or leaves between steps."""
    tried = f"{len(LENGTHS)} sequences of {min(LENGTHS)} to {max(LENGTHS)} tokens, then 4 steps with joins and leaves"
    # sequence -> its pieces; who takes part in a step changes from step to step
    steps = [{n: _ids(model, T, seed + n) for n, T in enumerate(LENGTHS) if n < 7}]
    for step in range(4):
        who = [n for n in range(len(LENGTHS)) if (n + step) % 3 != 0 and (n < 7 or step > 0)]
        steps.append({n: _ids(model, 1 + (n == 4) * 20, seed + 100 * step + n) for n in who})

    def together(taps):
        states = model.new_state(len(LENGTHS))
        parts = {n: [] for n in range(len(LENGTHS))}
        for step in steps:
            out = model.forward(list(step.values()), state=[states[n] for n in step], taps=taps)
            logits, trace = (out, {}) if taps is None else out
            ends = np.cumsum([len(t) for t in step.values()])[:-1]
            cut = {name: np.split(value, ends) for name, value in trace.items()} | {"logits": logits}
            for i, n in enumerate(step):
                parts[n].append({name: cut[name][i] for name in cut})
        return {n: _joined(parts[n]) | _arrays(states[n]) for n in parts}

    def alone(taps):
        found = {}
        for n in range(len(LENGTHS)):
            pieces = [step[n] for step in steps if n in step]
            ends = np.cumsum([len(p) for p in pieces])[:-1]
            found[n] = _read(model, np.concatenate(pieces), tuple(ends), taps=taps)
        return found

    a, b = together(None), alone(None)
    for n in a:
        if _first_difference(a[n], b[n]) is not None:
            named = _first_difference(together("*")[n], alone("*")[n])
            raise Broken(tried, f"sequence {n}: {named or _first_difference(a[n], b[n])}")
    return tried


def any_thread_count(model, seed=0):
    """The number of threads changes no byte."""
    tried = "200 tokens and 3 steps on 1, 2, 3 and 5 threads"
    tokens, cuts = _ids(model, 203, seed), (200, 201, 202)
    contexts = [Context(threads=n) for n in (1, 2, 3, 5)]
    _same(tried, *(lambda taps, ctx=ctx: _read(model, tokens, cuts, ctx=ctx, taps=taps) for ctx in contexts))
    return tried


def any_instruction_set(model, seed=0):
    """The instruction set changes no byte."""
    names = isa_list()
    tried = f"100 tokens and 2 steps on {', '.join(names)}"
    tokens, cuts = _ids(model, 102, seed), (100, 101)
    contexts = [Context(isa=name) for name in names]
    _same(tried, *(lambda taps, ctx=ctx: _read(model, tokens, cuts, ctx=ctx, taps=taps) for ctx in contexts))
    return tried


def split_at_64(model, seed=0):
    """A call split at multiples of 64 of its tokens is the whole, in bytes."""
    splits = ((64,), (128,), (64, 128, 192, 256), (192,))
    tried = f"300 tokens, split {', '.join(str(list(cuts)) for cuts in splits)}"
    tokens = _ids(model, 300, seed)
    _same(tried, *(lambda taps, cuts=cuts: _read(model, tokens, cuts, taps=taps) for cuts in ((), *splits)))
    return tried


def fork_is_copy(model, seed=0):
    """A fork goes on as its origin would, and neither moves the other."""
    tried = "a fork after 70 tokens, both read on by other tokens, then the fork's origin beside the whole"
    tokens, other = _ids(model, 100, seed), _ids(model, 30, seed + 1)

    def forked(taps):
        state = model.new_state()
        first = _read(model, tokens[:70], state=state, taps=taps)
        fork = state.fork()
        aside = _read(model, other, state=fork, taps=taps)
        rest = _read(model, tokens[70:], state=state, taps=taps)
        return _rows_after(first, rest) | {f"fork {k}": v for k, v in aside.items()}

    def apart(taps):
        state = model.new_state()
        _read(model, tokens[:70], state=state)
        aside = _read(model, other, state=state, taps=taps)
        return _read(model, tokens, (70,), taps=taps) | {f"fork {k}": v for k, v in aside.items()}

    _same(tried, forked, apart)
    return tried


def _rows_after(first, rest):
    """Results of two calls of one sequence as those of one."""
    return {name: rest[name] if name.startswith("state ") else np.concatenate([first[name], rest[name]])
            for name in rest}


def save_and_load_continue(model, seed=0):
    """A state saved and loaded goes on as if it had stayed."""
    tried = "saved after 70 tokens, loaded, 30 tokens read on, then 2 steps"
    tokens = _ids(model, 102, seed)

    def loaded(taps):
        state = model.new_state()
        first = _read(model, tokens[:70], state=state, taps=taps)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            state.save(path)
            state = model.load_state(path)
        return _rows_after(first, _read(model, tokens[70:], (30, 31), state=state, taps=taps))

    _same(tried, lambda taps: _read(model, tokens, (70, 100, 101), taps=taps), loaded)
    return tried


def snapshot_and_restore(model, seed=0):
    """A state put back to a snapshot goes on as it would have from there, convolution history included."""
    tried = "a snapshot after 70 tokens, 40 others read, restored, 30 tokens read on"
    tokens = _ids(model, 100, seed)

    def restored(taps):
        state = model.new_state()
        first = _read(model, tokens[:70], state=state, taps=taps)
        snapshot = state.snapshot()
        _read(model, _ids(model, 40, seed + 1), state=state)
        state.restore(snapshot)
        return _rows_after(first, _read(model, tokens[70:], state=state, taps=taps))

    _same(tried, lambda taps: _read(model, tokens, (70,), taps=taps), restored)
    return tried


def truncate_to_checkpoint(model, seed=0):
    """A state truncated goes on as if it had never read further."""
    tried = "300 tokens with a checkpoint each 64, truncated to 192 and to 200, 20 others read on"
    tokens, other = _ids(model, 300, seed), _ids(model, 20, seed + 1)
    for n in (192, 200):

        def truncated(taps, n=n):
            state = model.new_state(checkpoints_every=64, keep=4)
            model.forward(tokens, state=state, logits="none")
            state.truncate(n)
            return _read(model, other, state=state, taps=taps)

        def fresh(taps, n=n):
            state = model.new_state()
            model.forward(tokens[:n], state=state, logits="none")
            return _read(model, other, state=state, taps=taps)

        _same(tried, truncated, fresh)
    return tried


def checkpoints_and_taps_change_nothing(model, seed=0):
    """Checkpoints, taps, the finite check and which logits are asked for change no other byte."""
    tried = "200 tokens with checkpoints each 64, with all taps, with check='finite', with logits of 3 rows"
    tokens = _ids(model, 200, seed)
    whole = _read(model, tokens)
    for options in ({"taps": "*"}, {"state": model.new_state(checkpoints_every=64, keep=2)}):
        found = _first_difference(whole, _read(model, tokens, **options))
        if found is not None:
            raise Broken(tried, f"with {'taps' if 'taps' in options else 'checkpoints'}: {found}")
    for options in ({"check": "finite"}, {"logits": [0, 64, 199]}, {"logits": "last"}):
        rows = options.get("logits", slice(None))
        state = model.new_state()
        logits = model.forward(tokens, state=state, **options)
        want = whole["logits"][-1 if rows == "last" else rows]
        found = _first_difference(whole | {"logits": want}, {"logits": logits} | _arrays(state))
        if found is not None:
            raise Broken(tried, f"with {options}: {found}")
    return tried


# ---- within the budget --------------------------------------------------------------------------------


def _experts(model, tokens):
    """Expert ids of a run: two runs within the budget are compared with the same routing."""
    _, trace = model.forward(tokens, logits="none", taps="layers.*.moe.ids") if any(
        spec.ffn == "moe" for spec in model.config.layers) else (None, {})
    return {int(name.split(".")[1]): ids for name, ids in trace.items()}


def any_split_within_budget(model, seed=0):
    """A call split anywhere is the whole within the budget."""
    splits = ((1,), (17,), (1, 2, 3, 50), (63, 64, 65), (100,))
    tried = f"130 tokens, split {', '.join(str(list(cuts)) for cuts in splits)}"
    tokens = _ids(model, 130, seed)
    experts = _experts(model, tokens)
    whole = _read(model, tokens, experts=experts)
    for cuts in splits:
        _near(tried, whole, _read(model, tokens, cuts, experts=experts))
    return tried


def chunked_is_recurrent_within_budget(model, seed=0):
    """Chunked is recurrent and expanded is absorbed, within the budget: a call and steps of one token."""
    tried = "96 tokens in one call, and one at a time"
    tokens = _ids(model, 96, seed)
    experts = _experts(model, tokens)
    _near(tried, _read(model, tokens, experts=experts), _read(model, tokens, tuple(range(1, 96)), experts=experts))
    return tried


# ---- always -------------------------------------------------------------------------------------------


def inputs_unchanged(model, seed=0):
    """A call changes none of its inputs."""
    tried = "token ids, offsets, expert ids and weights before and after a call"
    tokens, offsets = _ids(model, 120, seed), np.array([0, 50, 120], np.int64)
    experts = _experts(model, tokens)
    inputs = {"tokens": tokens, "offsets": offsets} | {f"expert_ids[{k}]": v for k, v in experts.items()}
    inputs |= {name: value for name, value in model.weights.items() if value.size <= 1 << 24}
    before = {name: value.tobytes() for name, value in inputs.items()}
    model.forward(tokens, offsets=offsets, expert_ids=experts)
    for name, value in inputs.items():
        if value.tobytes() != before[name]:
            raise Broken(tried, f"{name} was changed")
    return tried


def nothing_outside_outputs(model, seed=0):
    """A call writes its results and its own states, and nothing else."""
    tried = "two states and earlier results beside a call on a third"
    tokens = _ids(model, 80, seed)
    states = model.new_state(3)
    earlier = [model.forward(tokens[:n], state=s, taps="*") for n, s in zip((80, 5), states, strict=False)]

    def kept():
        arrays = [_arrays(state) for state in states[:2]]
        return [dict(trace) | {"logits": logits} | a for (logits, trace), a in zip(earlier, arrays, strict=True)]

    before = [{name: value.copy() for name, value in found.items()} for found in kept()]
    model.forward(tokens, state=states[2], taps="*")
    model.forward(tokens[:1], state=states[2])
    for was, now in zip(before, kept(), strict=True):
        if _first_difference(was, now) is not None:
            raise Broken(tried, _first_difference(was, now))
    return tried


#: Name -> callable(model, seed) that returns what it tried, or raises Broken.
LAWS = Named("a law", {law.__name__: law for law in (
    batch_is_alone, any_thread_count, any_instruction_set, split_at_64, fork_is_copy, save_and_load_continue,
    snapshot_and_restore, truncate_to_checkpoint, checkpoints_and_taps_change_nothing, any_split_within_budget,
    chunked_is_recurrent_within_budget, inputs_unchanged, nothing_outside_outputs,
)})

#: Name of a law -> why it is not asked of a device: what it changes is not there.
OF_THE_CPU = {
    "any_thread_count": "threads are the CPU's",
    "any_instruction_set": "instruction sets are the CPU's",
}
