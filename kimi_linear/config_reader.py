"""What every translation of a config.json shares: typed access that gathers problems, and the common keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

USED, INERT = "used", "inert"

LATENT_EPS = 1e-6             # of the norms on the latent and the low-rank q: the training code's default
L2_EPS = 1e-6                 # of the L2 norms of q and k, under the root of the sum: the training code's
LARGEST = 2**31 - 1           # of any size in a config
MOST_LAYERS = 4096
MOST_EXPERTS = 65536
MOST_EXPERTS_IN_ALL = 2**17   # of all layers together; Kimi K3 has 82,432
MOST_EOS = 1024
WIDEST_CONV = 8

#: Keys that a saved config of any family may have and that change no result.
INERT_ANYWHERE = dict.fromkeys([
    "architectures", "auto_map", "initializer_range", "use_cache", "dtype", "torch_dtype", "transformers_version",
    "attention_dropout", "output_router_logits", "router_aux_loss_coef", "output_attentions", "output_hidden_states",
    "return_dict", "_name_or_path", "_attn_implementation", "_from_model_config", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "is_encoder_decoder",
], INERT)


class ConfigError(ValueError):
    """A config that cannot be used; `problems` holds one sentence a problem."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"config: {count}:\n" + "\n".join(f"  {p}" for p in problems))


