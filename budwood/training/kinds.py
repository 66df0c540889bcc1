"""Which parameters of a block may move when it is fitted, told apart by shape and place, not by name."""

from torch import nn

from budwood.errors import UsageError

KINDS = ("weights", "biases", "norms")


def kinds_of(text: object) -> tuple[str, ...]:
    """The kinds that an option such as "weights+norms" names, in the order of KINDS; UsageError for anything else."""
    named = text.split("+") if isinstance(text, str) else []
    if not named or len(set(named)) < len(named) or not set(named) <= set(KINDS):
        raise UsageError(f"move names some of {', '.join(KINDS)}, joined by '+', such as 'weights+norms'; got {text!r}")
    return tuple(kind for kind in KINDS if kind in named)


def norms(module: nn.Module) -> list[str]:
    """Names of the weights and biases of norms: parameters of modules that hold vectors and nothing else."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, owner in module.named_modules()
        if not any(True for _ in owner.children())
        and all(parameter.dim() <= 1 for parameter in owner.parameters(recurse=False))
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]
