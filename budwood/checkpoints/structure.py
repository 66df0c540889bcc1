"""What a model consists of, known from its configuration alone: blocks, matrices in scope, the rest."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from budwood.checkpoints.meta_model import build
from budwood.models.blocks import find_blocks
from budwood.models.experts import unfuse
from budwood.models.linears import prunable, read


class ModelStructure:
    """A skeleton with its parts named.

    module: the model on meta, experts as plain linears. path, modules: the decoder blocks. linears: the matrices in
    scope by full name. fused: all tensors on meta by name, as files in module names hold them (experts fused).
    Raises UsageError for models that are no decoders and for bad `skip` expressions.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        compute: torch.dtype = torch.float32,
        skip: Sequence[str] = (),
        trust_remote_code: bool = False,
    ):
        self.module = build(config, compute, trust_remote_code)
        self.fused = self.module.state_dict()
        self.parameters = sum(parameter.numel() for parameter in self.module.parameters())
        unfuse(self.module)
        self.path, self.modules = find_blocks(self.module)
        self.linears = prunable(self.module, skip)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every matrix in scope, by full name."""
        return {name: shape_of(module) for name, module in self.linears.items()}

    @property
    def in_scope(self) -> int:
        """Weights in the matrices in scope."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """[out, in]"""
    rows, columns = read(linear).shape
    return rows, columns
