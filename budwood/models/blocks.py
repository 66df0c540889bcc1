"""Finds the decoder blocks of a model by the classes of its modules."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from budwood.errors import UsageError


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Full name and list of the decoder blocks; works on the meta device.

    The blocks are the one list whose members are all `GradientCheckpointingLayer`, the class that
    transformers gives to layers that gradient checkpointing recomputes; else the longest list of one class that the
    model names in `_no_split_modules`. Raises UsageError for anything but a decoder language model, and when
    several lists are possible.
    """
    refuse_other_than_decoders(model)
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    marked = {
        path: blocks
        for path, blocks in lists.items()
        if all(isinstance(block, GradientCheckpointingLayer) for block in blocks)
    }
    if len(marked) == 1:
        return next(iter(marked.items()))
    candidates = marked or {path: blocks for path, blocks in lists.items() if is_unsplittable(model, blocks)}
    longest = max((len(blocks) for blocks in candidates.values()), default=0)
    found = [(path, blocks) for path, blocks in candidates.items() if len(blocks) == longest]
    if len(found) == 1 and not marked:
        return found[0]
    raise UsageError(
        f"{type(model).__name__}: cannot decide which list holds the decoder blocks; expected one list of "
        f"layers, found {describe(candidates or lists)}; budwood prunes models with one stack of blocks"
    )


def is_unsplittable(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether the members are of one class that the model names in `_no_split_modules`."""
    classes = {type(block).__name__ for block in blocks}
    return len(classes) == 1 and classes <= set(getattr(model, "_no_split_modules", None) or ())


def refuse_other_than_decoders(model: PreTrainedModel) -> None:
    """Raises UsageError for encoders, encoder-decoders, multimodal models, and models without a head."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder"
    elif config is not None and config.get_text_config(decoder=True) is not config:
        reason = "is multimodal"
    elif not model.can_generate() or model.get_output_embeddings() is None:
        reason = "cannot generate text"
    elif is_bidirectional(model):
        reason = "is an encoder"
    else:
        return
    raise UsageError(f"{name} {reason}; budwood prunes decoder language models (AutoModelForCausalLM) only")


def is_bidirectional(model: PreTrainedModel) -> bool:
    """Whether no module with the attribute `is_causal` is causal, and at least one has it."""
    answers = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(answers) and not any(answers)


def describe(lists: dict[str, nn.ModuleList]) -> str:
    """`model.layers (32 LlamaDecoderLayer), ...` for messages."""
    parts = [f"{path} ({len(blocks)} {type(blocks[0]).__name__})" for path, blocks in lists.items()]
    return ", ".join(parts) or "no list of layers"
