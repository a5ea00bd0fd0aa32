"""The work of `blame`: groups of ops between known taps, their noise, and the faults that explain a result."""

from __future__ import annotations

from collections import ChainMap
from copy import copy
from dataclasses import replace

import numpy as np

from .. import dataflow, faults
from .._arrays import as_array
from ..dataflow import CHOICES
from ..faults import Scene, Site
from ..faults.site import CARRIED
from . import _calls, metrics
from ._causes import by_one_cause
from ._narrow import Jittered, Narrow
from ._noise import ATTENDS, DRAWS, draws_of, long_sums
from ._opened import open_array, open_ids
from ._ratios import noise_of_fault, ratios, score, sums_in
from ._selections import gaps_of, scores_of
from ._ties import with_their_experts
from ._weights import compare_weights, names_of
from .blame import NO_TOKENS, USUAL, WRONG, Blame, Judged, as_calls, level_of, ranked

EXPLAINED = 30  # a fault leaves this part of the error at most,
CLOSE = 2.5  # or this many times the noise
RIVAL = 2  # faults that leave no more than this many times as much explain as well
STARTS = (33, 256)  # in a run of more than twice as many tokens, faults are tried on so many of them first,
HOPELESS = 4  # and only there where they leave this many times what explains
BLIND = 1.0  # of an op's rms: noise that hides whatever it is
TIED_ROWS = 6  # so many rows with equal scores, all to the last expert, are a rule and not chance
LARGEST = 3e38
OPENED = 4  # of the wrong ops, to be looked at
WITHOUT = ("cache_append",)


