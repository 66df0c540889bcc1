"""Replaces plain linears of a model by packed ones, and back; handles modules and names, not files.

Fused experts are unfused first where one of their linears is packed, and a transposed linear (`Conv1D`) is
packed as its `[out, in]` matrix. The replaced modules are kept, so that `restore` returns a model of the classes
that transformers builds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.errors import RunError, UsageError
from budwood.kernels.linear import SparseLinear
from budwood.models.experts import ExpertLinears, fused_state, is_fused, unfuse_module

EXPERT = re.compile(r"(?P<experts>.+)\.(?P<part>gate_up|up|down)\.\d+")


@dataclass
class Substitution:
    """How a model differs from the one that its configuration describes; names are those of the model.

    linears, experts: the modules that were replaced, on meta, by name. reshaped, added: parameters that have another
    shape, or that the described model does not have.
    """

    linears: dict[str, nn.Module] = field(default_factory=dict)
    experts: dict[str, nn.Module] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    @property
    def missing_weight(self) -> str | None:
        """A parameter of the described model that this one does not have; always the same one, None without any."""
        if self.experts:
            path = min(self.experts)
            return f"{path}.{next(name for name, _ in self.experts[path].named_parameters())}"
        return f"{min(self.linears)}.weight" if self.linears else None


def local_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name in `model`, for the modules and experts that the model has.

    A checkpoint of a whole model may be loaded into its base model, without the prefix and the head, and
    back.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())

    def exists(name: str) -> bool:
        expert = EXPERT.fullmatch(name)
        return name in modules or (
            expert is not None and expert["experts"] in modules and is_fused(modules[expert["experts"]])
        )

    found = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        local = next((candidate for candidate in candidates if exists(candidate)), None)
        if local is not None:
            found[name] = local
    return found


def unfuse_experts(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """Replaces fused experts that contain one of `names` by plain linears; path -> the fused module."""
    fused: dict[str, nn.Module] = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        path = expert["experts"] if expert else None
        if path is not None and path not in fused and is_fused(model.get_submodule(path)):
            fused[path] = model.get_submodule(path)
            model.set_submodule(path, unfuse_module(fused[path]))
    return fused


def put(model: PreTrainedModel, name: str, packed: SparseLinear) -> nn.Module:
    """Replaces the linear `name` by `packed` and returns it; raises RunError unless it is a linear of that shape."""
    plain = model.get_submodule(name)
    if not isinstance(plain, nn.Linear | Conv1D):
        raise RunError(f"{name} is packed in the checkpoint but a {type(plain).__name__} in the model, not a linear")
    out, width = plain.weight.T.shape if isinstance(plain, Conv1D) else plain.weight.shape
    if packed.shape != (out, width):
        raise RunError(f"{name} is {packed.shape} in the checkpoint and {(out, width)} in the model")
    model.set_submodule(name, packed.train(plain.training))
    return plain


def restore(model: PreTrainedModel, before: Substitution, dtype: torch.dtype | None = None) -> None:
    """Unpacks weights, in `dtype` or their own, and fuses experts again, which `before` then no longer lists.

    Experts of different shapes stay plain linears. Raises UsageError if a packed weight is offloaded.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, module in packed.items():
        if any(tensor.is_meta for tensor in module.packed().values()):
            raise UsageError(f"{name} is offloaded; load the model without offload to unpack its weights")
    for name, module in packed.items():
        dense = module.dequantize().to(dtype)  # these only: other tensors of the model keep their dtype
        plain = before.linears.get(name)
        model.set_submodule(name, transposed(dense, plain) if isinstance(plain, Conv1D) else dense)
    before.linears.clear()
    for path in list(before.experts):
        linears = model.get_submodule(path)
        assert isinstance(linears, ExpertLinears)
        if not any(name.startswith(f"{path}.") for name in (*before.reshaped, *before.added)):
            model.set_submodule(path, fused_again(linears, before.experts.pop(path)))


def transposed(dense: nn.Linear, plain: Conv1D) -> Conv1D:
    """`plain` with the weight and bias of `dense`."""
    plain.weight = nn.Parameter(dense.weight.T.contiguous())
    plain.bias = dense.bias
    return plain


def fused_again(plain: ExpertLinears, fused: nn.Module) -> nn.Module:
    """`fused` with the weights of experts that are plain linears: the reverse of unfusing."""
    for name, tensor in fused_state(plain).items():
        if "." not in name:  # its children are the same in both
            setattr(fused, name, nn.Parameter(tensor))
    return fused
