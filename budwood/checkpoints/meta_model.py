"""A model without its weights: every parameter on the meta device, every buffer real.

Buffers such as rotary tables are not in the files, so they are computed; parameters are filled block by block.
"""

import re
from collections.abc import Callable, Set
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from budwood.errors import UsageError

HALF = (torch.float16, torch.bfloat16)


def read_config(path: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a folder, or of a bare `config.json`; raises UsageError when it is not that of a decoder."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} holds no configuration that transformers can read: {reason}") from error
    refuse_other_than_decoders(config, path)
    return config


def refuse_other_than_decoders(config: PretrainedConfig, path: Path) -> None:
    decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = getattr(config, "architectures", None) or []
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    foreign = bool(named) and not decoders.intersection(named) and not hasattr(config, "auto_map")
    if getattr(config, "is_encoder_decoder", False) or foreign or not known:
        what = named[0] if named else config.model_type
        raise UsageError(f"{path} is a {what}; budwood prunes decoder language models (AutoModelForCausalLM) only")


def build(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` in evaluation mode, `dtype` for its parameters, parameters on meta."""
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    with init_empty_weights(include_buffers=False), no_init_weights():  # there is nothing to initialise
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # creating parameters on meta one by one has separated tied ones
    return model.eval()


def stays_float32(model: PreTrainedModel, dtype: torch.dtype, created: Set[str] = frozenset()) -> Callable[[str], bool]:
    """Whether transformers holds the tensor of a full name in float32 when it loads the model in `dtype`.

    Classes name parts of names for that, which are expressions. created: see `created_float32`.
    """
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype in HALF else set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    rule = re.compile("|".join(f"(?:{part.replace('*', '.*')})" for part in sorted(names))) if names else None
    return lambda name: name in created or (rule is not None and rule.search(name) is not None)


def created_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the tensors that a model that was built in a `dtype` of 16 bits created in float32 all the same."""
    if dtype not in HALF:
        return set()
    return {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