class Reader:
    """Typed access to a mapping that collects problems instead of raising at the first.

    Parameters
    ----------
    d : mapping
    keys : mapping
        The keys that are known.
    inner : mapping from key to mapping, optional
        The known keys of objects inside: theirs are named ``key.theirs``.
    outer : (str, Reader, container of str), optional
        The key of `d` in a reader around this one, that reader, and the keys that are taken from it where `d` has none.
    """

    def __init__(self, d: Mapping[str, Any], keys: Mapping, inner: Mapping[str, Mapping] | None = None, outer=None):
        self.d = d
        path, self.outer, self.inherited = outer or ("", None, ())
        self.path = path and path + "."
        self.problems: list[str] = self.outer.problems if self.outer else []
        self.failed: set[str] = set()                     # keys of sizes that are missing or wrong
        self.unknown: list[str] = self.outer.unknown if self.outer else []
        self.unknown += [f"{self.path}{k}" for k in d if k not in keys]
        self.inner: dict[str, Mapping[str, Any]] = {}
        for key, known in (inner or {}).items():
            self.inner[key] = self.object(key) or {}
            self.unknown += [f"{self.path}{key}.{k}" for k in self.inner[key] if k not in known]

    def name(self, key: str) -> str:
        """A key as messages have it: with the path to where its value is, or should be."""
        return key if self._inherits(key) else self.path + key

    def _inherits(self, key: str) -> bool:
        return key in self.inherited and self.d.get(key) is None and self.outer.get(key) is not None

    def problem(self, key: str, value: Any, rule: str) -> None:
        self.problems.append(f"{self.name(key)} is {short(value)}; {rule}")

    def missing(self, key: str, rule: str) -> None:
        self.problems.append(f"{self.name(key)} is missing; {rule}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, ``object.key`` inside; absent and null are the default."""
        where, _, inside = key.rpartition(".")
        value = self.inner[where].get(inside) if where else self.d.get(key)
        if value is None and self._inherits(key):
            value = self.outer.get(key)
        return default if value is None else value

    def object(self, key: str) -> Mapping[str, Any] | None:
        """An object inside, or None where the key is absent or wrong."""
        value = self.get(key)
        if value is None or isinstance(value, Mapping):
            return value
        self.problem(key, value, "it must be an object")
        return None

    def only(self, allowed: Mapping[str, tuple]) -> None:
        """Keys of which only these values are supported (none: only null)."""
        for key, values in allowed.items():
            value = self.get(key)
            if value is not None and not _is_one_of(value, values):
                self.problem(key, value, f"only {' or '.join(map(short, values)) or 'null'} is supported")

    def integer(self, key: str, *, least: int = 1, most: int = LARGEST, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            self.missing(key, f"it must be an integer from {least} to {most}")
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(key, value, f"it must be an integer from {least} to {most}")
        else:
            return value
        self.failed.add(key)
        return least

    def needed(self, key: str, needed: bool, **limits) -> int:
        """A size that must be there when such a layer occurs, and may be 0 or absent otherwise."""
        return self.integer(key, **limits) if needed else self.integer(key, **limits | dict(least=0, default=0))

    def number(self, key: str, *, default: float | None = None, rule: str = "it must be a finite number >= 0",
               test: Callable[[float], bool] = lambda x: x >= 0) -> float:
        value = self.get(key, default)
        if value is None:
            self.missing(key, rule)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not abs(value) <= sys.float_info.max or not test(value):
            self.problem(key, value, rule)
        else:
            return float(value)
        self.failed.add(key)
        return 0.0

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, value, "it must be true or false")
            return default
        return value

    def integers(self, key: str, most: int) -> list[int] | None:
        """A list of integers, or None where the key is absent or wrong."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or any(type(x) is not int for x in value):
            self.problem(key, value, "it must be a list of integers")
        elif len(value) > most:
            self.problems.append(f"{self.name(key)} has {len(value)} entries; at most {most} are possible")
        else:
            return list(value)
        return None

    def names(self, key: str, n: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of n of the allowed words, or None where the key is absent or wrong."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and len(value) == n and all(x in allowed for x in value):
            return list(value)
        self.problem(key, value, f"it must be a list of {n} words, each one of {', '.join(allowed)}")
        return None

    def agrees(self, key: str, expected: Any, source: str) -> None:
        """A key that repeats another one must say the same."""
        value = self.get(key)
        if value is not None and value != expected:
            self.problem(key, value, f"it contradicts {source}, which says {short(expected)}")


def short(value: Any) -> str:
    """A value as JSON, cut to 80 characters, whatever its depth."""
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_one_of(value: Any, allowed: tuple) -> bool:
    """Equality that does not take 0 for false or 1 for true."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


# ---- keys that every family has ---------------------------------------------------------------------


def experts_fit(r: Reader, n_layers: int, n_experts: int) -> None:
    """Not so many experts that their names alone would fill the memory."""
    most = MOST_EXPERTS_IN_ALL // n_layers
    if n_experts > most:
        r.problem("num_experts", n_experts, f"with {n_layers} layers it must be at most {most}")


def common(r: Reader) -> dict[str, Any]:
    """Fields that mean the same in every family."""
    vocab = r.integer("vocab_size")
    most_id = LARGEST if "vocab_size" in r.failed else vocab - 1
    fields = dict(
        vocab_size=vocab, hidden_size=r.integer("hidden_size"), rms_norm_eps=r.number("rms_norm_eps"),
        latent_eps=r.number("latent_eps", default=LATENT_EPS), l2_eps=r.number("l2_eps", default=L2_EPS),
        tie_embeddings=r.flag("tie_word_embeddings", False), max_length=_max_length(r))
    return fields | _special_tokens(r, most_id)


def eos_of(config) -> int | list[int] | None:
    """eos_token_id as files have it."""
    return config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else [*config.eos_token_ids]


def own_keys(config, **usual) -> dict[str, Any]:
    """Keys of ours, each under its field's name, where the field is not as usual."""
    usual = dict(latent_eps=LATENT_EPS, l2_eps=L2_EPS) | usual
    return {key: getattr(config, key) for key, value in usual.items() if getattr(config, key) != value}


def _max_length(r: Reader) -> int:
    key = "model_max_length" if r.get("model_max_length") is not None else "max_position_embeddings"
    n = r.integer(key, most=2**62, default=LARGEST)
    if key == "model_max_length":
        r.agrees("max_position_embeddings", n, key)
    return n


def _special_tokens(r: Reader, most_id: int) -> dict[str, Any]:
    def one(key):
        return None if r.get(key) is None else r.integer(key, least=0, most=most_id)

    if isinstance(r.get("eos_token_id"), (list, tuple)):
        eos = tuple(r.integers("eos_token_id", MOST_EOS) or ())
        for e in eos:
            if not 0 <= e <= most_id:
                r.problem("eos_token_id", e, f"it must be an integer from 0 to {most_id}")
    else:
        eos = () if r.get("eos_token_id") is None else (one("eos_token_id"),)
    return dict(bos_token_id=one("bos_token_id"), eos_token_ids=eos, pad_token_id=one("pad_token_id"))
