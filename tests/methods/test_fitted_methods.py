"""refit, alps and graft on a block made of tensors: masks, budgets, passes, refusals."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from families import save_model
from safetensors.torch import load_file, save_file
from stand_in import random_block

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import open_source
from budwood.errors import UsageError
from budwood.formats import choose
from budwood.inspection import inspect
from budwood.methods import parse_method
from budwood.methods.allocation import survey
from budwood.pruning import prune
from budwood.sparsity.statistics import Gram
from budwood.stream.cross_moments import cross_moments
from budwood.stream.dense_stream import DenseStream
from budwood.stream.model import Model

SHAPES = SimpleNamespace(shapes={"a": (64, 32), "b": (32, 64)})  # what a forecast reads of a model
INNER = ["wrp(alpha=0.5)", 'wanda("2:4")', 'wanda("50%")', 'magnitude("2:4")', 'sparsegpt("2:4")', "wrp(block=8, k=1)"]


def errors(block, weights, dense):
    """Squared output error of every linear for the weights of one block, inputs of another."""
    total = {}
    for name in block.linears:
        lost = (weights.linears[name].weight - dense.linears[name].weight).double()
        total[name] = sum(float((batch.double() @ lost.T).square().sum()) for batch in block.inputs[name])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", INNER)
def test_refit_leaves_the_mask_and_lowers_every_error(inner, dtype):
    dense, plain, fitted = (random_block(dtype) for _ in range(3))
    parse_method(inner)(plain)
    parse_method(f"refit({inner})")(fitted)
    assert fitted.passes == 1
    before, after = errors(dense, plain, dense), errors(dense, fitted, dense)
    for name, linear in fitted.linears.items():
        assert torch.equal(linear.weight != 0, plain.linears[name].weight != 0), name
        assert linear.recovered == plain.linears[name].recovered
        assert after[name] < before[name]


def test_refit_has_the_forecast_of_its_inner_method():
    for inner in INNER:
        method, alone = parse_method(f"refit({inner})"), parse_method(inner)
        assert method.forecast(SHAPES) == alone.forecast(SHAPES)
        assert method.pattern_of((64, 32), "a") == alone.pattern_of((64, 32), "a")
    with pytest.raises(UsageError, match="divide by 4"):
        parse_method('refit(wanda("2:4"))').check({"fc": (8, 6)})


@pytest.mark.parametrize("bits", [9.0, 9.3, 9.75, 12.0, 16.0])
@pytest.mark.parametrize("pattern", ["2:4", "free"])
def test_the_stored_bytes_are_the_most_that_the_bits_allow(bits, pattern):
    method = parse_method(f'graft(bits={bits}, pattern="{pattern}", allocate="uniform", iterations=2, rounds=4)')
    block = random_block(torch.bfloat16)
    method(block)
    for linear in block.linears.values():
        stored = sum(part.nbytes for part in choose(linear.stored)[1].values())
        budget = bits * linear.stored.numel() / 8
        assert budget - 2 < stored <= budget
        forecast = method.forecast_matrix(linear.shape, linear.name)
        assert forecast.nonzeros == torch.count_nonzero(linear.stored)
        assert forecast.recovered == linear.recovered
        if pattern == "2:4":
            assert int((linear.stored != 0).unflatten(1, (-1, 4)).sum(dim=-1).min()) >= 2


def test_each_ingredient_lowers_the_error():
    dense = random_block()

    def total(options):
        block = random_block()
        parse_method(f'graft(bits=9.75, allocate="uniform", {options})')(block)
        return sum(errors(dense, block, dense).values())

    assert total('select="alps"') < total('select="wanda"') < total('select="wanda", fit=False')


def test_alps_with_extras_counts_what_it_recovers():
    block = random_block()
    parse_method('alps("2:4", extra=0.05)')(block)
    for linear in block.linears.values():
        size = linear.stored.numel()
        assert linear.recovered == int(0.05 * size) == torch.count_nonzero(linear.stored) - size // 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def test_the_target_between_the_pruned_and_the_dense_inputs(llama, tmp_path):
    """Both are the same in the first block, and differ in later ones."""
    text = ["".join(chr(97 + (i * i + i // 7) % 26) for i in range(600))]
    options = {
        "num_samples": 4,
        "seq_length": 24,
        "compute_dtype": "float32",
        "sparse_products": "off",
        "attention": "fused",
    }
    weights = []
    for target in (0, 1):
        folder = tmp_path / str(target)
        prune(llama, folder, f'refit(wanda("50%"), target={target})', text, **options)
        model = load(folder)
        weights.append([layer.mlp.down_proj.weight.detach() for layer in model.model.layers])
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-3)
    assert not torch.allclose(weights[0][1], weights[1][1], atol=1e-2)
    assert torch.equal(weights[0][0] != 0, weights[1][0] != 0)


def test_cross_moments_of_the_same_model_are_second_moments(llama):
    model = Model(open_source(llama))
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(0))
    dense = DenseStream(model, ids, batch=2)
    for block in model.blocks(ids, batch=2):
        crosses, grams = cross_moments(dense.at(block.index), block), block.collect(Gram)
        for name in block.linears:
            assert torch.allclose(crosses[name], grams[name].matrix(), rtol=1e-5, atol=1e-5)
        assert crosses["self_attn.q_proj"] is crosses["self_attn.k_proj"]


def test_the_survey_spends_the_whole_budget_and_matrices_differ(llama):
    model = Model(open_source(llama))
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(0))
    method = parse_method('graft(pattern="free")')
    shapes = model.structure.shapes
    total = sum(method.count_for(shape) for shape in shapes.values())
    counts = survey(model, ids, method.pattern_for, None, total)
    assert set(counts) == set(shapes)
    assert sum(counts.values()) == total
    assert counts == survey(model, ids, method.pattern_for, None, total)
    assert all(0 <= count <= shapes[name][0] * shapes[name][1] for name, count in counts.items())
    assert len({count / (shapes[name][0] * shapes[name][1]) for name, count in counts.items()}) > 1


def test_matrices_without_effect_keep_nothing_beyond_the_pattern(llama, tmp_path):
    """With the output projection at 0, the attention of a block has no effect."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = Model(open_source(tmp_path))
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(0))
    method = parse_method("graft(bits=9.75)")
    shapes = model.structure.shapes
    counts = survey(model, ids, method.pattern_for, method.base, sum(map(method.count_for, shapes.values())))
    beyond = {name: count - shapes[name][0] * shapes[name][1] // 2 for name, count in counts.items()}
    assert not any(count for name, count in beyond.items() if "layers.1.self_attn." in name)
    assert sum(beyond.values()) > 0


def test_a_divided_budget_is_kept_and_inspect_shows_it(llama, tmp_path):
    text = ["".join(chr(97 + (i * i + i // 7) % 26) for i in range(600))]
    options = {
        "num_samples": 4,
        "seq_length": 24,
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "sparse_products": "off",
        "attention": "fused",
    }
    report = prune(llama, tmp_path / "out", "graft(bits=9.75)", text, **options)
    assert report["totals"]["bits_per_weight"] <= 9.75
    assert report["totals"]["bits_per_weight"] == pytest.approx(9.75, rel=0.002)
    shown = inspect(tmp_path / "out")
    assert not shown["totals"]["broken"]
    assert len({round(matrix["recovered"], 4) for matrix in shown["linears"].values()}) > 1
    for matrix in shown["linears"].values():
        assert matrix["recovered"] == pytest.approx(matrix["density"] - 0.5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("refit(3)", "refit needs a method such as"),
        ("refit", "refit needs inner"),
        ("refit(wrp(), damp=-1)", "damp must be"),
        ("refit(wrp(), iterations=0)", "iterations must be"),
        ("refit(wrp(), tolerance=2)", "tolerance must be"),
        ("refit(wrp(), target=2)", "target must be"),
        ('alps("50%", extra=0.1)', "extra is kept in addition to N:M"),
        ('alps("2:4", extra=0.6)', "extra must be a number from 0 to 0.5"),
        ('alps("2:5:4")', "neither N:M"),
        ("alps(rounds=0)", "rounds must be"),
        ("graft(bits=17)", "bits must be"),
        ('graft(pattern="4:8")', "pattern must be one of"),
        ('graft(select="best")', "select must be one of"),
        ('graft(allocate="some")', "allocate must be one of"),
        ("graft(fit=1)", "fit must be True or False"),
        ('allocate(wanda("2:4"))', "2:4 is the same in all"),
        ("allocate(wanda(variant=True))", "leave variant, tie and published out"),
        ("allocate(sparsegpt(published=True))", "leave published and mask out"),
        ("allocate(wrp())", "give density"),
        ('allocate(wrp(density=0.02, metric="obs"))', "leave block and metric out"),
        ('allocate(alps("50%"))', "matrices may keep different shares"),
        ("allocate(refit(wrp(density=0.02)))", "keeps a share of each matrix"),
    ],
)
def test_invalid_options_are_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_method(text)


def test_too_few_bits_are_refused_by_layer_name():
    with pytest.raises(UsageError, match=r"fc: 8.5 bits per weight do not hold pattern='2:4', which takes 9 bits"):
        parse_method("graft(bits=8.5)").check({"fc": (64, 32)})
    with pytest.raises(UsageError, match=r"which takes 1 bits at least; give more bits$"):
        parse_method('graft(bits=0.5, pattern="free")').check({"fc": (64, 32)})
    with pytest.raises(UsageError, match="fc: 2:4 needs the inputs to divide by 4"):
        parse_method("graft").check({"fc": (64, 30)})
