"""LoRAPrune: units and single weights, counts, what is computed before and after the cut, resumed runs."""

import json
import shutil

import pytest
import torch
from families import save_model, token_ids

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.work import Work
from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.planning import plan
from budwood.pruning import prune
from budwood.sparsity.patterns import NM, Share
from budwood.stream.model import Model
from budwood.training import gradual as training_gradual
from budwood.training.growing_masks import UnitMasks, WeightMasks, part_of_pattern
from budwood.training.trainable import merge

OPTIONS = {"seq_length": 24, "compute_dtype": "float32", "sparse_products": "off", "attention": "fused"}
IDS = token_ids(8) % 90 + 3
TEXT = token_ids(1, 30) % 90 + 3
UNITS = "loraprune(drop=0.5, steps=6, batch=2, every=2, rank=2, rate=0.01)"
WEIGHTS = 'loraprune(pattern="2:4", steps=6, batch=2, every=2, rank=2, rate=0.01)'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "opt"):
        save_model(family, root / family)
    for name, family, expression in (
        ("units", "llama", UNITS),
        ("weights", "llama", WEIGHTS),
        ("opt units", "opt", UNITS),
    ):
        prune(root / family, root / name, expression, IDS, **OPTIONS)
    return root


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("name", ["units", "opt units"])
def test_units_leave_and_the_folder_computes(folders, name):
    family = "opt" if name.startswith("opt") else "llama"
    report, method = report_of(folders / name), parse_method(UNITS)
    structure = open_source(folders / family).structure()
    expected = {full: list(held.shape) for full, held in method.forecast(structure).items()}
    assert {full: matrix["shape"] for full, matrix in report["linears"].items()} == expected
    planned = plan(folders / family, UNITS)["bytes_after"]  # biases that leave are not planned
    assert planned == pytest.approx(report["totals"]["bytes"], rel=1e-12 if family == "llama" else 0.02)
    sizes = [shape[0] * shape[1] for shape in structure.shapes.values()]
    left = sum(rows * columns for rows, columns in expected.values())
    assert left / sum(sizes) == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        assert load(folders / name)(TEXT, use_cache=False).logits.isfinite().all()
    section = report["training"][0]
    assert section["steps"] == len(section["loss"]) == 6
    assert section["trained"] == sum(2 * sum(shape) for shape in structure.shapes.values())


def test_single_weights_keep_to_the_pattern(folders):
    report = report_of(folders / "weights")
    assert report["totals"]["density"] == 0.5
    assert {matrix["format"] for matrix in report["linears"].values()} == {"two_four"}
    assert report["training"][0]["pattern"] == "2:4"
    with torch.no_grad():
        assert load(folders / "weights")(TEXT, use_cache=False).logits.isfinite().all()


