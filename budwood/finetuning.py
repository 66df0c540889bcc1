"""Fine-tuning of pruned models by users' own trainers: a LoRA of peft that can be merged without filling the zeros."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import RunError, UsageError
from budwood.models.experts import is_fused
from budwood.models.linears import prunable, read
from budwood.training.adapters import MaskLora
from budwood.training.product import adapted

logger = logging.getLogger(__name__)

NEVER = {"lora_dropout": 0.0, "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "target_parameters": None}


def sparse_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 32,
    targets: Sequence[str] | None = None,
    *,
    adapter: str | Path | None = None,
    **options: Any,
) -> Any:
    """The model with a masked LoRA (MaskLoRA of PERP, arXiv 2312.15230) on every pruned linear: a `peft.PeftModel`.

    It is trained, saved and merged as any model of peft; `merge_and_unload` keeps every zero. The forward pass
    multiplies by W + alpha / rank (BA masked), so merging changes nothing. model: of transformers, dense with zeros, or
    packed by budwood (which is unpacked). targets: full names of linears; all with zeros by default. adapter: a folder
    that `save_pretrained` wrote, to go on with; its settings count. options: of `peft.LoraConfig`, except dropout, DoRA
    and biases, which cannot be merged into a masked matrix.

    Raises UsageError without peft, for such options, and where no linear has zeros.
    """
    peft = _peft()
    for name, value in NEVER.items():
        if options.get(name, value) != value:
            raise UsageError(f"{name}={options[name]!r} cannot be merged into a masked matrix; leave it out")
    if getattr(model, "hf_quantizer", None) is not None and hasattr(model.hf_quantizer, "substitution"):
        model = model.dequantize()
    found = {name: linear for name, linear in prunable(model).items() if (read(linear) == 0).any()}
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    if fused:
        logger.warning("the experts of %s are fused in one parameter, so they are not trained", fused[0])
    if targets is not None:
        missing = [name for name in targets if name not in found]
        if missing:
            raise UsageError(f"{missing[0]} is no linear with zeros; give names as `budwood inspect` shows them")
        found = {name: found[name] for name in targets}
    if not found:
        raise UsageError("no linear of this model has zeros; give a model that was pruned")
    if adapter is not None:
        config = peft.LoraConfig.from_pretrained(str(adapter))
        config._register_custom_module(_layers(found))
        return peft.PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=True)
    conv1d = {not isinstance(linear, nn.Linear) for linear in found.values()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(found),
        task_type=options.pop("task_type", "CAUSAL_LM"),
        **{**options, "lora_dropout": 0.0, "fan_in_fan_out": conv1d == {True}},
    )
    config._register_custom_module(_layers(found))
    return peft.get_peft_model(model, config)


def _layers(linears: Mapping[str, nn.Module]) -> dict[type[nn.Module], type[nn.Module]]:
    """The layer of peft for each kind of linear."""
    return {type(linear): masked_linear() for linear in linears.values()}


@cache
def masked_linear() -> type[nn.Module]:
    """The layer of peft: made when it is needed, since peft is optional."""
    _peft()
    from peft.tuners.lora.layer import Linear

    class MaskedLoraLinear(Linear):
        """A linear with zeros, and a low-rank term that is zero where they are."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                result: Tensor = super().forward(x, *args, **kwargs)
                return result
            active = [name for name in self.active_adapters if name in self.lora_A]
            if len(active) != 1 or kwargs.get("adapter_names") is not None:
                raise RunError(f"one masked adapter can be active at a time, got {len(active)}; use set_adapter")
            base: Any = self.get_base_layer()
            a, b = (part[active[0]].get_parameter("weight") for part in (self.lora_A, self.lora_B))
            rule = MaskLora(rank=1, alpha=self.scaling[active[0]])  # whose scale is alpha / rank
            product = adapted(x, read(base), rule, [a, b])
            return product if base.bias is None else product + base.bias.to(product.dtype)

        def get_delta_weight(self, adapter: str) -> Tensor:
            delta: Tensor = super().get_delta_weight(adapter)
            return torch.where(self.get_base_layer().get_parameter("weight") != 0, delta, 0)

    return MaskedLoraLinear


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("sparse_lora needs the package peft, which is not installed; pip install peft") from error
    return peft
