"""LLM-Pruner: agreement with the published program, counts, budgets, resumed runs."""

import json
import shutil

import pytest
import reference
import torch
from families import save_model, token_ids
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import RunError, UsageError
from budwood.methods import gblm, parse_method, structured
from budwood.methods.structured import Slices
from budwood.planning import plan
from budwood.pruning import prune
from budwood.sparsity.selection import highest
from budwood.stream.model import Model
from budwood.training import gradients as training_gradients

TAYLOR = {"param_first": "first", "param_second": "second", "param_mix": "mixed", "vectorize": "vector"}
MHA, GQA = (reference.record(f"llm-pruner/llm-pruner_{kind}")["cases"] for kind in ("mha", "gqa"))
CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
IDS = token_ids(1, 400) % 90 + 3


def method_of(case):
    first, last = case["layers"]
    reduction = {"prod": "product"}.get(case["grouping_strategy"], case["grouping_strategy"])
    scope = "global" if case["global_pruning"] else "local"
    return parse_method(
        f'llm_pruner(drop={case["pruning_ratio"]}, taylor="{TAYLOR[case["taylor"]]}", reduction="{reduction}", '
        f'layers="{first}:{last}", scope="{scope}", published=True)'
    )


def scores_of(case, model):
    """Importance of every unit by full name of the consumer, of the blocks that a case prunes."""
    method = method_of(case)
    sets = {block.index: dict(block.units) for block in model.survey(reference.tokens()[:1], "survey")}
    return method.scores(model, reference.tokens(), {i: sets[i] for i in method.blocks_of(len(model))})


def importance(tensors, name, consumer, heads, root="q_proj"):
    """The program's importance of the units of a consumer: of heads the sum over their channels."""
    if "o_proj" in consumer:
        return tensors[f"{name}/{consumer.replace('o_proj', root)}/imp"].double().unflatten(0, (heads, -1)).sum(1)
    return tensors[f"{name}/{consumer.replace('down_proj', 'gate_proj')}/imp"].double()


@pytest.mark.parametrize("name", MHA)
def test_importances_are_those_of_the_published_program(name):
    case, tensors = MHA[name], reference.tensors("llm-pruner/llm-pruner_mha")
    found = scores_of(case, Model(open_source(reference.model("tiny-mha"))))
    tolerance = 1e-4 if case["grouping_strategy"] == "prod" else 2e-5
    for consumer, scores in found.items():
        expected = importance(tensors, name, consumer, 4)
        torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance * float(expected.max()) / 10)


