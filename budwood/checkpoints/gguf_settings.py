"""What the header of a GGUF file says of the computation, carried over into the configuration or refused.

transformers takes the sizes and drops the rest, so that a model with scaled positions, windows or caps would be
converted into another model. Every setting of the architecture has to be in one of the tables here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from budwood.checkpoints.gguf_header import Header
from budwood.checkpoints.gguf_rope import rope_of

# Given by the shapes of the tensors as well: where the configuration has the field, it must say the same.
SIZES: dict[str, Sequence[str]] = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
HEAD_SIZES = (
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
# Copied into the first of these fields that the class of the configuration has.
FIELDS: dict[str, Sequence[str]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.layer_norm_epsilon": EPSILONS,
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "leading_dense_block_count": ("first_k_dense_replace",),
}
# Values that ask for nothing, where the configuration has no field for them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count"), (0, 1)),
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_shared_count": (0, 1),
    "context_length": (),
}
IGNORED = ("tensor_data_layout", "rope.scaling.finetuned", "pooling_type")
APART = ("rope.", "attention.sliding_window")  # beginnings of names that have functions of their own, as have
ALONE = ("attention.scale", *HEAD_SIZES)


def carry_over(header: Header, config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module]) -> None:
    """Changes `config` so that it says what the header says. build: its model, on meta, to look at its tables.

    Raises UsageError where a setting has no place in the configuration.
    """
    known = fields_of(config)
    for name, value in header.settings.items():
        if name in IGNORED or name in ALONE or name.startswith(APART):
            continue
        if name in SIZES:
            check_size(header, name, value, config, known)
        elif not carry_field(name, value, config, known) and not is_neutral(name, value):
            raise header.refusal(name, f"which a {type(config).__name__} of transformers has no field for")
    check_heads(header, config)
    carry_windows(header, config, known)
    carry_scale(header, config, known)
    rope_of(header, config, build)


def fields_of(config: PretrainedConfig) -> set[str]:
    """The fields that the class has; a configuration also keeps others, which nothing reads."""
    return {*type(config)().to_dict(), *config.attribute_map}


def carry_field(name: str, value: Any, config: PretrainedConfig, known: set[str]) -> bool:
    """Copies one value into its field; False where there is none."""
    if name == "expert_gating_func" and "scoring_func" in known and value in (1, 2):
        config.scoring_func = {1: "softmax", 2: "sigmoid"}[value]
        return True
    field = next((field for field in FIELDS.get(name, ()) if field in known), None)
    if field is None:
        return False
    if not (field.endswith("softcapping") and value == 0):
        setattr(config, field, value)
    elif getattr(config, field) is not None:
        setattr(config, field, None)
    return True


def is_neutral(name: str, value: Any) -> bool:
    if name == "context_length":
        return True  # of a model without positions, a recommendation
    return value in NEUTRAL.get(name, (0, False)) or (isinstance(value, list) and not any(value))


def check_size(header: Header, name: str, value: Any, config: PretrainedConfig, known: set[str]) -> None:
    """Raises UsageError where the configuration says another size. Lists have one entry per layer."""
    field = next((field for field in SIZES[name] if field in known), None)
    found = getattr(config, field, None) if field is not None else None
    if found is None or not value:
        return
    if isinstance(value, list):
        used = [entry for entry in value if entry]
        attends = ["attention" in str(kind) for kind in getattr(config, "layer_types", None) or [True] * len(value)]
        layered = name == "attention.head_count_kv" and [bool(entry) for entry in value] == attends
        same = isinstance(found, list) and found == value
        if not same and not (set(used) == {found} and (len(used) == len(value) or layered)):
            raise header.refusal(name, f"and {field} of the configuration is {found!r}")
    elif value != found:
        raise header.refusal(name, f"and {field} of the configuration is {found!r}")


def check_heads(header: Header, config: PretrainedConfig) -> None:
    """The size of a head, which the shapes of the matrices do not give alone."""
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    sizes = (size, getattr(config, "global_head_dim", None))
    for name in HEAD_SIZES:
        if name in header.settings and header.settings[name] not in sizes:
            raise header.refusal(name, f"and the configuration gives heads of {size}")


def carry_windows(header: Header, config: PretrainedConfig, known: set[str]) -> None:
    """The sliding window, and which layers have it."""
    name = "attention.sliding_window"
    window, pattern = header.settings.get(name), header.settings.get(f"{name}_pattern")
    unknown = next((key for key in header.settings if key.startswith(f"{name}_") and key != f"{name}_pattern"), None)
    if unknown:
        raise header.refusal(unknown, "which is not read here")
    if not window or window >= (header.settings.get("context_length") or window + 1):
        return
    if "sliding_window" not in known:
        raise header.refusal(name, f"which a {type(config).__name__} of transformers has no field for")
    config.sliding_window = window
    types = getattr(config, "layer_types", None)
    if pattern and types:
        layers = range(len(types))
        slides = list(pattern) if isinstance(pattern, list) else [(index + 1) % pattern != 0 for index in layers]
        if len(slides) < len(types):
            raise header.refusal(f"{name}_pattern", f"and the model has {len(types)} layers")
        config.layer_types = types = ["sliding_attention" if slides[index] else "full_attention" for index in layers]
    if types and "sliding_attention" not in types:
        raise header.refusal(name, "and no layer of the configuration has a window")


def carry_scale(header: Header, config: PretrainedConfig, known: set[str]) -> None:
    """The factor of the products of queries and keys, where it is not that of the size of a head."""
    name = "attention.scale"
    scale = header.settings.get(name)
    if not scale:
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "attention_multiplier" in known:
        config.attention_multiplier = scale
    elif "query_pre_attn_scalar" in known:
        exact = scale**-2
        config.query_pre_attn_scalar = round(exact) if abs(exact - round(exact)) < 1e-3 else exact
    elif abs(scale - size**-0.5) > 1e-5:
        raise header.refusal(name, f"which a {type(config).__name__} of transformers has no field for")
