"""Fused experts as plain linears, on which hooks and pruning methods work.

transformers keeps the experts of a block in three-dimensional parameters, `gate_up_proj` and `down_proj`
[experts, out, in] (or [experts, in, out]), which no hook sees. Here they are split into one linear per
expert, each in the orientation it is stored in, so that splitting takes views and fusing again is a stack.
"""

import re
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.models.blocks import find_blocks

FUSED = re.compile(r"(?P<path>(?:.+\.)?)(?P<part>gate_up|up|down)_proj(?P<bias>_bias)?")
LINEAR = re.compile(r"(?P<part>gate_up|up|down)\.(?P<expert>\d+)\.(?P<kind>weight|bias)")


class Transposed(Conv1D):
    """A linear whose weight is stored [in, out], with or without bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)
        self.nx, self.nf = weight.shape
        self.weight = parameter(weight)
        self.register_parameter("bias", None if bias is None else parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight  # [tokens, in] @ [in, out]
        return product if self.bias is None else product + self.bias


class ExpertLinears(nn.Module):
    """Experts one by one: `gate_up.<e>` (`up.<e>` where there is no gate) and `down.<e>`.

    Replaces a fused experts module and computes the same. An expert is called with the tokens
    routed to it and with no others; one without tokens is not called.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.num_experts = len(fused.get_parameter("down_proj"))
        self.first = "gate_up" if fused.has_gate else "up"
        self.add_module(self.first, linears_of(fused, self.first))
        self.down = linears_of(fused, "down")
        for name, child in fused.named_children():
            self.add_module(name, child)
        # The activation between the linears is the fused module's own method, which needs everything but the weights.
        self.activation = (weightless(fused),)  # in a tuple, so that it does not become a child
        self.observer: Callable[[list[int], Tensor, Tensor], None] | None = None  # see `models/routing.py`

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [tokens, hidden], the experts of each token and their weights [tokens, k] -> [tokens, hidden]."""
        # Rows in the order of transformers' grouped matmul: how a row is rounded depends on its position.
        experts, order = torch.sort(chosen.reshape(-1))  # [tokens * k]
        rows, weights = hidden[order // chosen.shape[-1]], weights.reshape(-1)[order, None]
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        outputs = torch.cat([self.outputs(expert, part) for expert, part in enumerate(rows.split(counts)) if len(part)])
        if self.observer is not None:
            self.observer(counts, outputs, weights)
        weighted = outputs * weights  # [tokens * k, hidden]
        weighted = torch.empty_like(weighted).index_copy(0, order, weighted)
        return weighted.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)

    def outputs(self, expert: int, hidden: Tensor) -> Tensor:
        """The output of one expert for its tokens, [tokens, hidden] -> [tokens, hidden]."""
        (fused,) = self.activation
        inner = self.get_submodule(f"{self.first}.{expert}")(hidden)
        inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
        outer = self.down[expert](inner)
        return fused.post_expert_norm(outer) if getattr(fused, "has_post_expert_norm", False) else outer


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds several experts in parameters of its own and declares their orientation."""
    names = {name for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
    return "down_proj" in names and bool(names & {"gate_up_proj", "up_proj"}) and hasattr(module, "is_transposed")


def unfuse(model: PreTrainedModel) -> list[str]:
    """Replaces every fused experts module inside the blocks; the names of those replaced.

    Works on real weights, which are shared and not copied, and on the meta device.
    """
    path, blocks = find_blocks(model)
    fused = [name for name, module in blocks.named_modules(prefix=path) if is_fused(module)]
    for name in fused:
        model.set_submodule(name, unfuse_module(model.get_submodule(name)))
    return fused


def unfuse_module(fused: nn.Module) -> ExpertLinears:
    """The same experts as plain linears whose weights are views; `fused` itself is left as it is."""
    return ExpertLinears(fused).train(fused.training)


def split_fused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a checkpoint in module names -> tensors of the unfused module (views); others stay.

    `...experts.gate_up_proj` [experts, ...] becomes `...experts.gate_up.<e>.weight`, its `_bias` `.<e>.bias`.
    """
    match = FUSED.fullmatch(name)
    if match is None or tensor.dim() != (2 if match["bias"] else 3):
        return {name: tensor}
    kind = "bias" if match["bias"] else "weight"
    return {f"{match['path']}{match['part']}.{e}.{kind}": part for e, part in enumerate(tensor.unbind())}


def fused_state(experts: ExpertLinears, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of the fused module, from that of the plain linears: the module's own, or the one given."""
    state = experts.state_dict() if state is None else state
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = LINEAR.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            fused = f"{match['part']}_proj{'_bias' if match['kind'] == 'bias' else ''}"
            parts.setdefault(fused, []).append((int(match["expert"]), tensor))
    return {
        name: torch.stack([tensor for _, tensor in sorted(numbered, key=lambda pair: pair[0])])
        for name, numbered in parts.items()
    } | others


def can_be_fused(experts: ExpertLinears, state: Mapping[str, Tensor]) -> bool:
    """Whether the experts with these tensors are all of one shape, with biases where the fused module has them."""
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for name, tensor in state.items():
        if match := LINEAR.fullmatch(name):
            shapes.setdefault((match["part"], match["kind"]), set()).add(tuple(tensor.shape))
    (fused,) = experts.activation
    kinds = {kind for _, kind in shapes}
    return kinds == ({"weight", "bias"} if fused.has_bias else {"weight"}) and all(len(s) == 1 for s in shapes.values())


def linears_of(fused: nn.Module, part: str) -> nn.ModuleList:
    """The linears of `<part>_proj`, one per expert, sharing its memory."""
    weights = fused.get_parameter(f"{part}_proj")  # [experts, out, in], or [experts, in, out]
    biases = fused.get_parameter(f"{part}_proj_bias") if fused.has_bias else [None] * len(weights)
    make = Transposed if fused.is_transposed else plain
    return nn.ModuleList(make(weight, bias) for weight, bias in zip(weights, biases, strict=True))


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """weight [out, in], bias [out]."""
    out, width = weight.shape
    linear = nn.Linear(width, out, bias=bias is not None, device="meta")  # on meta: initial values take no time
    linear.weight = parameter(weight)
    if bias is not None:
        linear.bias = parameter(bias)
    return linear


def parameter(view: Tensor) -> nn.Parameter:
    return nn.Parameter(view.detach(), requires_grad=view.requires_grad)


def weightless(module: nn.Module) -> Any:
    """A shallow copy without parameters: the same settings, the same children."""
    shell = copy(module)
    shell._parameters = {}
    return shell
