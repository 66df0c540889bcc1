"""sds: sparse, dense, sparse (Li et al., COLING 2025, arXiv 2408.10473), one block at a time."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.fitting import fit
from budwood.methods.graft import Graft
from budwood.methods.matched import Matched
from budwood.methods.method import Method, Step, Wrapper, inner_methods, naming
from budwood.methods.option import option
from budwood.methods.refit import Refit
from budwood.methods.structured import Structured
from budwood.methods.validation import number, one_of, whole
from budwood.sparsity.patterns import NM, LowPrunes, Shape, Share, Top
from budwood.sparsity.sds import GENTLE, REGULARISED, Moments, Regrowth, adjust, adjust_freely, regrow
from budwood.sparsity.statistics import Gram

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model

log = logging.getLogger(__name__)

PRESETS = {"gentle": GENTLE, "regularised": REGULARISED}
HELD_OUT = 8  # one window of this many decides, and is not fitted to
DYNAMIC = 40  # steps in which the mask may change
SMALL = 0.1  # of the mean magnitude of the dense weights: regrown weights below count as near zero


@dataclass(frozen=True)
class Sds(Wrapper):
    """Prune, let the dropped weights grow back while the outputs are fitted to the dense ones, prune again, and fit the
    kept weights. The same calibration windows serve all steps.
    """

    regrow: Literal["gentle", "regularised"] | None = option(
        "gentle",
        'how dropped weights grow back: "gentle" (20 plain steps), "regularised" (80 steps with penalties, for methods '
        "that change no weight), or None: no second pruning",
    )
    adjust: Literal["auto", "frozen", "dynamic"] | None = option(
        "auto",
        'fit of the kept weights at the end, with a "frozen" mask or one that is "dynamic", or None; "auto": frozen, '
        "where that lowers the error of the block on held-out windows",
    )
    steps: int = option(150, "of that fit")
    data: Literal["sparse", "dense"] = option(
        "sparse", "inputs that the weights grow back with: those of the pruned or of the dense block"
    )
    rounds: int = option(1, "how often the weights grow back and are pruned again")
    growth: int | None = option(None, "steps in which the weights grow back; None: as regrow says")
    rate: float | None = option(None, "of these steps, as a share of the largest stable one; None: 1")
    l1: float | None = option(None, "penalty on magnitudes while the weights grow back; None: as regrow says")
    l2: float | None = option(None, "penalty on squares while the weights grow back; None: as regrow says")

    def __post_init__(self) -> None:
        super().__post_init__()
        if found := unfit(self.inner):
            raise UsageError(
                f"sds prunes every block twice, which {found} does not allow; give a method that chooses single weights"
            )
        if self.regrow is not None:
            one_of("regrow", self.regrow, PRESETS)
        if self.adjust is not None:
            one_of("adjust", self.adjust, ("auto", "frozen", "dynamic"))
        one_of("data", self.data, ("sparse", "dense"))
        whole("steps", self.steps, 1)
        whole("rounds", self.rounds, 1)
        if self.growth is not None:
            whole("growth", self.growth, 0)
        for name, value, most in (("rate", self.rate, 1.0), ("l1", self.l1, 1e6), ("l2", self.l2, 1e6)):
            if value is not None:
                number(name, value, 0, most)

    @property
    def regrowth(self) -> Regrowth | None:
        """The preset with the options that are given in place of its own."""
        if self.regrow is None:
            return None
        given: dict[str, Any] = {"steps": self.growth, "rate": self.rate, "l1": self.l1, "l2": self.l2}
        return replace(PRESETS[self.regrow], **{name: value for name, value in given.items() if value is not None})

    def check(self, linears: Mapping[str, Shape]) -> None:
        super().check(linears)
        if self.adjust == "dynamic":
            for name, shape in linears.items():
                if not isinstance(self.pattern_of(shape, name), NM | Share | Top | LowPrunes):
                    raise UsageError(
                        f"{name}: the pattern of {self.inner} does not say which weights may take another's place; use "
                        'adjust="frozen"'
                    )

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        names = tuple(f"{model.path}.{index}" for index in range(len(model)))
        return SdsStep(self, self.inner.prepare(model, windows, work), work, names)


def unfit(method: Method) -> Method | None:
    """The first method within that cannot be called twice for one block."""
    if isinstance(method, Structured | Matched | Sds) or (isinstance(method, Graft) and method.steps):
        return method
    return next((found for inner in inner_methods(method) if (found := unfit(inner))), None)


@dataclass(frozen=True)
class SdsStep(Step):
    """inner: prunes the block. work: keeps the errors of every block. blocks: their full names."""

    method: Sds
    inner: Step
    work: "Work"
    blocks: tuple[str, ...]

    def __call__(self, block: "Block") -> None:
        inputs = block.activations
        assert inputs is not None
        count = inputs.shape[0]
        held = max(1, count // HELD_OUT) if count > 1 else 0
        fitted = slice(0, count - held)  # a single window serves for both
        cycle = Cycle(self.method, self.inner, block, fitted, slice(count - max(1, held), count))
        figures = cycle.run()
        log.info("%s: %s", block.name, figures)
        self.work.record(f"sds-{block.name}", lambda: figures)

    def finish(self, run: "Run") -> None:
        self.inner.finish(run)
        run.note(summary(self.method, [self.work.record(f"sds-{name}", dict) for name in self.blocks]))


class Cycle:
    """Sparse, dense, sparse on one block.

    fitted: the windows that weights are fitted to. held: the windows on which errors are measured. The inner method
    uses all windows.
    """

    def __init__(self, method: Sds, inner: Step, block: "Block", fitted: slice, held: slice):
        self.method, self.inner, self.block, self.fitted, self.held = method, inner, block, fitted, held
        self.dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
        self.targets = self.outputs()

    def run(self) -> dict[str, Any]:
        """Changes the block; errors of its outputs on the held-out windows, and figures about masks."""
        block, method = self.block, self.method
        figures: dict[str, Any] = {"errors": {}}
        errors = figures["errors"]
        dense_grams = self.grams()
        self.inner(block)
        first = self.weights()
        errors["inner"] = self.error()
        self.refit(dense_grams)
        errors["refit"] = self.error()
        self.put(first)
        figures["few"] = sorted(name for name, gram in dense_grams.items() if self.too_few(name, gram))
        if method.data == "sparse":
            dense_grams.clear()  # they are large
        if method.regrowth is not None:
            for _ in range(method.rounds):
                grams = self.grams() if method.data == "sparse" else dense_grams
                figures["small"] = self.grow(method.regrowth, grams, figures["few"])
            second = self.weights()
            figures["overlap"] = overlap(first, second)
            errors["pruned again"] = self.error()
        before = self.weights()
        if method.adjust is not None:
            self.adjust(self.grams(), figures["few"])
            errors["adjusted"] = self.error()
            figures["kept"] = method.adjust != "auto" or errors["adjusted"] < self.latest(errors)
            if not figures["kept"]:
                self.put(before)
        errors["sds"] = errors["adjusted"] if figures.get("kept") else self.latest(errors)
        return figures

    @staticmethod
    def latest(errors: Mapping[str, float]) -> float:
        """Before the adjustment."""
        return errors.get("pruned again", errors["inner"])

    def grams(self) -> dict[str, Gram]:
        """Second moments of the fitted windows, with the present weights."""
        with self.block.limited_to(self.fitted):
            found = self.block.collect(Gram)
        for name, gram in found.items():
            gram.check(self.block.linears[name].name)
        return found

    def too_few(self, name: str, gram: Gram) -> bool:
        """Whether an expert got too few tokens to fit it: fewer than all, and fewer than twice its inputs."""
        assert self.block.activations is not None
        tokens = (self.fitted.stop - self.fitted.start) * self.block.activations.shape[1]
        return gram.count < tokens and gram.count < 2 * self.block.linears[name].shape[1]

    def weights(self) -> dict[str, Tensor]:
        return {name: linear.weight.clone() for name, linear in self.block.linears.items()}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.block.linears[name].weight = weight

    def outputs(self) -> list[Tensor]:
        """Of the block for the held-out windows, batch by batch."""
        block = self.block
        with block.limited_to(self.held), torch.no_grad():
            assert block.activations is not None
            return [block.run(batch).cpu() for batch in block.activations.indices()]

    def error(self) -> float:
        """The squared error of these outputs over the square of the dense block's."""
        pairs = list(zip(self.outputs(), self.targets, strict=True))
        lost = sum(float((found.double() - target.double()).square().sum()) for found, target in pairs)
        whole = sum(float(target.double().square().sum()) for _, target in pairs)
        return lost / whole if whole else 0.0

    def refit(self, grams: Mapping[str, Gram]) -> None:
        """The control: what `refit` makes of the first mask, with its default options."""
        plain = Refit(self.method.inner)
        for name, linear in self.block.linears.items():
            if grams[name].count:
                moments, start = grams[name].matrix().float(), linear.weight
                options = (plain.damp, plain.iterations, plain.tolerance)
                fit(linear, start, start != 0, self.dense[name], moments, *options)

    def grow(self, how: Regrowth, grams: Mapping[str, Gram], few: list[str]) -> float:
        """Lets the dropped weights grow back and prunes again; the share of regrown weights near zero."""
        left = {name: (self.block.linears[name].weight.clone(), self.block.linears[name].recovered) for name in few}
        near, count = 0, 0
        for name, moments in moments_of(grams, few):
            linear, dense = self.block.linears[name], self.dense[name]
            grown = regrow(linear.weight, dense, moments, how)
            near += int((grown.abs() < SMALL * dense.abs().mean().to(grown)).sum())
            count += grown.numel()
            linear.weight = grown
        self.inner(self.block)
        for name, (weight, recovered) in left.items():
            self.block.linears[name].weight, self.block.linears[name].recovered = weight, recovered
        return near / max(1, count)

    def adjust(self, grams: Mapping[str, Gram], few: list[str]) -> None:
        """Fits the kept weights to the outputs of the dense ones."""
        steps = self.method.steps
        for name, moments in moments_of(grams, few):
            linear, weight = self.block.linears[name], self.block.linears[name].weight
            free = min(DYNAMIC, steps) if self.method.adjust == "dynamic" else 0
            if free:
                pattern = self.method.pattern_of(linear.shape, linear.name)
                assert pattern is not None
                with naming(linear.name):
                    weight = adjust_freely(weight, pattern.keep, self.dense[name], moments, free)
            if steps > free:
                weight = adjust(weight, weight != 0, self.dense[name], moments, steps - free)
            linear.weight = weight


