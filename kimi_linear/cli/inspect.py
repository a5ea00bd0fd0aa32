"""``kimi-linear inspect``: what a checkpoint holds, and whether it is good."""

import fnmatch
import math
import warnings
from collections import Counter
from dataclasses import asdict

from ..config import MIXER_LETTERS
from ..errors import FormatError
from ..file_check import FileReport, check_file, converter_of
from ..load import GGUFFile
from ..load.gguf_kept import pattern
from ..load.safetensors import stored_as
from ._common import (
    add_json_argument,
    add_model_argument,
    human_bytes,
    human_count,
    layer_pattern,
    load_model,
    print_json,
    print_report,
    print_table,
    progress,
)

HELP = "what a checkpoint holds: config, parameters, tensors, memory; whether its file is good"
EPILOG = """
kimi-linear inspect
kimi-linear inspect ~/models/kimi --tensors "*.layers.3.*"
kimi-linear inspect kimi-q4_k.gguf --tensors "blk.*_exps.weight"
kimi-linear inspect --check kimi-q4_k.gguf

exit code with --check 0: good; 1: a fault was found; 2: bad usage, or no such file
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--tensors", metavar="GLOB",
                        help="list the tensors whose name matches; of a GGUF also by the file's own names, as "
                             "'blk.3.*', which --map of convert and quantize takes")
    parser.add_argument("--check", action="store_true",
                        help="read every value, try the tokenizer, the template and a text, and give a verdict")
    add_json_argument(parser)


def run(args):
    if args.check:
        return _check(args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(args)
    notes = [str(w.message) for w in caught]
    tensors = _tensors(model, args.tensors) if args.tensors else []
    if args.json:
        print_json(_facts(model, notes) | ({"tensors": tensors} if args.tensors else {}))
    elif args.tensors:
        rows = [(t["name"], "x".join(map(str, t["shape"])), t["dtype"], human_bytes(t["bytes"]))
                for t in tensors]
        print_table(rows, ("tensor", "shape", "stored as", "bytes"), "<><>")
    else:
        _show(model, _facts(model, notes))
    return 0


def _check(args):
    if args.tensors:
        raise ValueError("--tensors and --check are two questions; ask one")
    try:
        model = load_model(args)
    except FormatError as error:  # a file that cannot be opened is not good
        report = FileReport(list(error.problems), [], {})
        return print_report(args, report)
    total = sum(t.nbytes for t in model._tensors.values())
    with progress(total, "values", "B") as bar:
        report = check_file(model, bar.update)
    return print_report(args, report)


def parameters(config):
    """(all, active) parameters: a token uses its chosen experts of each layer, and all else."""
    total = sum(math.prod(shape) for shape in config.weight_shapes().values())
    expert = 3 * config.moe_size * (config.expert_latent or config.hidden_size)
    n_moe = sum(layer.ffn == "moe" for layer in config.layers)
    return total, total - n_moe * (config.n_experts - config.experts_per_token) * expert


def _tensors(model, glob):
    files = model._checkpoint.files if model._checkpoint is not None else ()
    own = {name: t for file in files if isinstance(file, GGUFFile) for name, t in file.items()}
    for tensors in (model._tensors, own):
        found = [{"name": name, "shape": list(t.shape), "dtype": stored_as(t), "bytes": int(t.nbytes)}
                 for name, t in tensors.items() if fnmatch.fnmatchcase(name, glob)]
        if found:
            return found
    theirs = f" or, with the file's own names, '{next(iter(own))}'" if own else ""
    raise ValueError(f"--tensors {glob!r} matches none of {len(model._tensors)} tensors; try '*'{theirs}")


def _facts(model, notes):
    c = model.config
    types = Counter()
    if copied := sum(t.nbytes for t in model._tensors.values() if hasattr(t, "blocks")):
        notes = [*notes, f"{human_bytes(copied)} of experts, whose codes and scales lie apart, are copied when the "
                         "model is opened; those of a GGUF made of it are mapped"]
    for t in model._tensors.values():
        for part in getattr(t, "stored", {"": t}).values():
            types[stored_as(part)] += int(part.nbytes)
    total, active = parameters(c)
    plan = model.plan()
    return {
        "model": model.name, "layers": layer_pattern(c), "parameters": total, "active_parameters": active,
        "stored_bytes": dict(types), "config": c.to_dict(), "latent_eps": c.latent_eps,
        "tokenizer": _vocabulary(model, notes),
        "skipped_tensors": list(getattr(model._checkpoint, "skipped", ())),
        "plan": asdict(plan),
        "notes": notes,
    } | _file_facts(model)


def _vocabulary(model, notes):
    try:
        return None if model.tokenizer is None else len(model.tokenizer)
    except FormatError as error:
        notes += [f"tokenizer: {problem}" for problem in error.problems]
        return None


def _file_facts(model):
    """What is told of a GGUF alone."""
    files = [file for file in getattr(model._checkpoint, "files", ()) if isinstance(file, GGUFFile)]
    if not files:
        return {}
    return {"gguf": {"version": files[0].version, "parts": len(files), "tensors": sum(map(len, files)),
                     "alignment": files[0].alignment, "converter": converter_of(model)}}


def _show(model, facts):
    c, plan = model.config, facts["plan"]
    stored = ", ".join(f"{name} {human_bytes(n)}" for name, n in sorted(facts["stored_bytes"].items()))
    total, active = human_count(facts["parameters"]), human_count(facts["active_parameters"])
    own = human_bytes(plan["vectors"] + plan["state"] + plan["scratch"])
    rows = [
        ("model", facts["model"]),
        *_file_rows(facts.get("gguf")),
        ("layers", f"{c.n_layers}: {facts['layers']}  ({_letters(c)}small: dense feed-forward)"),
        ("parameters", f"{total}, of which {active} work on a token"),
        ("stored as", stored),
        ("hidden", f"{c.hidden_size:,}"),
        ("vocabulary", f"{c.vocab_size:,}{', tied head' if c.tie_embeddings else ''}"),
        *_mixers(c), *_feed_forward(c), *_residuals(c),
        ("norms", f"eps {c.rms_norm_eps:g}" + (f"; inside MLA {c.latent_eps:g}" if c.mla_heads else "")),
        ("context", f"{c.max_length:,} tokens" if c.max_length else "no limit is named"),
        ("tokenizer", f"{facts['tokenizer']:,} tokens" if facts["tokenizer"] else "none: token ids only"),
        ("memory", f"{human_bytes(plan['weights'])} of weights, mapped; {own} of its own for one sequence of "
                   f"{plan['context']:,} ({plan['cache']} cache)"),
    ]
    if facts["skipped_tensors"]:
        rows.append(("not read", _in_short(facts["skipped_tensors"])))
    rows += [("note", note) for note in facts["notes"]]
    print_table(rows)


def _in_short(names, most=12):
    """Names of tensors, one for those that differ in numbers, as of a layer with all its experts."""
    kinds = Counter(map(pattern, names))
    shown = [next(name for name in names if pattern(name) == kind) if n == 1 else f"{kind} ({n})"
             for kind, n in kinds.most_common(most)]
    return ", ".join(shown) + (f", and {len(kinds) - most} more kinds" if len(kinds) > most else "")


def _file_rows(gguf):
    if gguf:
        parts = f" in {gguf['parts']} parts" if gguf["parts"] > 1 else ""
        yield "file", f"GGUF version {gguf['version']}, {gguf['tensors']} tensors{parts}; {gguf['converter']}"


_NAMES = {"kda": "KDA", "mla": "MLA", "gdn": "gated delta net", "attn": "gated attention"}


def _letters(c):
    used = {layer.mixer for layer in c.layers}
    return "".join(f"{MIXER_LETTERS[m]} is {name}, " for m, name in _NAMES.items() if m in used)[:-2] + "; "


def _mixers(c):
    mixers = Counter(layer.mixer for layer in c.layers)
    if mixers["gdn"]:
        tiled = ", tiled" if c.gdn_tiled else ""
        yield "GDN", (f"{mixers['gdn']} layers: {c.gdn_v_heads} value heads of {c.gdn_v_dim} over {c.gdn_k_heads} key "
                      f"heads of {c.gdn_k_dim}{tiled}, convolution of {c.conv_width}")
    if mixers["attn"]:
        yield "attention", (f"{mixers['attn']} layers: {c.attn_heads} query heads over {c.attn_kv_heads} key heads of "
                            f"{c.attn_head_dim}, {c.rotary_dim} of them rotated, base {c.rope_base:,.0f}")
    if mixers["kda"]:
        gate = "softplus gate" if c.gate_lower_bound is None else f"gate bounded at {c.gate_lower_bound:g}"
        yield "KDA", (f"{mixers['kda']} layers: {c.kda_heads} heads of {c.kda_head_dim}, "
                      f"convolution of {c.conv_width}, {gate}"
                      + (", output gate of full rank" if c.kda_full_rank_gate else ""))
    if mixers["mla"]:
        q = f"q by rank {c.q_rank}" if c.q_rank else "plain q"
        yield "MLA", (f"{mixers['mla']} layers: {c.mla_heads} heads of {c.nope_dim} + {c.rope_dim}, "
                      f"values {c.v_head_dim}, latent {c.kv_rank}, {q}" + (", output gated" if c.mla_gated else ""))
    if mixers["mla"] and c.index_heads:
        yield "indexer", (f"{c.index_heads} heads of {c.index_dim} choose {c.index_topk:,} positions for MLA, in pools "
                          f"of {c.index_pool}; those behind the last whole pool are always there")


def _feed_forward(c):
    kinds = Counter(layer.ffn for layer in c.layers)
    if c.situ_beta is not None:
        up = f", {c.situ_linear_beta:g} of the other factor" if c.situ_linear_beta is not None else ""
        yield "activation", f"SiTU, beta {c.situ_beta:g}{up}"
    if c.swiglu_limit is not None:
        yield "activation", f"SwiGLU, gate up to {c.swiglu_limit:g}, the other factor within it"
    if kinds["dense"]:
        yield "dense", f"{kinds['dense']} layers: width {c.ffn_size:,}"
    if kinds["moe"]:
        groups = f", in the best {c.top_groups} of {c.n_groups} groups" if c.n_groups > 1 else ""
        norm = ", renormalised" if c.renormalise else ""
        gated = " and gated" if c.shared_gated else ""
        latent = f" on a latent of {c.expert_latent:,}" if c.expert_latent else ""
        yield "experts", (f"{kinds['moe']} layers: {c.experts_per_token} of {c.n_experts} of width "
                          f"{c.moe_size:,}{latent}{groups}, {c.n_shared_experts} shared{gated}; "
                          f"{c.router_function} router{norm}, scale {c.routed_scale:g}")


def _residuals(c):
    if c.attn_res_block:
        n = -(-c.n_layers // c.attn_res_block)
        yield "residuals", f"attended: a snapshot each {c.attn_res_block} layers, {n} in all"
    if c.streams:
        yield "residuals", f"{c.streams} streams, mixed by hyper-connections in {c.stream_passes} passes"
