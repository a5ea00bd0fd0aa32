"""A GGUF of a known architecture as a Checkpoint: config, mapped and checked weights, tokenizer."""

import functools
import os

from ..errors import FormatError
from . import gguf_kept, gguf_scores
from .checkpoint import Checkpoint, at_home
from .gguf import split_files
from .gguf_config import check_architecture, read_config
from .gguf_names import match
from .gguf_tokenizer import read_tokenizer


def open_gguf(path: str | os.PathLike) -> Checkpoint:
    """Open a GGUF, or all parts of the one that the file is a part of.

    Parameters
    ----------
    path : str or path
        A file of any name.

    Raises
    ------
    FormatError
        With every problem of the file, by key or tensor and byte; for another architecture, its name.
    """
    path = at_home(path).absolute()
    files = split_files(path)
    metadata = files[0].metadata
    check_architecture(metadata, str(path))
    stored = {name: view for file in files for name, view in file.items()}
    config, content = read_config(metadata, stored, str(path))
    problems: list[str] = []
    a_logs = gguf_kept.read_a_logs(metadata, config, problems)
    generation = gguf_kept.json_object(metadata, gguf_kept.GENERATION, problems)
    dtypes = gguf_kept.read_dtypes(metadata, problems)
    norms = gguf_kept.read_norms(metadata, config.weight_shapes(), problems) if gguf_kept.NORMS in metadata else {}
    scores = gguf_scores.read_scores(metadata, config.weight_shapes(), problems)
    blocks = metadata[f"{metadata['general.architecture']}.block_count"]
    tensors, skipped = match(config, stored, problems, a_logs, blocks, scores)
    if problems:
        raise FormatError(problems, str(path))
    tokenizer = None
    if "tokenizer.ggml.tokens" in metadata:
        tokenizer = functools.partial(read_tokenizer, metadata, str(path))
    return Checkpoint(path, config, tensors, tuple(files), generation, skipped, tokenizer, content, dtypes,
                      norms)
