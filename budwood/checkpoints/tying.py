"""Tied tensors as transformers takes them from files: where these hold both and they differ, neither is tied."""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from budwood.checkpoints.model_files import model_files
from budwood.checkpoints.reader import Shards
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import Weights
from budwood.errors import BudwoodError


def differ_though_tied(folder: Path, config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether the files hold other values for a tensor than for the one that the configuration ties it to.

    Only where two tensors have the shape of embeddings the model is built and they are read. False where there are no
    files that can be read.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return False
    try:
        shards = Shards(model_files(folder).shards)
    except BudwoodError:
        return False
    rows = getattr(config, "vocab_size", None)
    shapes = [place.shape for place in shards.locations.values() if len(place.shape) == 2 and place.shape[0] == rows]
    if len(shapes) == len(set(shapes)):
        return False
    structure = ModelStructure(config, trust_remote_code=trust_remote_code)
    tied = getattr(structure.module, "all_tied_weights_keys", None) or {}
    weights = Weights(shards, structure)
    known = set(weights.names())
    return any(_differ(weights, *pair) for pair in tied.items() if known.issuperset(pair))


def _differ(weights: Weights, one: str, other: str) -> bool:
    a, b = (weights.read([name])[name] for name in (one, other))
    both = torch.promote_types(a.dtype, b.dtype)
    return not torch.equal(a.to(both), b.to(both))
