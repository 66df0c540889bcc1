"""A loaded model decodes with the native kernel for the attention of one token, where torch is slow.

On processors without bfloat16 instructions torch multiplies single rows of bfloat16 several times slower than memory
allows, so that the attention of a long text costs more than all pruned layers together.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from budwood.kernels import attention, dispatch, native
from budwood.models.attention import replace_attention

NAME = "budwood"  # of the attention, as transformers knows it
DTYPES = (torch.bfloat16, torch.float16)  # that torch is slow in


def accelerate_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is torch's fused one decode with the native kernel, where there is one.

    Prefill, gradients, compiled models and masks that differ between heads are still torch's.
    """
    if native.has_attention():
        replace_attention(model, NAME, attend)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool
) -> Tensor | None:
    """An `Attend`: one token of each sequence, whose keys are those of all tokens."""
    if query.shape[2] != 1 or torch.compiler.is_compiling():
        return None
    seen = None if mask is None else shared_mask(mask, len(query))
    if (
        query.dtype not in DTYPES
        or (seen is None and mask is not None)
        or torch.is_grad_enabled()
        or dispatch.is_exact()
    ):
        return None
    found = attention.attend(query[:, :, 0], key, value, seen, scaling)
    return None if found is None else found.unsqueeze(1)


def shared_mask(mask: Tensor, batch: int) -> Tensor | None:
    """The bool mask `[batch, tokens]` of one that is the same for all heads; None where it is not."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(batch, -1)
