"""The configuration of a written folder: the source's own, with the counts that pruning has changed.

Where one describes every tensor, the folder is an ordinary model of its class, and no plug-in is needed to load it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

import torch
from transformers import CONFIG_MAPPING

from budwood.checkpoints.trial import Json, Shape, Trial, differences, linear_biases, quiet, scaled
from budwood.models.experts import FUSED, LINEAR

# Classes of transformers with a size of heads of its own and a switch for every bias. One of them is taken where the
# source's class has no such field and both compute the same, which is tried.
GENERAL = ("seed_oss",)


@dataclass(frozen=True)
class Description:
    """config: the content of config.json, without dtype and packing. shapes: of tensors that it does not give.

    zeros: shapes of biases that its class demands and the written tensors lack, by full name.
    """

    config: Json
    shapes: dict[str, list[int]] = field(default_factory=dict)
    zeros: dict[str, Shape] = field(default_factory=dict)


def describe(source: Trial, written: Mapping[str, Sequence[int]], known: Mapping[str, Shape]) -> Description:
    """The configuration of a model whose tensors have other shapes than that of `source` gives, or more tensors.

    written: shapes of those tensors by full name. known: the shapes of the tensors of the source. Fields are changed
    only where that gives some of the tensors their shapes and takes them from none, until all are given; else the
    configuration is the source's, with `written` as the shapes that it does not give.
    """
    unexplained = Description(source.content, {name: list(shape) for name, shape in written.items()})
    if not written:
        return Description(source.content)
    target = _with_fused(known, source.shapes, written) | {name: tuple(shape) for name, shape in written.items()}
    if any(_is_apart(name, known) for name in written) or not _is_uniform(known, target):
        return unexplained  # experts or blocks of different shapes
    with quiet():
        for start in _starts(source):
            found = _search(start, target)
            if found is not None:
                zeros = {name: found.shapes[name] for name in sorted(found.shapes.keys() - target.keys())}
                return Description(found.content, zeros=zeros)
    return unexplained


def _is_uniform(known: Mapping[str, Shape], target: Mapping[str, Shape]) -> bool:
    """Whether tensors that differ by the number of their block alone, and had one shape, have one shape again.

    Configurations give blocks different sizes only where they did before.
    """
    shapes: dict[tuple[str, Shape | None], set[Shape]] = {}
    for name, shape in target.items():
        role = ".".join("*" if part.isdigit() else part for part in name.split("."))
        shapes.setdefault((role, known.get(name)), set()).add(shape)
    return all(len(found) == 1 for found in shapes.values())


def _with_fused(
    known: Mapping[str, Shape], described: Mapping[str, Shape], written: Mapping[str, Sequence[int]]
) -> dict[str, Shape]:
    """The shapes `known`, with experts that were apart and are written fused under the names of the class."""
    paths = {name.rpartition(".")[0] for name in written if FUSED.fullmatch(name)}
    parts = {name for path in paths for name in known if LINEAR.fullmatch(name.removeprefix(f"{path}."))}
    fused = {name: shape for name, shape in described.items() if name.rpartition(".")[0] in paths}
    return {name: shape for name, shape in known.items() if name not in parts} | fused


def _is_apart(name: str, known: Mapping[str, Shape]) -> bool:
    """Whether a tensor is one expert's, where the class holds all experts in one."""
    path = name.rsplit(".", 3)[0]
    return any(FUSED.fullmatch(other) and other.rpartition(".")[0] == path for other in known) and name not in known


def _starts(source: Trial) -> Iterator[Trial]:
    """Configurations of the same model: as it is, with the size of heads in its own field, in a general class."""
    yield source
    modules = [] if source.model is None else source.model.modules()
    size = next((module.head_dim for module in modules if type(getattr(module, "head_dim", None)) is int), None)
    explicit = source if size is None else source.changed(head_dim=size)
    if explicit.shapes == source.shapes and explicit.content != source.content:
        yield explicit
    for name in GENERAL:
        yield from general(explicit, name)


def _search(start: Trial, target: Mapping[str, Shape]) -> Trial | None:
    """A configuration that gives all of `target`, and beyond it only biases of linears; None where none is found."""
    current, wrong = start, _wrong(start, target)
    idle: set[str] = set()
    while wrong:
        step = _step(current, wrong, target, idle)
        if step is None:
            return None
        current, wrong = step, _wrong(step, target)
    for key in _switches(current, True):  # not more biases than needed
        fewer = current.changed(**{key: False})
        if not _wrong(fewer, target) and len(fewer.shapes) < len(current.shapes):
            current = fewer
    return current


