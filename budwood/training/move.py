"""What of a model is trained, as text such as "biases+norms+masklora", and which of its parameters that means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import UsageError
from budwood.training.adapters import ADAPTERS, Adapter

FITTED = ("weights", "biases", "norms")  # what can be fitted to the outputs of a block
PARTS = ("biases", "norms", "head", "embeddings", *ADAPTERS)
NO_EFFECT = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative change of a block's outputs; 1e-2 in 16 bits


@dataclass(frozen=True)
class Move:
    """adapter: of every pruned matrix, None where these do not move."""

    biases: bool = False
    norms: bool = False
    head: bool = False
    embeddings: bool = False
    adapter: Adapter | None = None

    @property
    def outside(self) -> bool:
        """Whether something moves that needs the whole model, which the fit of one block does not see."""
        return self.head or self.embeddings


def parse_move(text: str, rank: int = 16, alpha: float = 32.0) -> Move:
    """Raises UsageError for a part that does not exist, for two rules for the matrices, and for nothing at all."""
    parts = [part.strip() for part in text.split("+")] if isinstance(text, str) else [str(text)]
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"move is {text!r}, and there is no {part!r}; join some of {', '.join(PARTS)} by +")
    rules = [part for part in parts if part in ADAPTERS]
    if len(rules) > 1:
        raise UsageError(f"move is {text!r}, but a matrix moves by one rule; give one of {', '.join(rules)}")
    return Move(
        biases="biases" in parts,
        norms="norms" in parts,
        head="head" in parts,
        embeddings="embeddings" in parts,
        adapter=ADAPTERS[rules[0]](rank, alpha) if rules else None,
    )


def parse_fit(text: object) -> Move:
    """What moves in a fit of a block to given outputs: some of FITTED, joined by +. Raises UsageError for all else."""
    named = text.split("+") if isinstance(text, str) else []
    if not named or len(set(named)) < len(named) or not set(named) <= set(FITTED):
        raise UsageError(
            f"move names some of {', '.join(FITTED)}, joined by '+', such as 'weights+norms'; got {text!r}"
        )
    return parse_move("+".join(named))


def norms(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of norms, by name: parameters of modules that hold vectors and nothing else."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, owner in module.named_modules()
        if not any(True for _ in owner.children())
        and all(parameter.dim() <= 1 for parameter in owner.parameters(recurse=False))
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.is_floating_point()
    }


def biases(module: nn.Module) -> dict[str, nn.Parameter]:
    """Biases, by name, those of norms among them."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] == "bias" and parameter.dim() == 1
    }


def vectors(module: nn.Module, move: Move) -> dict[str, nn.Parameter]:
    """The biases and the parameters of norms in `module` that move, by name; a norm's bias is both."""
    moving = (norms(module) if move.norms else {}) | (biases(module) if move.biases else {})
    return {name: parameter for name, parameter in module.named_parameters() if name in moving}


def check_move(move: Move, model: nn.Module) -> None:
    """Raises UsageError where nothing moves because the model has no such parameters, and as `check_head`."""
    check_head(move, model)
    if move.adapter is None and not move.outside and not vectors(model, move):
        raise UsageError("nothing would be trained: this model has no biases; give norms or masklora in move")


def check_head(move: Move, model: nn.Module) -> None:
    """Raises UsageError where the head is to move and is tied to the embeddings, which would move with it."""
    if move.head and getattr(model, "all_tied_weights_keys", None):
        raise UsageError(
            "the head of this model is tied to its embeddings, so a change of one changes the other; "
            "leave head out of move, or train both with embeddings"
        )


def moving_outside(model: Any, move: Move) -> dict[str, nn.Parameter]:
    """The embeddings that move, by full name."""
    if not move.embeddings:
        return {}
    embedding = model.get_input_embeddings()
    return {f"{name}.weight": owner.weight for name, owner in model.named_modules() if owner is embedding}


def head_of(model: Any) -> dict[str, nn.Module]:
    """The output head by full name."""
    head = model.get_output_embeddings()
    return {name: owner for name, owner in model.named_modules() if owner is head}


def without_effect(block: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Biases of linears that change nothing but rounding errors, by name inside the block: those of keys, which softmax
    cancels. Their gradients are noise, which Adam turns into full steps.

    run: the outputs of the block for some tokens. A linear that these do not reach is not judged.
    """
    called: set[nn.Module] = set()
    linears: Mapping[str, nn.Module] = {
        name: owner
        for name, owner in block.named_modules()
        if getattr(owner, "bias", None) is not None and owner._parameters.get("weight", torch.empty(0)).dim() == 2
    }
    hooks = [owner.register_forward_hook(lambda module, *_: called.add(module)) for owner in linears.values()]
    found: set[str] = set()
    try:
        with torch.no_grad():
            before = run()
            limit = NO_EFFECT.get(before.dtype, 1e-2) * before.float().norm()
            for name, owner in linears.items():
                bias = owner.get_parameter("bias")
                held = bias.clone()
                random = torch.Generator().manual_seed(0)
                bias.add_(torch.randn(bias.shape, generator=random).to(bias.device, bias.dtype))
                changed = (run() - before).float().norm()
                bias.copy_(held)
                if owner in called and changed <= limit:
                    found.add(f"{name}.bias")
    finally:
        for hook in hooks:
            hook.remove()
    return found
