"""Parameters whose shapes differ from those the configuration gives, and parameters it does not know."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from budwood.errors import RunError


def fit_parameters(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Replaces or adds parameters of `model` (full name: shape as its module stores it); the new ones are empty.

    A new parameter takes dtype and device of the one it replaces, else of another one of its module, else of the
    first one of the model. The sizes that a linear keeps as attributes follow. Returns the names that were changed.
    Raises RunError for a module that the model does not have.
    """
    changed = []
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError as error:
            raise RunError(f"the checkpoint holds {name}, but the model has no module {path}") from error
        old = owner._parameters.get(attribute)
        if old is not None and tuple(old.shape) == tuple(shape):
            continue
        like = old if old is not None else next(owner.parameters(recurse=False), None)
        like = like if like is not None else next(model.parameters())
        replace(owner, attribute, like.detach().new_empty(tuple(shape)), like.requires_grad)
        changed.append(name)
    return changed


def replace(owner: nn.Module, attribute: str, value: Tensor, requires_grad: bool) -> None:
    """Makes `value` the parameter `attribute` of `owner`, and notes its sizes when it is the weight of a linear."""
    owner.register_parameter(attribute, nn.Parameter(value, requires_grad=requires_grad))
    if attribute == "weight":
        note_sizes(owner)


def note_sizes(linear: nn.Module) -> None:
    """Sets the sizes that a linear keeps as attributes to those of its weight; no effect on other modules."""
    weight = linear.get_parameter("weight")
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = weight.shape
    elif isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = weight.shape