@pytest.mark.parametrize(("file", "name"), [("mha", name) for name in MHA] + [("gqa", name) for name in GQA])
def test_cuts_and_logits_are_those_of_the_published_program(file, name):
    """Groups of the model with grouped queries are ranked by the program's importances, which are not the true sums."""
    case, windows = {**MHA, **GQA}[name], reference.tokens()
    tensors = reference.tensors(f"llm-pruner/llm-pruner_{file}")
    model = Model(open_source(reference.model(case["model"])))
    kept: dict = {}
    for consumer, units in method_of(case).kept_units(model, windows).items():
        if "o_proj" in consumer and case["model"] == "tiny-gqa":
            units = highest(importance(tensors, name, consumer, 2, "k_proj"), len(units))
        block, inside = consumer[: len("model.layers.0")], consumer[len("model.layers.0.") :]
        kept.setdefault(block, {})[inside] = units
        columns = model.structure.units[block][inside].columns
        removed = set(case["removed"].get(f"{consumer}.cols", []))
        if case["global_pruning"] and "o_proj" in consumer:
            removed = set()  # recorded as cut, while the shapes are whole
        assert set(columns.flatten().tolist()) - set(columns[units].flatten().tolist()) == removed, consumer
    for block in model.blocks(windows, batch=8):
        Slices(kept)(block)
    with model.outside(), torch.no_grad():
        logits = model.logits(model.activations.read(0, model.device))[:, [15, 31]]
    expected = tensors[f"{name}/logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name in GQA if "tiny-gqa" in name])
def test_grouped_queries_are_scored_with_the_key_head_that_they_use(name):
    """The published program adds query channels to other key heads, so the expected sums are computed here."""
    case, windows = GQA[name], reference.tokens()
    found = scores_of(case, Model(open_source(reference.model("tiny-gqa"))))
    whole = AutoModelForCausalLM.from_pretrained(reference.model("tiny-gqa"))
    gradients = []
    for window in windows:
        whole.zero_grad()
        cross_entropy(whole(window[None]).logits[0, :-1], window[1:]).backward()
        gradients.append({key: weight.grad.double() for key, weight in whole.named_parameters()})
    order = TAYLOR[case["taylor"]]
    tensors = reference.tensors("llm-pruner/llm-pruner_gqa")
    for consumer, scores in found.items():
        if "down_proj" in consumer:
            expected = importance(tensors, name, consumer, 2)
        else:
            expected = torch.zeros(2, dtype=torch.float64)
            for part, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
                key = f"{consumer.replace('o_proj', part)}.weight"
                weight = whole.get_parameter(key).detach().double()
                mean = sum(each[key] for each in gradients) / len(gradients)
                square = sum(each[key].square() for each in gradients) / len(gradients)
                value = {
                    "first": weight * mean,
                    "vector": weight * mean,
                    "second": weight**2 * square,
                    "mixed": weight * mean - weight**2 * square / 2,
                }[order]
                value = value.T if part == "o_proj" else value
                slices = value.sum(1).abs() if order == "vector" else value.abs().sum(1)
                expected += slices.unflatten(0, (2, rows)).sum(1)
        torch.testing.assert_close(scores, expected, rtol=2e-5, atol=2e-6 * float(expected.max()))


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}, 5_422_977_024),
        ({"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}, 6_612_586_496),
    ],
)
def test_the_programs_sizes_of_llama_7b_and_8b(sizes, parameters):
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False, **sizes
    )
    structure = ModelStructure(config)
    forecast = parse_method('llm_pruner(drop=0.25, layers="4:30", published=True)').forecast(structure)
    lost = structure.in_scope - sum(held.nonzeros for held in forecast.values())
    assert structure.parameters - lost == parameters


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "mixtral"):
        save_model(family, folder / family)
    return folder


SETTINGS = [
    ("llama", "llm_pruner(drop=0.3)"),
    ("llama", 'llm_pruner(drop=0.2, taylor="mixed", layers="1:3")'),
    ("llama", 'llm_pruner(drop=0.3, taylor="second", scope="global")'),
    ("llama", 'llm_pruner(drop=0.5, taylor="vector", reduction="max", published=True)'),
    ("gpt2", "llm_pruner(drop=0.3)"),
    ("gpt2", 'llm_pruner(drop=0.3, scope="global", reduction="last")'),
    ("mixtral", "llm_pruner(drop=0.25)"),
]


@pytest.mark.parametrize(("family", "expression"), SETTINGS)
def test_the_budget_is_met_to_one_unit_and_resumed_runs_are_byte_identical(models, family, expression, tmp_path):
    source, method = models / family, parse_method(expression)
    report = prune(source, tmp_path / "whole", expression, IDS, **CALIBRATION)
    structure = ModelStructure(AutoConfig.from_pretrained(source))
    sets = [units for block in structure.units.values() for units in block.values()]
    total = sum(units.cost * len(units) for units in sets)
    dense = AutoModelForCausalLM.from_pretrained(source)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    lost = dense.num_parameters() - pruned.num_parameters()
    if not method.published:
        unit = max(units.cost for units in sets if method.scope == "global" or units.kind == "mlp")
        assert abs(lost - method.drop * total) <= unit / 2
    assert torch.isfinite(pruned(token_ids()).logits).all()
    forecast = method.forecast(structure)
    if method.scope == "local":
        shapes = {name: tuple(linear["shape"]) for name, linear in report["linears"].items()}
        assert shapes == {name: held.shape for name, held in forecast.items()}
        assert plan(source, expression)["bytes_after"] == pytest.approx(report["totals"]["bytes"], rel=0.01)  # biases

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    for shard in (shards[0], *shards[3:]):  # as if it had been killed in the third block
        shard.unlink()
    for name in ("config.json", "report.json"):
        (tmp_path / "cut" / name).unlink()
    again = prune(source, tmp_path / "cut", expression, IDS, **CALIBRATION)
    assert again["totals"] == report["totals"]
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes(), shard.name


