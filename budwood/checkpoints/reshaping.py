"""Parameters of other shapes in a model that is being loaded, and what refuses their folder without the plug-in.

transformers refuses a tensor whose shape differs from the parameter's, but only warns of one that it does not expect.
So a folder in which parameters were added and nothing else was changed needs a guard: `save_pretrained` writes one
weight beside them as [1, ...], and the plug-in removes that dimension after loading.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from budwood.checkpoints.substitution import Substitution
from budwood.errors import UsageError
from budwood.models.units import fit_shapes


def reshape(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], before: Substitution) -> None:
    """Gives parameters of `model` (name in the model: shape) other shapes or adds them, and notes them in `before`."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in fit_shapes(model, shapes):
        (before.reshaped if name in known else before.added).append(name)


def guarded(model: PreTrainedModel, before: Substitution) -> str | None:
    """The parameter to write with one dimension more, always the same one; None where no guard is needed."""
    if before.reshaped or before.missing_weight is not None:
        return None
    for name in sorted(before.added):
        path = name.rpartition(".")[0]
        for attribute, _ in model.get_submodule(path).named_parameters(recurse=False):
            if f"{path}.{attribute}" not in before.added:
                return f"{path}.{attribute}"
    return None


def add_dimension(model: nn.Module, name: str | None) -> None:
    """The parameter `name` [...] becomes [1, ...]; no effect for None."""
    if name is not None:
        weight = model.get_parameter(name)
        _replace(model, name, nn.Parameter(weight.detach()[None], requires_grad=weight.requires_grad))


def remove_dimension(model: nn.Module, name: str | None) -> None:
    """The reverse of `add_dimension`. Raises UsageError where the parameter is offloaded."""
    if name is not None:
        weight = model.get_parameter(name)
        if weight.is_meta:
            raise UsageError(f"{name} is offloaded, which this checkpoint does not allow; keep its module in memory")
        _replace(model, name, nn.Parameter(weight.detach()[0], requires_grad=weight.requires_grad))


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path).register_parameter(attribute, parameter)