def test_the_cut_model_is_the_trained_one_with_its_masks(folders, tmp_path):
    """Merged weights equal the low-rank terms beside the masked ones, and the sliced model equals the masked one."""
    method, model = parse_method(UNITS), Model(open_source(folders / "llama"))
    masks = method.masks(model, IDS)
    _, values = training_gradual.prune_while_training(
        model, IDS[:, :24], masks, method.gradual, Work(tmp_path / "work"), "steps"
    )
    dense = load(folders / "llama", dtype=torch.float32)
    module = dense.model
    for consumer, units in masks.sets.items():
        prefix, gone = consumer.removesuffix(units.consumer), ~masks.keep[consumer]
        for name, rows in units.rows.items():
            dense.get_submodule(prefix + name).weight.detach()[rows[gone].flatten()] = 0
    with torch.no_grad():
        for name in model.linears:
            weight = module.get_submodule(name.removeprefix("model.")).weight
            weight.copy_(merge(weight, name, method.gradual.adapter, values))
        expected = dense(TEXT, use_cache=False).logits
        found = load(folders / "units")(TEXT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_falls(folders, tmp_path):
    """On windows that are repeated, with few units masked."""
    expression = "loraprune(drop=0.1, steps=16, batch=4, every=5, rank=4, rate=0.05)"
    losses = prune(folders / "llama", tmp_path / "out", expression, IDS[:4], **OPTIONS)["training"][0]["loss"]
    assert min(losses[-3:]) < 0.98 * losses[0]


@pytest.mark.parametrize(("name", "expression"), [("units", UNITS), ("weights", WEIGHTS)])
def test_a_killed_training_continues_to_the_same_bytes(folders, tmp_path, monkeypatch, name, expression):
    class Killed(Exception):
        pass

    original = training_gradual.slope

    def killed(model, windows, recovery, many, index):
        if index == 5:
            raise Killed
        return original(model, windows, recovery, many, index)

    real = training_gradual.Checkpoints
    monkeypatch.setattr(training_gradual, "Checkpoints", lambda work, key, every, beside: real(work, key, 2, beside))
    with monkeypatch.context() as patch:
        patch.setattr(training_gradual, "slope", killed)
        with pytest.raises(Killed):
            prune(folders / "llama", tmp_path / "out", expression, IDS, **OPTIONS)
    steps = []
    patched = lambda *args: (steps.append(args[-1]), original(*args))[1]
    monkeypatch.setattr(training_gradual, "slope", patched)
    prune(folders / "llama", tmp_path / "out", expression, IDS, **OPTIONS)
    assert steps == [4, 5]
    assert list(shards(tmp_path / "out").values()) == list(shards(folders / name).values())


def test_a_killed_stream_does_not_train_again(folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "units", tmp_path / "cut")
    for file in [*sorted((tmp_path / "cut").glob("*.safetensors"))[2:], tmp_path / "cut/config.json"]:
        file.unlink()
    (tmp_path / "cut/report.json").unlink()
    prune(folders / "llama", tmp_path / "cut", UNITS, IDS, **OPTIONS)
    assert shards(tmp_path / "cut") == shards(folders / "units")


@pytest.mark.parametrize(("blocks", "pruned"), [(4, range(3)), (10, range(1, 9)), (32, range(3, 31)), (1, range(1))])
def test_published_counts_and_blocks(blocks, pruned):
    """Exempt blocks are those of the published program (fixture `freeze`); 15 of 32 heads are masked at 50 %."""
    method = parse_method("loraprune(drop=0.5, steps=100, published=True)")
    assert method.blocks_of(blocks) == pruned
    assert int(32 * 0.5 * method.gradual.last_share()) == 15
    assert parse_method("loraprune(steps=100)").gradual.last_share() == 1


def test_published_masks_end_as_the_forecast_says(folders, tmp_path):
    expression = "loraprune(drop=0.5, steps=10, batch=1, every=1, rank=2, published=True)"
    report = prune(folders / "llama", tmp_path / "out", expression, IDS, **OPTIONS)
    forecast = parse_method(expression).forecast(ModelStructure(open_source(folders / "llama").config))
    assert {name: matrix["shape"] for name, matrix in report["linears"].items()} == {
        name: list(held.shape) for name, held in forecast.items()
    }
    assert report["linears"]["model.layers.3.mlp.up_proj"]["shape"] == [64, 32]
    assert report["linears"]["model.layers.0.mlp.up_proj"]["shape"][0] == 64 - int(64 * 0.5 * (1 - (1 / 8) ** 3))


def test_masks_grow_and_nothing_comes_back():
    linears, random = {"a": torch.nn.Linear(8, 6, bias=False)}, torch.Generator().manual_seed(0)
    for masks in (WeightMasks(linears, Share(0.5)), WeightMasks(linears, NM(2, 4))):
        kept = torch.ones(6, 8, dtype=torch.bool)
        with torch.no_grad():
            linears["a"].weight.copy_(torch.randn(6, 8, generator=random) + 0.01)
        for share in (0.3, 0.5, 0.8, 1.0):
            masks.observe(lambda name: torch.rand(6, 8, generator=random))
            masks.grow(share)
            assert not (masks.keep["a"] & ~kept).any()
            kept = masks.keep["a"]
            assert torch.equal(linears["a"].weight != 0, kept)
        assert kept.float().mean() == 0.5
    assert part_of_pattern(NM(2, 4), 0.5) == NM(3, 4)
    assert part_of_pattern(NM(2, 4), 0.49) == NM(4, 4)
    assert part_of_pattern(Share(0.5), 0.5) == Share(0.25)


def test_a_state_that_is_loaded_masks_the_same():
    linears = {"a": torch.nn.Linear(8, 6, bias=False), "b": torch.nn.Linear(8, 6, bias=False)}
    first = WeightMasks({"a": linears["a"]}, NM(2, 4))
    first.observe(lambda name: torch.rand(6, 8))
    first.grow(1.0)
    second = WeightMasks({"a": linears["b"]}, NM(2, 4))
    second.load_state(first.state())
    assert torch.equal(linears["b"].weight != 0, first.keep["a"])
    assert torch.equal(second.running["a"], first.running["a"])
    assert UnitMasks({}, {}, {}).state() == {}


def test_refusals(folders):
    for expression in (
        'loraprune(pattern="2:4", layers="0:2")',
        'loraprune(pattern="2:4", published=True)',
        "loraprune(drop=1.5)",
        "loraprune(every=0)",
        'loraprune(layers="a")',
    ):
        with pytest.raises(UsageError):
            parse_method(expression)
    structure = open_source(folders / "llama").structure()
    with pytest.raises(UsageError, match="layers"):
        parse_method('loraprune(drop=0.9, layers="0:2")').check_structure(structure)
    with pytest.raises(UsageError, match="names none"):
        parse_method('loraprune(layers="7:9")').check_structure(structure)
