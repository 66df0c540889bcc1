"""A model without its weights: every parameter on the meta device, every buffer real.

Buffers such as rotary tables are not in the files, so they are computed; parameters are filled block by block.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from budwood.checkpoints.sidecars import read_config_json
from budwood.errors import UsageError

MODULES = 200_000  # twice those of the largest published model with its experts one by one
# How a model is computed is this machine's choice. A configuration may name native code of the hub here, which
# transformers would fetch and run, or a package that is not installed.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
HALF = (torch.float16, torch.bfloat16)


def read_config(path: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a folder, or of a bare `config.json`; raises UsageError when it is not that of a decoder.

    Code that comes with the folder is run with `trust_remote_code` only, and never asked for.
    """
    file = path / "config.json" if path.is_dir() else path
    content = read_config_json(file)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # classes check their fields in many ways; all of them mean that it cannot be
        if not trust_remote_code and needs_code(content, error):
            raise refused_code(path) from error
        raise UsageError(f"{path} holds no configuration that transformers can read: {reason_of(error)}") from error
    refuse_other_than_decoders(config, path)
    for name in IMPLEMENTATIONS:
        setattr(config, f"_{name}", None)
    return config


def needs_code(content: Mapping[str, Any], error: Exception) -> bool:
    """Whether a model was refused because its code was not allowed to run."""
    return bool(content.get("auto_map")) and "trust_remote_code" in str(error)


def refused_code(path: object) -> UsageError:
    return UsageError(
        f"{path} comes with code of its own, which is not run unless asked for; read it, and give --trust-remote-code "
        "(trust_remote_code=True) if you trust it"
    )


def reason_of(error: Exception) -> str:
    """The first line of an error of another library."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def refuse_other_than_decoders(config: PretrainedConfig, path: Path) -> None:
    decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = getattr(config, "architectures", None) or []
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    foreign = bool(named) and not decoders.intersection(named) and not hasattr(config, "auto_map")
    if getattr(config, "is_encoder_decoder", False) or foreign or not known:
        what = named[0] if named else config.model_type
        raise UsageError(f"{path} is a {what}; budwood prunes decoder language models (AutoModelForCausalLM) only")


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """In this context, UsageError when more modules than that are made: a file of a few bytes can ask for millions."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > modules:
            raise UsageError(f"config.json describes a model of more than {modules} modules; correct its numbers")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def build(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` in evaluation mode, `dtype` for its parameters, parameters on meta.

    Raises UsageError where it would have more than `MODULES` modules.
    """
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    with (
        at_most(MODULES),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):  # there is nothing to initialise
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
