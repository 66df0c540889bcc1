"""Parameters of another shape than the configuration gives them, and added ones: modules made to hold them."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from budwood.errors import RunError


def fit_parameters(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Gives parameters of `model` (name: shape as its module stores it) these shapes, or adds them; empty afterwards.

    A new parameter takes dtype and device of the one it replaces, or of another one of its module. The sizes that
    linears keep of themselves follow. Returns the names of what was changed. Raises RunError for a module that is not
    there.
    """
    changed = []
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError as error:
            raise RunError(f"the checkpoint holds {name}, but the model has no module {path}") from error
        known = owner._parameters.get(attribute)
        like = known if known is not None else next(owner.parameters(recurse=False), None)
        if like is None or (known is not None and tuple(known.shape) == tuple(shape)):
            continue
        empty = like.detach().new_empty(tuple(shape))
        owner.register_parameter(attribute, nn.Parameter(empty, requires_grad=like.requires_grad))
        if attribute == "weight":
            note_sizes(owner)
        changed.append(name)
    return changed


def note_sizes(linear: nn.Module) -> None:
    """The sizes that a linear keeps of itself become those of its weight."""
    weight = linear.get_parameter("weight")
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = weight.shape
    elif isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = weight.shape