def moments_of(grams: Mapping[str, Gram], few: list[str]) -> Iterator[tuple[str, Moments]]:
    """By name, without those of `few`. Linears that share an input, which are consecutive, share the object."""
    latest: tuple[Gram, Moments] | None = None
    for name, gram in grams.items():
        if name in few:
            continue
        if latest is None or latest[0] is not gram:
            latest = gram, Moments.of(gram.matrix())
        yield name, latest[1]


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The share of the second mask's weights that the first one kept as well."""
    both = sum(int(((first[name] != 0) & (weight != 0)).sum()) for name, weight in second.items())
    return both / max(1, sum(int((weight != 0).sum()) for weight in second.values()))


def summary(method: Sds, blocks: list[dict[str, Any]]) -> str | None:
    """Errors on held-out windows, averaged over the blocks, with `refit` as the control; None where none is known."""
    known = [figures for figures in blocks if figures]
    if not known:
        return None
    mean = {name: fmean(each["errors"][name] for each in known) for name in ("inner", "refit", "sds")}
    wins = sum(each["errors"]["sds"] < each["errors"]["refit"] for each in known)
    parts = [
        f"relative squared error of block outputs on held-out windows, mean of {len(known)} blocks: "
        f"{mean['inner']:.3g} after {method.inner}, {mean['refit']:.3g} after refit({method.inner}), "
        f"{mean['sds']:.3g} after {method} (below refit in {wins})"
    ]
    if method.adjust == "auto":
        parts.append(f"the adjustment was kept in {sum(each['kept'] for each in known)}")
    if method.regrow is not None:
        parts.append(
            f"{fmean(each['overlap'] for each in known):.1%} of the second mask is in the first, "
            f"{fmean(each['small'] for each in known):.1%} of the regrown weights were near zero"
        )
    if few := sum(len(each["few"]) for each in known):
        parts.append(f"{few} matrices of experts got too few tokens and were left as {method.inner} made them")
    return "; ".join(parts)
