"""Attention of our own in a model of transformers; for what it cannot compute torch's stays."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

HARMLESS = {"position_ids", "cache_position", "use_cache", "sliding_window"}  # a short window comes as a mask

# (query [batch, heads, tokens, width], key and value [batch, key heads, tokens, width], mask, scaling, causal)
# -> [batch, tokens, heads, width], or None for what it leaves to torch.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, bool], Tensor | None]


def replace_attention(model: PreTrainedModel, name: str, attend: Attend) -> None:
    """Let `attend` compute the attention of a model that uses torch's fused one; transformers knows it by `name`.

    It is not asked where there is dropout, or an argument that it does not know.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return

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
        if not dropout and kwargs.keys() <= HARMLESS:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            found = attend(query, key, value, attention_mask, scaling, causal)
            if found is not None:
                return found, None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
