"""What the channels of all units score, block by block, and the units that stay by these scores."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.methods.method import Method
from budwood.methods.structured import Slices
from budwood.sparsity.fluctuation import Metric, Moments, channel_scores, column_norms, unit_scores
from budwood.sparsity.unit_budget import Pool, Rules, kept_counts, kept_units
from budwood.sparsity.units import Units

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear

log = logging.getLogger(__name__)

FEW = 32  # tokens; a variance over fewer is off by more than a quarter

Findings = dict[str, dict[str, Tensor]]  # of one block: by consumer, then by name, "channels" [units, width] among them
Sets = Mapping[str, Mapping[str, Units]]  # by full name of the block, in the order of the model, then by consumer


def survey(
    method: Method,
    structure: "ModelStructure",
    work: "Work",
    blocks: Callable[[], Iterator["Block"]],
    examine: Callable[["Block"], Findings],
) -> dict[str, Findings]:
    """What `examine` finds in every block, by full name; in `work` from the moment a block is done.

    blocks: the dense model's. A survey that was interrupted examines only the blocks that are missing.
    """
    prefix = f"survey-{hashlib.sha256(str(method).encode()).hexdigest()[:8]}"
    names = list(structure.units)
    if not all(work.file(f"{prefix}-{index}.safetensors").is_file() for index in range(len(names))):
        for block in blocks():
            work.tensors(f"{prefix}-{block.index}", partial(_examined, examine, block))
    return {name: _nested(work.tensors(f"{prefix}-{index}")) for index, name in enumerate(names)}


def _examined(examine: Callable[["Block"], Findings], block: "Block") -> dict[str, Tensor]:
    findings = examine(block)
    return {f"{consumer}:{name}": tensor for consumer, about in findings.items() for name, tensor in about.items()}


def _nested(tensors: Mapping[str, Tensor]) -> Findings:
    findings: Findings = {}
    for key, tensor in tensors.items():
        consumer, _, name = key.rpartition(":")
        findings.setdefault(consumer, {})[name] = tensor
    return findings


def found_units(structure: "ModelStructure", findings: Mapping[str, Findings]) -> dict[str, dict[str, Units]]:
    """The units of a model that a survey found to be right, by full name of the block and by consumer."""
    return {
        block: {consumer: units for consumer, units in of_block.items() if consumer in findings[block]}
        for block, of_block in structure.units.items()
    }


def fluctuations(
    block: "Block",
    metric: Metric,
    collect: Callable[[type[Moments], Collection[str]], Mapping[str, Moments]],
    statistic: type[Moments] = Moments,
) -> Findings:
    """Of every set of units what its channels score, and the mean of its inputs, in one pass.

    collect: `block.collect`, or `block.observe` in a survey. An expert that few tokens reached is scored by the squared
    norms of its columns, and has no mean.
    """
    units = block.units  # before the pass, which may replace the inputs
    moments = collect(statistic, units)
    findings: Findings = {}
    for name, each in units.items():
        linear = block.linears[name]
        if enough(linear, moments[name]):
            channels = channel_scores(linear.weight, moments[name], metric)
            findings[name] = {"mean": moments[name].mean.cpu()}
        else:
            channels = column_norms(linear.weight).square()
            findings[name] = {}
        findings[name]["channels"] = each.fold(channels.cpu()).contiguous()
    return findings


def enough(linear: "Linear", moments: Moments) -> bool:
    """Whether enough tokens reached the linear to know variance and mean of its inputs; warns where they did not.

    Raises RunError where its inputs held NaN or infinite values.
    """
    moments.check(linear.name)
    if moments.count < FEW:
        log.warning(
            "%s: %s reached it, too few to know the mean of its inputs",
            linear.name,
            f"only {moments.count} calibration tokens" if moments.count else "no calibration token",
        )
    return moments.count >= FEW


def choose(
    units: Sets,
    findings: Mapping[str, Findings],
    drop: float,
    rules: Rules,
    attention_power: float = 1,
) -> dict[str, dict[str, Tensor]]:
    """The units that stay, so that the share `drop` of the weights of all `units` goes.

    Scores are compared between layers only by adaptive structures, so only these standardise them. Returns sorted
    indices by block and consumer.
    """
    pools, places = [], []
    for layer, (block, of_block) in enumerate(units.items()):
        for consumer, each in of_block.items():
            power = attention_power if each.kind == "attention" else 1
            scores = unit_scores(findings[block][consumer]["channels"], power, rules.structure.startswith("al"))
            if not scores.isfinite().all():
                raise RunError(f"{block}.{consumer}: its units have scores that are NaN or infinite; check its weights")
            pools.append(Pool(layer, each.kind, each.cost, scores))
            places.append((block, consumer))
    kept: dict[str, dict[str, Tensor]] = {block: {} for block in units}
    for (block, consumer), stays in zip(places, kept_units(pools, drop, rules), strict=True):
        kept[block][consumer] = stays
    return kept


def expected_counts(units: Sets, drop: float, rules: Rules) -> dict[str, dict[str, int]]:
    """How many units stay of every set: exactly in uniform structures; in others their total, spread evenly.

    Raises UsageError where the rules cannot be followed.
    """
    places = [(block, consumer) for block, sets in units.items() for consumer in sets]
    pools = [
        Pool(layer, each.kind, each.cost, torch.arange(len(each), dtype=torch.float64))
        for layer, sets in enumerate(units.values())
        for each in sets.values()
    ]
    counts = kept_counts(pools, drop, rules)
    if rules.structure.startswith("al"):
        counts = kept_counts(pools, drop, replace(rules, structure="ul-um", remove_groups=None, search="nearest"))
    found: dict[str, dict[str, int]] = {block: {} for block in units}
    for (block, consumer), count in zip(places, counts, strict=True):
        found[block][consumer] = count
    return found


@dataclass(frozen=True)
class InOrder(Slices):
    """Chooses the units of one block after the other, on the inputs that the blocks before it give once cut."""

    kept: MutableMapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # filled while blocks pass
    examine: Callable[["Block"], Findings] = field(kw_only=True)
    drop: float = field(kw_only=True)
    rules: Rules = field(kw_only=True)

    def __call__(self, block: "Block") -> None:
        sets, findings = {block.name: block.units}, {block.name: self.examine(block)}
        self.kept.update(choose(sets, findings, self.drop, self.rules))
        super().__call__(block)
