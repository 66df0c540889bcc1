"""Tiny random decoders of many families, and folders of them as one would download them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN, BLOCKS, VOCABULARY, TOKENS, EXPERTS = 32, 4, 128, 64, 4
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2

PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
MIXED = ["sliding_attention", "full_attention"] * (BLOCKS // 2)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "opt": ("opt", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": TOKENS},
    ),
    "gpt_neox": ("gpt_neox", PLAIN),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", GROUPED),
    "gemma2": ("gemma2", {**GROUPED, "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {**GROUPED, "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 16},
    ),
    "phi": ("phi", PLAIN),
    "phi3": ("phi3", {**PLAIN, "num_key_value_heads": 2}),
    "falcon": ("falcon", {**PLAIN, "ffn_hidden_size": 64}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4}),
    "olmo2": ("olmo2", {**PLAIN, "num_key_value_heads": 2}),
    "stablelm": ("stablelm", {**PLAIN, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**GROUPED, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "olmoe": ("olmoe", {**PLAIN, "num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            **GROUPED,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": MIXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
# Grouped routing with a correction of scores, a shared expert, a dense MLP in the first layer. As published, without
# low-rank queries.
DEEPSEEK = {
    **PLAIN,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
LATENT = {key: DEEPSEEK[key] for key in DEEPSEEK if key.endswith(("_head_dim", "lora_rank"))}
MORE: dict[str, tuple[str, dict[str, Any]]] = {"deepseek_v3": ("deepseek_v3", DEEPSEEK)}
# Experts whose module does not say how its matrices are used, beside routers that are.
UNSPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    "jetmoe": (
        "jetmoe",
        {
            **{key: PLAIN[key] for key in PLAIN if key != "num_attention_heads"},
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            **GROUPED,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
    ),
    "longcat": (
        "longcat_flash",
        {
            **{key: PLAIN[key] for key in PLAIN if key != "num_hidden_layers"},
            **LATENT,
            "head_dim": 8,
            "q_lora_rank": 16,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
        },
    ),
}
MOE = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def config(name: str) -> Any:
    model_type, sizes = {**FAMILIES, **MORE, **UNSPLIT}[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**sizes, **ids})


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with weights large enough to matter, norms and biases included: whatever is forgotten shows."""
    model = AutoModelForCausalLM.from_config(config(name), dtype=dtype).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def token_ids(batch: int = 2, tokens: int = 24, seed: int = 0) -> torch.Tensor:
    """[batch, tokens]"""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every printable ASCII character and the newline, `<s>` in front."""
    letters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: place for place, token in enumerate([*SPECIAL.values(), *letters])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    fast.decoder = decoders.Fuse()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=TOKENS, clean_up_tokenization_spaces=False, **SPECIAL
    )


def save_model(
    name: str,
    folder: Path,
    original_format: bool = True,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Callable[[PreTrainedModel], object] | None = None,
) -> PreTrainedModel:
    """Saves model and tokenizer; `original_format` gives the names of published files, else the modules'.

    change: something to do to the model before it is saved.
    """
    model = build(name, seed, dtype)
    if change is not None:
        change(model)
    model.save_pretrained(folder, save_original_format=original_format)
    tokenizer().save_pretrained(folder)
    return model