def _step(current: Trial, wrong: set[tuple[str, int]], target: Mapping[str, Shape], idle: set[str]) -> Trial | None:
    """A changed field, or two that are refused alone, which corrects some shapes and spoils none.

    Heads of half the size have the shapes of half as many heads; tables and constants tell them apart. idle: fields
    that change no shape, which are found here and not tried again.
    """
    refused: list[Json] = []
    for change in _changes(current, wrong, target):
        if change.keys() <= idle:
            continue
        trial = current.changed(**change)
        if trial.model is None:
            refused.append(change)
        elif trial.shapes == current.shapes:
            idle.update(change)
        elif _wrong(trial, target) < wrong and trial.computes_like(current):
            return trial
    trials = (current.changed(**one, **other) for one, other in combinations(refused, 2) if one.keys() != other.keys())
    fitting = (trial for trial in trials if trial.shapes and _wrong(trial, target) < wrong)
    return next((trial for trial in fitting if trial.computes_like(current)), None)


def _changes(current: Trial, wrong: set[tuple[str, int]], target: Mapping[str, Shape]) -> Iterator[Json]:
    """Fields that may explain what is wrong, each with another value."""
    sizes = sorted(
        {(current.shapes[name][d], target[name][d]) for name, d in wrong if d >= 0}  # as they are, as they should be
    )
    for key, value in current.whole_numbers().items():
        found = {new for size in sizes if (new := scaled(value, *size)) is not None}
        yield from ({key: new} for new in sorted(found - {value}))
    news = sorted({new for _, new in sizes})
    for key in (key for key, value in current.fields().items() if value is None):  # a size by default from others
        yield from ({key: new} for new in news)
    if any(d < 0 for _, d in wrong):
        yield from ({key: True} for key in _switches(current, False))


def _switches(trial: Trial, state: bool) -> list[str]:
    return [key for key, value in trial.fields().items() if value is state]


def _wrong(trial: Trial, target: Mapping[str, Shape]) -> set[tuple[str, int]]:
    """See `differences`; a bias of a linear that the target lacks is none, as it can be zero."""
    extra = set() if trial.model is None else linear_biases(trial.model, trial.shapes.keys() - target.keys())
    return {(name, d) for name, d in differences(trial.shapes, target) if name not in extra}


def general(source: Trial, model_type: str) -> Iterator[Trial]:
    """The same model in a general class, where a small model of both gives equal logits; nothing where not."""
    cls = CONFIG_MAPPING[model_type]
    fields, known = source.fields(), cls().to_dict()
    if any(key.startswith("num_") or key.endswith("_size") for key in known.keys() - fields.keys()):
        return  # the source does not give these sizes by these names
    content = {**known, **{key: fields[key] for key in known if key in fields}, "model_type": model_type}
    content |= {key: 0.0 for key in content if key.endswith("dropout")}
    switches = [key for key, value in content.items() if "bias" in key and isinstance(value, bool)]
    for states in product([False, True], repeat=len(switches)):
        trial = Trial(cls, {**content, **dict(zip(switches, states, strict=True))})
        if trial.shapes == source.shapes:
            if equal_logits(source, trial):
                named = {"model_type": model_type, "architectures": [type(trial.model).__name__]}
                yield Trial(cls, {**trial.config.to_diff_dict(), **named})
            return


def equal_logits(one: Trial, other: Trial) -> bool:
    """Whether small random models of two configurations have the same logits bit for bit."""
    ids, logits = torch.arange(3, 27)[None], []
    for trial in (_small(one, 4), _small(other, 4)):
        if trial.model is None:
            return False
        random = torch.Generator().manual_seed(0)
        state = {name: 0.2 * torch.randn(shape, generator=random) for name, shape in sorted(trial.shapes.items())}
        trial.model.load_state_dict(state, assign=True)
        with torch.no_grad():
            logits.append(trial.model(input_ids=ids, use_cache=False).logits)
    return torch.equal(*logits)


def _small(trial: Trial, layers: int) -> Trial:
    """The same computation with few weights. A sliding window becomes shorter than the text it is tried on."""
    fields = trial.fields()
    types = fields.get("layer_types")
    groups = max(1, int(fields.get("num_attention_heads") or 1) // int(fields.get("num_key_value_heads") or 1))
    sizes: Json = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2 * groups, "num_key_value_heads": 2}
    if types:
        kinds = list(dict.fromkeys(types))
        sizes |= {"layer_types": (kinds * layers)[:layers]}
    if fields.get("sliding_window"):
        sizes |= {"sliding_window": 4}
    return trial.changed(**{key: size for key, size in sizes.items() if key in fields}, pad_token_id=None)
