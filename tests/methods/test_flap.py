"""FLAP and its baselines on small models: budgets, biases that return means, resuming, and the published program."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from families import save_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.checkpoints.work import Work
from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.pruning import prune
from budwood.sparsity.fluctuation import Moments
from budwood.stream.block import Block
from budwood.stream.model import Model

IDS = token_ids(1, 400) % 90 + 3
WINDOWS = IDS[:, :384].reshape(16, 24)
CALIBRATION = {
    "num_samples": 16,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3_moe")  # grouped queries; Conv1D and biases; biases of q, k, v; experts
REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in found.items():
        save_model(name, folder)
    return found


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def unit_counts(folder):
    """Units of every set, by full name of its consumer, with their cost."""
    return {
        f"{block}.{name}": (len(units), units.cost)
        for block, sets in open_source(folder).structure().units.items()
        for name, units in sets.items()
    }


def weights_in_units(counts):
    return sum(count * cost for count, cost in counts.values())


def kept_by(folder, expression, tmp_path):
    """The units that stay, by consumer, as prepared."""
    method = parse_method(expression)
    step = method.prepare(Model(open_source(folder)), WINDOWS, Work(tmp_path / str(abs(hash(expression)))))
    return {f"{block}.{name}": set(stays.tolist()) for block, sets in step.kept.items() for name, stays in sets.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "expression",
    ["flap(drop=0.3)", 'wanda_sp(drop=0.3, allocation="global")', 'magnitude_sp(drop=0.3, allocation="global")'],
)
def test_a_global_budget_is_met_to_half_a_unit(folders, tmp_path, family, expression):
    prune(folders[family], tmp_path / "out", expression, IDS, **CALIBRATION)
    dense, pruned = unit_counts(folders[family]), unit_counts(tmp_path / "out")
    assert pruned.keys() == dense.keys()
    assert all(0 < pruned[name][0] <= dense[name][0] for name in dense)
    left = sum(pruned[name][0] * cost for name, (_, cost) in dense.items())
    largest = max(cost for _, cost in dense.values())
    assert abs(left - 0.7 * weights_in_units(dense)) <= largest / 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(IDS[:, :24]).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("expression", ['flap(drop=0.3, structure="ul-um")', "wanda_sp(drop=0.3)", "magnitude_sp()"])
def test_a_uniform_budget_gives_every_block_the_same_shape(folders, tmp_path, family, expression):
    prune(folders[family], tmp_path / "out", expression, IDS, **CALIBRATION)
    dense, pruned = unit_counts(folders[family]), unit_counts(tmp_path / "out")
    drop = parse_method(expression).drop
    shapes = set()
    for block in range(4):
        mine = [name for name in dense if f".{block}." in name]
        shapes.add(tuple(pruned[name][0] for name in mine))
        whole = sum(count * cost for count, cost in (dense[name] for name in mine))
        left = sum(pruned[name][0] * dense[name][1] for name in mine)
        assert abs(left - (1 - drop) * whole) <= min(cost for _, cost in (dense[name] for name in mine)) / 2
    assert len(shapes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_forecast_shapes_are_written_shapes(folders, tmp_path, family):
    """Exactly where every block loses the same; where scores decide, the total to one unit."""
    structure = open_source(folders[family]).structure()
    largest = max(cost for _, cost in unit_counts(folders[family]).values())
    for expression in ('flap(drop=0.3, structure="ul-um")', "flap(drop=0.4)", "wanda_sp(drop=0.3)"):
        linears = prune(folders[family], tmp_path / str(len(expression)), expression, IDS, **CALIBRATION)["linears"]
        forecast = parse_method(expression).forecast(structure)
        if "0.4" in expression:
            total = sum(matrix["nonzeros"] for matrix in linears.values())
            assert abs(sum(each.nonzeros for each in forecast.values()) - total) <= largest
        else:
            assert {name: each.shape for name, each in forecast.items()} == {
                name: tuple(matrix["shape"]) for name, matrix in linears.items()
            }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_share_keeps_a_subset(folders, tmp_path, family):
    kept = [kept_by(folders[family], f"flap(drop={drop})", tmp_path) for drop in (0.0, 0.2, 0.5, 0.9)]
    for larger, smaller in itertools.pairwise(kept):
        assert all(smaller[name] <= larger[name] for name in larger)
    assert {name: len(units) for name, units in kept[0].items()} == {
        name: count for name, (count, _) in unit_counts(folders[family]).items()
    }
    assert all(units for units in kept[-1].values())  # no layer without a group or a neuron


def test_nothing_removed_changes_nothing(folders, tmp_path):
    for bias in ("plain", "recentred"):
        prune(folders["gpt2"], tmp_path / bias, f'flap(drop=0.0, bias="{bias}")', IDS, format="dense", **CALIBRATION)
        dense = AutoModelForCausalLM.from_pretrained(folders["gpt2"]).state_dict()
        found = AutoModelForCausalLM.from_pretrained(tmp_path / bias).state_dict()
        assert found.keys() == dense.keys()
        assert all(torch.equal(found[name], dense[name]) for name in dense)


def test_where_biases_are(folders, tmp_path):
    """On the output matrices that lost something, added to the former bias."""
    prune(folders["llama"], tmp_path / "plain", "flap(drop=0.5)", IDS, **CALIBRATION)
    prune(folders["llama"], tmp_path / "none", 'flap(drop=0.5, bias="none")', IDS, **CALIBRATION)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    none = AutoModelForCausalLM.from_pretrained(tmp_path / "none")
    for layer, other in zip(plain.model.layers, none.model.layers, strict=True):
        assert (layer.mlp.down_proj.bias is not None) == (layer.mlp.down_proj.in_features < 64)
        assert (layer.self_attn.o_proj.bias is not None) == (layer.self_attn.o_proj.in_features < 64)
        assert other.mlp.down_proj.bias is other.self_attn.o_proj.bias is layer.mlp.up_proj.bias is None
        assert torch.equal(layer.mlp.down_proj.weight, other.mlp.down_proj.weight)


def output_means(block, names):
    """Mean output of these linears over the calibration tokens, float64 [out]."""
    totals, hooks = {name: [] for name in names}, []
    for name in names:
        hooks.append(
            block.linears[name].module.register_forward_hook(
                lambda module, args, output, name=name: totals[name].append(output.double().flatten(0, -2))
            )
        )
    with torch.no_grad():
        for batch in block.activations.indices():
            block.run(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).mean(0) for name, found in totals.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", ["plain", "recentred"])
def test_biases_keep_the_mean_output(folders, tmp_path, family, bias):
    """Of the first block's attention, whose inputs are the dense model's; recentred: of all attention and MLPs."""
    folder = folders[family]
    # Experts are routed otherwise in the pruned model, and few tokens may reach one: their means are not compared.
    dense = {
        block.name: output_means(block, [name for name in block.units if "experts" not in name])
        for block in Model(open_source(folder)).blocks(WINDOWS)
    }
    model = Model(open_source(folder))
    step = parse_method(f'flap(drop=0.5, bias="{bias}")').prepare(model, WINDOWS, Work(tmp_path))
    compared = 0
    for block in model.blocks(WINDOWS):
        step(block)
        names = [name for name in dense[block.name] if bias == "recentred" or (block.index == 0 and "attn" in name)]
        found = output_means(block, names)
        for name in names:
            torch.testing.assert_close(found[name], dense[block.name][name], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == (1 if bias == "plain" else sum(len(names) for names in dense.values()))


@pytest.mark.parametrize(
    ("family", "expression"),
    [
        ("llama", "flap(drop=0.3)"),
        ("qwen3_moe", 'flap(drop=0.3, bias="recentred")'),
        ("llama", "wanda_sp(drop=0.3)"),
        ("llama", 'wanda_sp(drop=0.3, allocation="global")'),
    ],
)
def test_killed_in_the_survey_and_in_a_block_it_ends_with_the_same_bytes(
    folders, tmp_path, monkeypatch, family, expression
):
    prune(folders[family], tmp_path / "whole", expression, IDS, **CALIBRATION)
    observed, kept = [], []
    observe, keep = Block.observe, Block.keep

    def observing(self, statistic, only=None):
        observed.append(self.index)
        if len(observed) == 3:
            raise KeyboardInterrupt
        return observe(self, statistic, only)

    def keeping(self, chosen):
        kept.append(self.index)
        if len(kept) == 2:
            raise KeyboardInterrupt
        keep(self, chosen)

    monkeypatch.setattr(Block, "observe", observing)
    monkeypatch.setattr(Block, "keep", keeping)
    surveys = expression != "wanda_sp(drop=0.3)"
    for _ in range(1 + surveys):
        with pytest.raises(KeyboardInterrupt):
            prune(folders[family], tmp_path / "cut", expression, IDS, **CALIBRATION)
    prune(folders[family], tmp_path / "cut", expression, IDS, **CALIBRATION)
    assert observed == ([0, 1, 2, 2, 3] if surveys else [])  # nothing that was observed is observed again
    assert kept == [0, 1, 1, 2, 3]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("survey-*"))


def test_the_batch_size_changes_no_statistic(folders, tmp_path):
    found = []
    for batch in (1, 5):
        moments = {}
        for block in Model(open_source(folders["llama"])).survey(WINDOWS, "survey", batch):
            moments[block.index] = block.observe(Moments)["mlp.down_proj"]
        found.append(moments)
    for index in range(4):
        torch.testing.assert_close(found[0][index].centred, found[1][index].centred, rtol=1e-5, atol=0)


def test_what_may_not_go_stays_and_counts_as_kept(folders, tmp_path):
    dense = unit_counts(folders["llama"])
    for number, (expression, protected) in enumerate(
        {
            'flap(drop=0.2, units="mlp")': "attn",
            'flap(drop=0.1, units="attention")': "mlp",
            "flap(drop=0.2, skip_layers=1)": "layers.0.",
            "flap(drop=0.2, skip_last=2)": ("layers.2.", "layers.3."),
        }.items()
    ):
        prune(folders["llama"], tmp_path / str(number), expression, IDS, **CALIBRATION)
        found = unit_counts(tmp_path / str(number))
        protected = (protected,) if isinstance(protected, str) else protected
        stay = [name for name in dense if any(part in name for part in protected)]
        assert stay
        assert all(found[name][0] == dense[name][0] for name in stay)
        left = sum(found[name][0] * cost for name, (_, cost) in dense.items())
        goal = (1 - parse_method(expression).drop) * weights_in_units(dense)
        assert abs(left - goal) <= max(cost for _, cost in dense.values()) / 2


def test_aligned_neurons(folders, tmp_path):
    prune(folders["llama"], tmp_path / "out", "flap(drop=0.4, align=8)", IDS, **CALIBRATION)
    counts = {name: count for name, (count, _) in unit_counts(tmp_path / "out").items() if "mlp" in name}
    assert all(count % 8 == 0 for count in counts.values())


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ('flap(structure="al-mm")', "remove_groups is needed"),
        ("flap(remove_groups=3)", "remove_groups is needed"),
        ('flap(structure="best")', "structure must be one of"),
        ("flap(drop=1.5)", "drop must be a number from 0 to 1"),
        ("flap(min_groups=0)", "at least 1"),
        ('wanda_sp(allocation="best")', "allocation must be one of"),
    ],
)
def test_options_that_cannot_be(expression, message):
    with pytest.raises(UsageError, match=message):
        parse_method(expression)


def test_budgets_that_cannot_be(folders, tmp_path):
    for expression, message in (
        ('flap(drop=0.7, units="attention")', "cannot be reached"),
        ("flap(drop=0.5, skip_layers=3)", "cannot be reached"),
        ('flap(drop=0.1, structure="al-mm", remove_groups=4)', "removes more weights than the budget"),
        ('flap(drop=0.2, structure="ul-mm", remove_groups=8)', "takes 2 of 2 groups"),
    ):
        with pytest.raises(UsageError, match=message):
            prune(folders["llama"], tmp_path / "out", expression, IDS, **CALIBRATION)


def test_an_expert_that_few_tokens_reach_gets_no_bias(folders, tmp_path, caplog):
    """Two windows: every expert gets fewer tokens than a variance needs."""
    prune(folders["qwen3_moe"], tmp_path / "out", "flap(drop=0.5)", IDS, **{**CALIBRATION, "num_samples": 1})
    assert "too few to know the mean of its inputs" in caplog.text
    biases = [name for name in open_source(tmp_path / "out").shards.names() if name.endswith(".bias")]
    assert all("experts" not in name for name in biases)


# The published program, driven with 8 windows of 32 tokens.


@pytest.fixture(scope="module")
def published():
    folder = REFERENCE / "flap"
    tokens = load_file(REFERENCE / "models" / "tokens.safetensors")["input_ids"]
    return json.loads((folder / "flap_tiny.json").read_text()), load_file(folder / "flap_tiny.safetensors"), tokens


SETTINGS = {"num_samples": 8, "seq_length": 32, "compute_dtype": "float32", "sparse_products": "off"}
CASES = {
    "WIFV.AL-AM.0.25.w21": "flap(drop=0.25, published=True)",
    "WIFV.AL-AM.0.5.w21": "flap(drop=0.5, published=True)",
    "IFV.AL-AM.0.5.w21": 'flap(drop=0.5, metric="ifv", published=True)',
    "WIFN.AL-AM.0.25.w21": 'flap(drop=0.25, metric="wifn", search="reference")',
    "WIFV.UL-UM.0.5": 'flap(drop=0.5, structure="ul-um", published=True)',
    "WIFV.UL-MM.0.5": 'flap(drop=0.5, structure="ul-mm", remove_groups=7, published=True)',
    "WIFV.AL-MM.0.5": 'flap(drop=0.5, structure="al-mm", remove_groups=5, published=True)',
    "prune_wanda_sp.0.25": "wanda_sp(drop=0.25, published=True)",
    "prune_wanda_sp.0.5": "wanda_sp(drop=0.5, published=True)",
    "prune_magnitude_sp.0.25": "magnitude_sp(drop=0.25, published=True)",
    "prune_magnitude_sp.0.5": "magnitude_sp(drop=0.5, published=True)",
}


@pytest.mark.parametrize("case", CASES)
def test_the_published_program_gives_the_same_model(published, tmp_path, case):
    _, tensors, tokens = published
    prune(REFERENCE / "models" / "tiny-mha", tmp_path / "out", CASES[case], tokens, format="dense", **SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for index, layer in enumerate(loaded.model.layers):
        assert layer.self_attn.o_proj.in_features == 16 * int(tensors[f"{case}.heads"][index].sum())
        assert layer.mlp.down_proj.in_features == int(tensors[f"{case}.neurons"][index].sum())
    with torch.no_grad():
        logits = loaded(tokens).logits[:, [15, 31]]
    expected = tensors[f"{case}.logits"]
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