def test_kept_weights_are_those_of_the_dense_model(models, tmp_path):
    prune(models / "llama", tmp_path / "out", "llm_pruner(drop=0.4)", IDS, **CALIBRATION)
    dense = AutoModelForCausalLM.from_pretrained(models / "llama").model.layers
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    for before, after in zip(dense, pruned, strict=True):
        rows = [row.tolist() for row in before.mlp.gate_proj.weight]
        assert all(row.tolist() in rows for row in after.mlp.gate_proj.weight)
        assert len(after.mlp.gate_proj.weight) < len(rows)


@pytest.mark.parametrize(
    ("expression", "step"),
    [('llm_pruner(drop=0.3, scope="global")', structured.Slices), ('gblm("50%")', gblm.GblmStep)],
)
def test_a_run_that_goes_on_computes_no_gradients_again(models, expression, step, tmp_path, monkeypatch):
    prune(models / "llama", tmp_path / "whole", expression, IDS, **CALIBRATION)
    real = step.__call__

    def killed(self, block):
        if block.index == 2:
            raise RunError("killed")
        real(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(step, "__call__", killed)
        with pytest.raises(RunError, match="killed"):
            prune(models / "llama", tmp_path / "cut", expression, IDS, **CALIBRATION)
    monkeypatch.setattr(training_gradients, "gradients", None)
    prune(models / "llama", tmp_path / "cut", expression, IDS, **CALIBRATION)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes(), shard.name


def test_only_the_blocks_of_the_range_change(models, tmp_path):
    report = prune(models / "llama", tmp_path / "out", 'llm_pruner(drop=0.1, layers="2:")', IDS, **CALIBRATION)
    shapes = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["shapes"]
    assert shapes
    assert all(name.split(".")[2] in ("2", "3") for name in shapes)
    assert report["linears"]["model.layers.0.mlp.down_proj"]["shape"] == [32, 64]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ('llm_pruner(layers="4-30")', "range of blocks"),
        ('llm_pruner(taylor="third")', "taylor"),
        ('llm_pruner(reduction="min")', "reduction"),
        ("llm_pruner(drop=1.5)", "drop"),
        ('llm_pruner(layers="7:")', "none of the 4 blocks"),
        ('llm_pruner(drop=0.5, layers="1:2")', "25 % of the weights"),
    ],
)
def test_what_cannot_be_is_refused(models, expression, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        prune(models / "llama", tmp_path / "out", expression, IDS, **CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_a_lora_recovers_the_sliced_model(tmp_path):
    """Shapes stay, the held-out loss falls, and what is added to a matrix has the rank of the term."""
    save_model("llama", tmp_path / "dense")
    windows = IDS.flatten()[:48].view(2, 24).repeat(4, 1)
    inner, rank = "llm_pruner(drop=0.2)", 2
    outer = f'perp({inner}, move="masklora", rank={rank}, alpha=4, rate=0.02, steps=12, batch=4)'
    alone = prune(tmp_path / "dense", tmp_path / "alone", inner, windows, **CALIBRATION | {"num_samples": 8})
    report = prune(tmp_path / "dense", tmp_path / "out", outer, windows, **CALIBRATION | {"num_samples": 8})
    held = [loss for _, loss in report["training"][0]["held_out"]]
    assert min(held) < 0.95 * held[0]
    assert report["totals"]["bytes"] == alone["totals"]["bytes"]
    sliced, recovered = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("alone", "out")
    )
    for name, weight in sliced.items():
        added = recovered[name] - weight
        if name.removesuffix(".weight") in report["linears"]:
            assert torch.linalg.matrix_rank(added, atol=1e-4) == rank, name
        else:
            assert not added.any(), name
