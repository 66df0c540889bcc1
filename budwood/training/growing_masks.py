"""Masks that grow while a model is trained: of whole units or of single weights, by smoothed importances.

What is masked is zero in the base weights, so that a low-rank term that follows their zeros (`MaskLora`) is masked too.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from budwood.models.linears import read
from budwood.sparsity.lora_importance import dropped_of, keep_all_but, normal, smoothed
from budwood.sparsity.patterns import NM, Share
from budwood.sparsity.units import Units
from budwood.training.descent import part_of

Importances = Callable[[str], Tensor | None]  # of the weights of a linear [out, in]; None where it got no gradient


class UnitMasks:
    """Masks of heads and neurons. Masked units stay masked.

    linears: of a model in memory, by full name. sets: units by full name of the consumer. counts: units of each that
    are masked in the end, of which a share is rounded down.
    """

    def __init__(self, linears: Mapping[str, nn.Module], sets: Mapping[str, Units], counts: Mapping[str, float]):
        self.linears, self.sets, self.counts = linears, sets, counts
        self.running: dict[str, Tensor] = {}  # importance of every unit, by consumer
        self.keep = {name: torch.ones(len(units), dtype=torch.bool) for name, units in sets.items()}

    def observe(self, importances: Importances) -> None:
        """Adds the importances of a step: sums over the weights of a unit, scaled to norm 1 in every linear."""
        for consumer, units in self.sets.items():
            total = torch.zeros(len(units))
            for name in units.linears:
                values = importances(consumer.removesuffix(units.consumer) + name)
                if values is None:
                    continue
                if name == units.consumer:
                    total += normal(units.fold(values.sum(dim=0).cpu()).sum(dim=-1))
                else:
                    total += normal(values.sum(dim=1).cpu()[units.rows[name]].sum(dim=1))
            found = smoothed(self.running.get(consumer), total)
            if found is not None:
                self.running[consumer] = found

    def grow(self, share: float) -> None:
        """Masks this share of the units that are masked in the end, rounded down."""
        for consumer, keep in self.keep.items():
            running = self.running.get(consumer, torch.zeros(len(keep)))
            dropped = dropped_of(self.counts[consumer], share)
            self.keep[consumer] = keep_all_but(torch.where(keep, running, -1), dropped)
        self.apply()

    def apply(self) -> None:
        """Zeroes the rows of masked units in the linears that feed them, and their biases."""
        for consumer, units in self.sets.items():
            gone = ~self.keep[consumer]
            for name, rows in units.rows.items():
                module = self.linears[consumer.removesuffix(units.consumer) + name]
                for tensor in (read(module), module._parameters.get("bias")):
                    if tensor is not None:
                        tensor.detach()[rows[gone].flatten()] = 0

    def state(self) -> dict[str, Tensor]:
        return named(running=self.running, keep=self.keep)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.running, self.keep = part_of(state, "running"), part_of(state, "keep")
        self.apply()

    def kept(self) -> dict[str, Tensor]:
        """The units that stay, int64 ascending, by full name of the consumer."""
        return {name: keep.nonzero().flatten() for name, keep in self.keep.items()}


class WeightMasks:
    """Masks of single weights by a pattern. linears: as above. Masked weights stay masked."""

    def __init__(self, linears: Mapping[str, nn.Module], pattern: NM | Share):
        self.linears, self.pattern = linears, pattern
        self.running: dict[str, Tensor] = {}  # importance of every weight [out, in], by full name of the linear
        self.keep: dict[str, Tensor] = {}  # bool [out, in]; all where there is none yet

    def observe(self, importances: Importances) -> None:
        for name in self.linears:
            values = importances(name)
            found = None if values is None else smoothed(self.running.get(name), values)
            if found is not None:
                self.running[name] = found

    def grow(self, share: float) -> None:
        """Masks this share of the weights that the pattern drops; of N:M whole steps from M:M on.

        A linear without importances is masked by magnitude.
        """
        pattern = part_of_pattern(self.pattern, share)
        for name, linear in self.linears.items():
            weight = read(linear).detach()
            scores = self.running[name] if name in self.running else weight.float().abs()
            if name in self.keep:
                scores = torch.where(self.keep[name].to(scores.device), scores, -1)
            self.keep[name] = pattern.keep(scores)
        self.apply()

    def apply(self) -> None:
        for name, keep in self.keep.items():
            weight = read(self.linears[name]).detach()
            weight.masked_fill_(~keep.to(weight.device), 0)

    def state(self) -> dict[str, Tensor]:
        return named(running=self.running, keep=self.keep)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        devices = {name: read(linear).device for name, linear in self.linears.items()}
        self.running = {name: value.to(devices[name]) for name, value in part_of(state, "running").items()}
        self.keep = part_of(state, "keep")
        self.apply()


def part_of_pattern(pattern: NM | Share, share: float) -> NM | Share:
    """The pattern that drops a share of what `pattern` drops, rounded down; of N:M one that it refines."""
    if isinstance(pattern, NM):
        return NM(pattern.group - dropped_of(pattern.group - pattern.kept, share), pattern.group)
    return Share(pattern.drop * share, pattern.per)


def named(**parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": tensor for kind, tensors in parts.items() for name, tensor in tensors.items()}
