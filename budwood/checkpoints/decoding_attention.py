"""A loaded model decodes with the native kernel for the attention of one token, where torch is slow.

On processors without bfloat16 instructions torch multiplies single rows of bfloat16 several times slower than memory
allows, so that the attention of a long text costs more than all pruned layers together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from budwood.kernels import dispatch, native
from budwood.kernels.attention import attend

NAME = "budwood"  # of the attention, as transformers knows it
HARMLESS = {"position_ids", "cache_position", "use_cache", "sliding_window"}  # a short window comes as a mask
DTYPES = (torch.bfloat16, torch.float16)  # that torch is slow in


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: `[batch, heads, tokens, width]` each -> `[batch, tokens, heads, width]`.

    What is not the attention of one token without a gradient, or has a mask of its own for each head, is torch's.
    """
    if query.shape[2] == 1 and not torch.compiler.is_compiling():
        seen = None if attention_mask is None else shared_mask(attention_mask, len(query))
        if (
            query.dtype in DTYPES
            and (attention_mask is None or seen is not None)
            and not dropout
            and not torch.is_grad_enabled()
            and not dispatch.is_exact()
            and set(kwargs) <= HARMLESS
        ):
            found = attend(query[:, :, 0], key, value, seen, scaling)
            if found is not None:
                return found.unsqueeze(1), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


def shared_mask(mask: Tensor, batch: int) -> Tensor | None:
    """The bool mask `[batch, tokens]` of one that is the same for all heads; None where it is not."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(batch, -1)


def accelerate_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is torch's fused one decode with the native kernel, where there is one."""
    if not native.has_attention() or not model._can_set_attn_implementation():
        return
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