class Run:
    """One foreign run: its values, rows end to end, and its ops."""

    def __init__(self, model, theirs, dtype, tokens, weights=None, activations=None):
        self.config, self.weights = model.config, model.weights
        self.differences, self.compared = ([], set()) if weights is None else compare_weights(model, weights)
        self.nodes = {n.tap: n for n in dataflow.nodes(self.config) if n.op not in WITHOUT}
        calls, batch = _calls.without_batch(as_calls(theirs), self.nodes)
        self.skipped, self.notes, self.told_lone = [], [batch] if batch else [], False
        self.structure = _calls.wrong_kinds(self.config, calls)
        self.scene, self.last = _calls.scene_of(calls, self.nodes), calls[-1]
        self.types, self.values = self._values(calls, tokens)
        self.chosen = {}  # (tap, tap of a router in its group) -> the ids that the tap shows
        self.unit = self._unit(calls, dtype)
        said = getattr(calls[0], "meta", {}).get("activations") if activations is None else activations
        self.narrow, self.told = Narrow(said or "float32", self.weights), said is not None

    def _values(self, calls, tokens):
        """(dtype by tap, values by tap) of what all calls have."""
        types, values = {}, {}
        self.logits_at, self.logits = np.arange(0), None
        for tap in self.nodes:
            have = [x for x in calls if tap in x]
            if len(have) < len(calls) or self.nodes[tap].op == "index_pool":  # a state, without a row a token
                continue
            arrays = [as_array(x[tap], tap) for x in have]
            if tap == "logits" and len(at := _calls.rows_of_last(self.scene, arrays, self.nodes[tap])):
                types[tap], self.logits_at = arrays[0].dtype, at
                width = int(np.prod(self.nodes[tap].shape))
                self.logits = np.concatenate([x.reshape(-1, width) for x in arrays]).astype(np.float64)
                continue
            for x, call in zip(arrays, calls):
                if len(x) != (n := _calls.length_of(call, self.nodes)):
                    raise ValueError(f"{tap} has {len(x)} rows; the call has {n} tokens")
            self._tell_lone_tokens(tap, arrays, calls)
            x = self.scene.lay(arrays)
            if x.dtype.kind == "b" or (x.dtype.kind in "iu") != (self.nodes[tap].op in CHOICES):
                must = "integers" if self.nodes[tap].op in CHOICES else "floats"
                self.skipped.append((tap, f"it is {x.dtype}; it must be {must}"))
                continue
            node, size = self.nodes[tap], int(np.prod(self.nodes[tap].shape))
            if x.size != self.scene.T * size:
                batch = ", the tokens first, without an axis for the batch" * (x.ndim > 1 + len(node.shape))
                raise ValueError(f"{tap} has shape {list(x.shape)}; it must be {[self.scene.T, *node.shape]}{batch}")
            types[tap] = x.dtype
            x = x.reshape(self.scene.T, *node.shape)
            if node.op == "route":
                self._check_experts(tap, x)
            values[tap] = x if x.dtype.kind in "iu" else x.astype(np.float64)
        if not values:
            raise ValueError(f"theirs has no tap of this model: it has {', '.join(list(calls[0])[:3]) or 'none'}; the "
                             f"model has {', '.join(list(self.nodes)[:3])}, ...")
        if said := _calls.names_no_layer(calls, self.nodes):
            raise ValueError(said)
        values[dataflow.POSITIONS] = self.scene.positions()
        ids = [tokens] if tokens is not None else [getattr(x, "tokens", None) for x in calls]
        if all(x is not None for x in ids) and len(ids) == len(calls):
            ids = [np.ravel(x).astype(np.int64) for x in ids]
            for x, call in zip(ids, calls):
                if len(x) != (n := _calls.length_of(call, self.nodes)):
                    raise ValueError(f"tokens has {len(x)} ids; the call has {n} tokens")
            values[dataflow.TOKENS] = self.scene.lay(ids)
        return types, values

    def _tell_lone_tokens(self, tap, arrays, calls):
        """A note on the first array [n, 1, ..] that is read as n tokens of one sequence without being said to be."""
        for c, (x, call) in enumerate(zip(arrays, calls)):
            of_lone = _calls.of_lone_tokens(x, self.nodes[tap].shape)
            if of_lone and not self.told_lone and "offsets" not in getattr(call, "meta", {}):
                self.told_lone = True
                self.notes.append(f"{tap} of call {c} has shape {list(x.shape)} and is read as {len(x)} tokens of one "
                                  f"sequence; of {len(x)} sequences of one token, the trace's metadata must have "
                                  f"offsets, 0 to {len(x)}")

    def _check_experts(self, tap, ids):
        """ValueError where an id is of no expert."""
        rows, _ = np.nonzero((ids < 0) | (ids >= self.config.n_experts))
        if len(rows):
            raise ValueError(f"{tap} has {ids[rows[0]].tolist()} at {self.scene.place(int(rows[0]))}; expert ids must "
                             f"be in 0..{self.config.n_experts - 1}")

    def _unit(self, calls, dtype):
        """u of the type that they computed in, as far as they say."""
        said = dtype if dtype is not None else getattr(calls[0], "meta", {}).get("dtype")
        said = str(said).removeprefix("torch.") if isinstance(said, str) else said
        try:
            return metrics.unit_of(said) if said is not None else 0.0
        except (TypeError, ValueError):
            raise ValueError(f"dtype is {said!r}; it must be one of {', '.join(metrics.TYPES)}") from None

    # ---- groups ----

    def group(self, tap):
        """(nodes to run for a tap, in order, the missing one) : itself and what the trace lacks before it."""
        need, todo = {tap}, [tap]
        while todo:
            for name in self.nodes[todo.pop()].inputs.values():
                if name in self.values or name in need:
                    continue
                if name not in self.nodes:
                    return None, name
                need.add(name)
                todo.append(name)
        return [n for t, n in self.nodes.items() if t in need], ""

    def run(self, group, *, faulty=None, unit=0.0, draw=0):
        """The last tap of a group from their values. faulty: (tap, fault, choice); unit: size of a jitter on what
        goes in, of which `draw` is the number. None where the fault cannot be."""
        local = {}
        for node in group:
            site = self._site(node, local, unit, draw)
            wrong = self._wrong(site, *faulty) if faulty else None
            if wrong is not None:
                y = wrong
            elif faulty and faulty[0] == node.tap:
                return None
            elif (group[-1].tap, node.tap) in self.chosen and not (faulty and faulty[0] in local):
                y = self.chosen[group[-1].tap, node.tap]
            else:
                y = site.shaped(site.run())
            local[node.tap] = y
        return _in_range(y)

    def _wrong(self, site, tap, fault, choice):
        """What a fault of a tap makes of a site: of that tap, and of other results of the same call."""
        concerned = dataflow.same_call(site.node, self.nodes[tap]) and fault.concerns(site.node)
        return fault.result(site, choice) if concerned else None

    def _site(self, node, local, unit=0.0, draw=0):
        values = ChainMap(local, self.values)
        if unit:
            values = Jittered(values, unit, draw, self.narrow.of(node))
        return Site.of(node, values, self.weights, self.scene, self.nodes)

    def states(self, node, unit=0.0):
        """The state of each sequence behind the last call, from their values of the op's inputs."""
        local, group = {}, self.group(node.tap)[0]
        for before in group[:-1]:
            site = self._site(before, local, unit)
            local[before.tap] = site.shaped(site.run())
        return self._site(node, local, unit).last_states()

    # ---- judging ----

    def report(self):
        if not self.scene.T:
            return Blame([], [(tap, NO_TOKENS) for tap in self.values if tap in self.nodes], self.unit, self.notes,
                         self.structure, weights=self.differences)
        rows, details = [], {}
        with np.errstate(all="ignore"):
            for tap in self.nodes:
                if tap not in self.values:
                    continue
                group, missing = self.group(tap)
                if group is None:
                    self.skipped.append((tap, f"the trace lacks {missing}, which it is made from"))
                    continue
                if self._grows(group):
                    self.skipped.append((tap, "g, which it takes, is above 0: the state grows without bound"))
                    continue
                rows.append(self._judge(tap, group, details))
            rows = self._as_narrow(rows, details)
            level, self.starts = self._level(rows), [self.of_first(n) for n in STARTS if self.scene.T > 2 * n]
            rows = by_one_cause([self._explained(r, details, level) for r in self._visible(rows, level)])
            rows += self._judge_last_logits(level)
            rows += self._judge_states(level, {tap for r in rows if not r.ok for tap in r.group})
        rows = [self._with_weights(r) for r in rows]
        lacking = [tap for tap in self.nodes if tap not in self.values and tap not in self.types
                   and self.nodes[tap].op != "index_pool"]
        if lacking:
            self.notes.append(f"{len(lacking)} taps are not in the trace: their ops are judged together with those "
                              f"behind them (+n)")
            if foreign := _calls.strange(self.last):
                self.notes.append(f"{len(foreign)} names of the trace are none of ours, as {foreign[0]!r}: "
                                  "model.taps lists ours")
        rows = ranked(rows)
        places = self.scene.places()
        cuts = tuple(int(p.rows[0]) for p in self.scene.pieces if len(p.rows) and p.rows[0])
        opened = [self._open(r.tap, details[r.tap]) for r in rows if not r.ok and r.tap in details][:OPENED]
        return Blame(rows, self.skipped, self.unit, self.notes, self.structure, places, cuts, opened, self.differences)

    def _as_narrow(self, rows, details):
        """The rows, judged again with narrow activations where nobody said which, and most products are that far off.

        Only where the types of the weights are known: the others' errors would be those of any float type."""
        if self.told or not self.narrow.knows_types:
            return rows
        for kind in ("int8", "bfloat16"):
            narrow = Narrow(kind, self.weights)
            taps = {r.tap for r in rows if narrow.takes(self.nodes[r.tap])}
            if not taps or np.median([r.noise for r in rows if r.tap in taps]) < WRONG:
                continue
            rest = [r.noise for r in rows if r.op not in CHOICES and not any(map(narrow.takes, details[r.tap][0]))]
            if rest and np.median(rest) > USUAL:  # not the products alone: all of it is in a narrower type
                continue
            before, self.narrow, fresh = self.narrow, narrow, {}
            again = {tap: self._judge(tap, details[tap][0], fresh) for tap in taps}
            if np.median([r.noise for r in again.values()]) < USUAL:
                self.notes.append(f"most products are as exact as activations in {kind} make them: that is their noise")
                details.update(fresh)
                return [again.get(r.tap, r) for r in rows]
            self.narrow = before
        return rows

    def _with_weights(self, row):
        """What is known of the weights of an op that is wrong: one that differs explains it."""
        names = [] if row.ok else [n for tap in row.group if tap in self.nodes for n in names_of(self.nodes[tap])]
        for d in self.differences:
            if d.name in names:
                return replace(row, kind="weight_differs", fault=None, choice=(), also=(), weight=d.text)
        if row.kind != "unknown" or not names:
            return row
        if self.compared.issuperset(names):
            return replace(row, weight="its weights are the same as ours")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return replace(row, weight=f"is its weight the same? weights= (--weights) compares {names[0]}{more}")

    def _open(self, tap, detail):
        """A wrong op's result beside float64."""
        if self.nodes[tap].op in CHOICES:
            group, _, gaps = detail
            return open_ids(tap, self.values[tap], self.run(group), gaps)
        return open_array(tap, self.values[tap], detail[1])

    def own_results(self):
        """(tap, what float64 makes of their inputs) of each tap whose inputs are known, in the shape of theirs."""
        for tap in self.values:
            group, _ = self.group(tap) if tap in self.nodes else (None, "")
            if group is not None and self.nodes[tap].op not in CHOICES and not self._grows(group):
                with np.errstate(all="ignore"):
                    yield tap, self.scene.split(self.run(group))[0]

    def _grows(self, group):
        gates = [n.inputs["g"] for n in group if n.op == "delta_rule"]
        return any((self.values[g] > 0).any() for g in gates if g in self.values)

    def unit_of(self, tap):
        kind = self.types[tap]
        return max(self.unit, metrics.unit_of(kind) if kind.kind not in "iu" else 0.0)

    def _judge(self, tap, group, details):
        y = self.run(group)
        names, op = tuple(n.tap for n in group), self.nodes[tap].op
        if op in CHOICES:
            row, details[tap] = self.judge_ids(tap, names, group, y)
            return row
        x = self.values[tap]
        noise = self.noise(tap, group, y)
        total, of_rows = ratios(x, y, noise, sums_in(group))
        worst = int(np.argmax(of_rows)) if len(of_rows) else 0
        details[tap] = group, y, noise
        size = metrics.rms_relative(x, y)
        at = self.scene.place(worst) if len(of_rows) else ""
        return Judged(tap, op, names, score(total, of_rows), size, at, of_token=of_rows)

    def noise(self, tap, group, y):
        """Of each element: one rounding of the result, and what one of all inputs does, in some draws."""
        unit, draws = self._unit_of_group(group), draws_of(y.shape)
        moved = [np.abs(self.run(group, unit=unit, draw=i) - y) for i in range(draws)]
        moved = sum(np.where(np.isfinite(m), m, 0) ** 2 for m in moved) / draws
        if any(n.op in ATTENDS for n in group):
            moved = moved * long_sums(self.scene.seen(), unit, y.ndim)
        return np.sqrt((self.unit_of(tap) * np.abs(y)) ** 2 / 3 + moved)

    def _judge_states(self, level, wrong):
        """State arrays of the last call, of ops that are not wrong already."""
        for node in self.nodes.values():
            group = self.group(node.tap)[0] if node.state in self.last else None
            if group is None or node.tap in wrong or self._grows(group):
                continue
            y, moved = self.states(node), self.states(node, self._unit_of_group(group))
            x = as_array(self.last[node.state], node.state).astype(np.float64)
            if x.size != y.size:
                self.skipped.append((node.state, f"its shape {list(x.shape)} is not that of {list(y.shape)}"))
                continue
            x, y, moved = (z.reshape(-1, *y.shape[-2:]) for z in (x, y, moved))
            noise = np.sqrt((self.unit * np.abs(y)) ** 2 / 3 + (moved - y) ** 2) * level
            far, turned = (score(*ratios(z, y, noise, True)) for z in (x, _turned(x, y)))
            kind = "right" if far < WRONG else "stored_transposed" if turned < CLOSE else "unknown"
            error = metrics.rms_relative(x, y)
            yield Judged(node.state, node.op, (node.state,), far, error, kind=kind, where=node.state)

    def _judge_last_logits(self, level):
        """Logits of last tokens alone, where they are made of no other token's values."""
        if self.logits is None:
            return
        group, missing = self.group("logits")
        attending = [n.tap for n in group or () if n.op in CARRIED]
        if group is None or attending:
            self.skipped.append(("logits", f"it has rows of the last tokens alone, and the trace lacks "
                                           f"{missing or group[-1].inputs['x']}, which they are made from"))
            return
        run, details = self.of_rows(self.logits_at), {}
        run.values["logits"], run.starts = self.logits, []
        row = run._leveled(run._judge("logits", group, details), level)
        self.notes.append(f"logits has {len(self.logits)} row{'s' * (len(self.logits) > 1)}: those of last tokens, "
                          "which are compared alone")
        at = self.scene.place(int(self.logits_at[int(np.argmax(row.of_token))]))
        yield replace(run._explained(row, details, level), at=at, of_token=None)

    def _unit_of_group(self, group):
        """The coarsest rounding of what the trace has of a group's inputs and its result."""
        taps = {name for n in group for name in (*n.inputs.values(), n.tap) if name in self.types}
        return max([self.unit, *(self.unit_of(t) for t in taps)])

    def _level(self, rows):
        """What to multiply all noise by: the type that most ops have the noise of, and how well they are made."""
        found = [r.noise for r in rows if r.op not in CHOICES and np.isfinite(r.noise)]
        if not self.unit:
            self.unit = max((self.unit_of(t) for t in self.types if self.types[t].kind not in "iu"), default=metrics.U)
        middle = float(np.median(found)) if found else 0.0
        factor = 1.0
        if middle > USUAL:
            name = metrics.type_of_unit(middle * self.unit)
            factor = metrics.unit_of(name) / self.unit
            if middle / factor > USUAL:
                self.notes.append("more than half of all ops are wrong in themselves: is it the same checkpoint?")
                return 1.0
            self.notes.append(f"most ops are as exact as {name}, less than the trace says: that is the noise")
            self.unit = metrics.unit_of(name)
        more, note = level_of([x / factor for x in found])
        self.notes += [note.replace("most are", "most ops are")] if note else []
        return factor * more

    def _leveled(self, row, level):
        return row if row.op in CHOICES else replace(row, noise=row.noise / level, of_token=row.of_token / level)

    def _visible(self, rows, level):
        """Rows in times the level's noise, without those whose noise is as large as themselves."""
        found = []
        for r in (self._leveled(r, level) for r in rows):
            if r.op not in CHOICES and r.noise and r.error / r.noise > BLIND:
                self.skipped.append((r.tap, f"rounding alone moves it by as much as it is, through {len(r.group)} ops: "
                                            "more taps are needed"))
            else:
                found.append(r)
        return found

    # ---- faults ----

    def _explained(self, row, details, level):
        detail = details.get(row.tap)
        if row.op in CHOICES:
            return self._explained_ids(row, detail)
        if row.noise < WRONG:
            return row
        row, detail = with_their_experts(self, row, detail, level)
        if row.noise < WRONG:
            return replace(row, kind="tie")
        details[row.tap] = group, y, noise = detail
        x, sums = self.values[row.tap], sums_in(group)
        most, found = HOPELESS * _leaves(row.noise), []

        def ruled_out(*candidate):
            return self._fails_early(candidate, row.tap, detail, level, most)

        begins = self._begins(row)
        for rare in (False, True):
            for fault, choice, where, y_f in self._candidates(group, ruled_out, rare, begins):
                left = score(*ratios(x, y_f, noise_of_fault(noise, y, y_f, self.unit_of(row.tap)), sums)) / level
                found.append((left, fault, choice, where, y_f))
            named = _named(row, found, lambda a, b: score(*ratios(a, b, noise, sums)) / level < 1)
            if named.fault:
                break
        return named

    def _begins(self, row):
        """Places of the calls in which the first and the worst of the tokens are that are too far off."""
        far = [int(np.argmax(row.of_token)), *np.flatnonzero(~(row.of_token < 2 * WRONG))]
        pieces = [p for p in self.scene.pieces if np.isin(p.rows, far).any()]
        calls = {min(p.call for p in pieces), *(p.call for p in pieces if far[0] in p.rows)}
        apart = (p.places for p in pieces if p.call in calls)
        return tuple((place,) for place in dict.fromkeys(
            place for places in apart for place in places[:1 + self.scene.has_several]))

    def _candidates(self, group, ruled_out=lambda *candidate: False, rare=False, begins=()):
        """(fault, choice, tap that has it, result) of every fault that can be in a group, and is not ruled out."""
        for node in group:
            for fault in (f for f in faults.at(node, self.scene) if f.rare == rare):
                for choice in begins if fault.of_call else fault.choices + fault.in_runs:
                    if ruled_out(group, node, fault, choice):
                        continue
                    y = self._try(group, node, fault, choice)
                    if y is not None:
                        yield fault, choice, node.tap, y

    def _fails_early(self, candidate, tap, detail, level, most):
        """Whether a fault leaves far too much in the first rows of a long run already."""
        group, node, fault, choice = candidate
        return not fault.looks_ahead and any(self._far(start, candidate, tap, detail, level, most)
                                             for start in self.starts[0 if fault.rare else 1:] if start is not None)

    def _far(self, start, candidate, tap, detail, level, most):
        group, node, fault, choice = candidate
        y_f = start._try(group, node, fault, choice)
        if y_f is None:
            return False
        x, (_, y, noise) = start.values[tap], detail
        rows = len(x)
        floor = 0.1 * np.sqrt((np.where(np.isfinite(noise), noise, 0) ** 2).mean())
        noise = noise_of_fault(np.maximum(noise[:rows], floor), y[:rows], y_f, self.unit_of(tap))
        return not score(*ratios(x, y_f, noise, sums_in(group))) / level <= most

    def of_first(self, n):
        """This run with the first n tokens of its first sequence's first call alone; None where that has none."""
        rows = self.scene.pieces[0].rows[:n]
        if not len(rows):
            return None
        return self.of_rows(rows)

    def of_rows(self, rows):
        """This run with some rows alone, as if they were one call."""
        run = copy(self)
        run.scene, run.values = Scene([[0, len(rows)]]), {tap: x[rows] for tap, x in self.values.items()}
        run.chosen = {}
        return run

    def _try(self, group, node, fault, choice):
        try:
            return self.run(group, faulty=(node.tap, fault, choice))
        except (KeyError, ValueError, IndexError):  # the fault asks for what is not there, or cannot be in this shape
            return None

    # ---- expert ids ----

    def judge_ids(self, tap, names, group, y):
        """Rows with another set, the gap between the scores in question beside what rounding makes of it."""
        node, x = self.nodes[tap], self.values[tap]
        other = np.flatnonzero((np.sort(x, -1) != np.sort(y, -1)).any(-1))
        gaps, rounding = (self._gaps_of_experts if node.op == "route" else self._gaps_of_pools)(group, y, other)
        gaps[(np.diff(np.sort(x, -1), axis=-1) == 0).any(-1) & (node.op == "route")] = np.inf  # an expert twice
        ratio = np.nan_to_num(gaps / rounding, posinf=np.inf)
        over = ratio >= WRONG
        worst = int(ratio.argmax()) if len(ratio) else 0
        kind = "unknown" if over.any() else "tie" if len(other) else "right"
        row = Judged(tap, node.op, names, float(ratio.max(initial=0)), float(over.mean()) if len(over) else 0.0,
                     self.scene.place(worst) if len(x) else "", kind, of_token=ratio)
        return row, (group, other, gaps)

    def _gaps_of_experts(self, group, y, other):
        from ..verify import gap_of_choice

        node, x = group[-1], self.values[group[-1].tap]
        value, rounding = self.rounding_of_choice(group)
        rule = node.options["groups"], node.options["top_groups"]
        gaps = np.zeros(len(x))
        for t in other:
            gaps[t] = abs(gap_of_choice(value[t], set(x[t].tolist()), set(y[t].tolist()), *rule))
        return gaps, rounding

    def _gaps_of_pools(self, group, y, other):
        """As of experts, of the pools of an indexer; rounding by the largest of some draws."""
        node, unit = group[-1], self._unit_of_group(group)

        def scores(draw=None):
            local = {}
            for before in group[:-1]:
                site = self._site(before, local, unit if draw is not None else 0.0, draw or 0)
                local[before.tap] = site.shaped(site.run())
            return scores_of(self._site(node, local, unit if draw is not None else 0.0, draw or 0))

        value = scores()
        known = np.where(np.isfinite(value), value, 0.0)
        moved = [np.abs(np.where(np.isfinite(value), scores(i), 0.0) - known).max(-1, initial=0) for i in range(DRAWS)]
        rounding = np.maximum(np.max(moved, axis=0), unit * np.abs(known).max(-1, initial=0))
        return gaps_of(value, self.values[node.tap], y, node.options["pool"]), rounding

    def rounding_of_choice(self, group):
        """(what experts are chosen by [T, E], what rounding moves it by at most in each row [T])."""
        unit = self._unit_of_group(group)
        value, moved = self._choice_scores(group, 0.0), self._choice_scores(group, unit)
        return value, np.maximum(np.abs(value - moved).max(-1), unit * np.abs(value).max(-1))

    def _choice_scores(self, group, unit):
        """What experts are chosen by, [T, E]."""
        from .. import reference

        node = group[-1]
        logits = self.run(group[:-1], unit=unit) if len(group) > 1 else self.values[node.inputs["scores"]]
        if unit:
            logits = Jittered({"x": logits}, unit)["x"]
        scores, bias = getattr(reference, node.options["function"])(logits), node.weights.get("bias")
        return scores if bias is None else scores + reference.f64(self.weights[bias.name]).reshape(-1)

    def _explained_ids(self, row, detail):
        """A fault must leave few of the wrong rows; many equal scores that all went to the last expert are one, too."""
        group, other, gaps = detail
        tied = [t for t in other if gaps[t] == 0]
        ties_alone = row.ok and len(tied) >= TIED_ROWS
        if row.ok and not ties_alone:
            return row
        x, wrong = np.sort(self.values[row.tap], -1), len(tied) / len(gaps) if ties_alone else row.error
        found = []
        for fault, choice, where, y_f in self._candidates(group):
            if not ties_alone or fault.scenario == faults.TIES:
                apart = float((np.sort(y_f, -1) != x).any(-1).mean())
                found.append((EXPLAINED * apart / wrong, fault, choice, where, y_f))
        named = _named(replace(row, noise=float(EXPLAINED)), found, np.array_equal)  # as if rows had that much noise
        return row if ties_alone and named.kind == "unknown" else replace(named, noise=row.noise, error=wrong)


def _in_range(y):
    """What is past the range of float32 and bfloat16 is infinite there."""
    if y.dtype.kind in "iu" or not y.size or max(y.max(), -y.min()) <= LARGEST:  # NaN is not
        return y
    return np.where(np.abs(y) > LARGEST, np.copysign(np.inf, y), y)


def _turned(x, y):
    """The last two axes exchanged, where that is possible."""
    return x.swapaxes(-1, -2) if x.shape[-1] == x.shape[-2] and x.shape[0] == y.shape[0] else x


# ---- figures -----------------------------------------------------------------------------------------


def _leaves(noise):
    """What is left beside a fault that explains a result, at most: nothing finite is a part of an infinite error."""
    return max(CLOSE, noise / EXPLAINED) if np.isfinite(noise) else CLOSE


def _named(row, found, alike):
    """The row with the fault that leaves least, or unknown."""
    found.sort(key=lambda f: f[0])
    if not found or not found[0][0] <= _leaves(row.noise) or not found[0][0] < row.noise / 2:
        return replace(row, kind="unknown", where=row.tap)
    left, fault, choice, where, y = found[0]
    as_well = [f for f in found[1:] if f[0] <= RIVAL * max(left, 1e-3) or alike(f[4], y)]
    also = tuple(dict.fromkeys(f[1].name for f in as_well if f[1].name != fault.name))
    values = sorted({choice} | {f[2] for f in as_well if f[1] is fault and f[3] == where})
    if len(values) == 1 or not all(isinstance(x, float) for value in values for x in value):
        values = []
    return replace(row, kind=fault.name, fault=fault, choice=() if values else choice, left=left, also=also,
                   where=where, alike=tuple(values), explained=tuple(f[1:4] for f in (found[0], *as_well)))
