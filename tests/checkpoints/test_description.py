"""The configuration of a pruned model is found by trying, and its folder then needs no plug-in."""

import json
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, save_model, token_ids
from plain import logits_without_budwood
from transformers import AutoConfig, AutoModelForCausalLM

from budwood.checkpoints.description import Description, describe, equal_logits, general
from budwood.checkpoints.loading import load
from budwood.checkpoints.trial import Trial
from budwood.inspection import inspect
from budwood.methods.method import Method
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.sparsity.forecast import Forecast

IDS = token_ids(1, 400) % 90 + 3
TEXT = token_ids(1, 30) % 90 + 3
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}


def trial(name, **sizes):
    model_type, known = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**known, **sizes})
    return Trial(type(config), config.to_dict())


def found(name, changes, biases=(), **sizes):
    """The description of a model whose tensors with these endings have other shapes, and the fields that it changes."""
    source = trial(name, **sizes)
    written = {
        tensor: change(list(shape))
        for tensor, shape in source.shapes.items()
        for ending, change in changes.items()
        if tensor.endswith(ending)
    }
    for linear in (tensor.removesuffix(".weight") for tensor in source.shapes):
        if linear.endswith(tuple(biases)):
            written[f"{linear}.bias"] = [source.shapes[f"{linear}.weight"][0]]
    description = describe(source, written, source.shapes)
    fields = {key: value for key, value in description.config.items() if source.content.get(key) != value}
    assert not description.shapes or (description.shapes, fields) == (written, {})
    return description, fields


def rows(share):
    return lambda shape: [int(shape[0] * share), *shape[1:]]


def columns(share):
    return lambda shape: [shape[0], int(shape[1] * share)]


def heads(share):
    return {f"{x}_proj.{kind}": rows(share) for x in "qkv" for kind in ("weight", "bias")} | {
        "o_proj.weight": columns(share)
    }


NEURONS = {"gate_proj.weight": rows(0.625), "up_proj.weight": rows(0.625), "down_proj.weight": columns(0.625)}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_uniform_heads_and_neurons_are_counts_of_the_configuration(name):
    _, fields = found(name, {**heads(0.5), **NEURONS})
    assert fields == {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "opt",
            {"fc1.weight": rows(0.5), "fc1.bias": rows(0.5), "fc2.weight": columns(0.5)},
            {"ffn_dim": 32},
        ),
        (  # a size that follows from another one as long as it is not given
            "gpt2",
            {"c_fc.weight": columns(0.5), "c_fc.bias": rows(0.5), "mlp.c_proj.weight": rows(0.5)},
            {"n_inner": 64},
        ),
        (
            "mixtral",
            {"gate_up_proj": lambda s: [s[0], s[1] // 2, s[2]], "down_proj": lambda s: [*s[:2], s[2] // 2]},
            {"intermediate_size": 32},
        ),
        (
            "gpt_oss",
            {end: rows(0.75) for end in ("up_proj", "down_proj", "proj_bias", "router.weight", "router.bias")},
            {"num_local_experts": 3},
        ),
    ],
)
def test_other_families(name, changes, expected):
    assert found(name, changes)[1] == expected


def test_biases_are_switched_on_and_those_that_come_with_them_are_zeros():
    description, fields = found("llama", NEURONS, ["down_proj"])
    assert fields == {"intermediate_size": 40, "mlp_bias": True}
    assert len(description.zeros) == 8
    assert description.zeros["model.layers.0.mlp.gate_proj.bias"] == (40,)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_general_class_is_taken_where_the_own_one_has_no_such_field(name):
    """3 of 4 heads, which LlamaConfig refuses, and biases that the other two do not have."""
    description, fields = found(name, {**heads(0.75), **NEURONS}, ["o_proj", "down_proj"], sliding_window=None, **MHA)
    assert not description.shapes
    assert fields["num_attention_heads"] == fields["num_key_value_heads"] == 3
    assert (fields["model_type"], fields["architectures"]) == ("seed_oss", ["SeedOssForCausalLM"])
    assert fields["attention_out_bias"]
    assert {name.split(".", 3)[3] for name in description.zeros} == {"mlp.gate_proj.bias", "mlp.up_proj.bias"}


def test_a_class_that_computes_something_else_is_not_taken():
    """A sliding window, norms of queries and keys, other activations; the last ones by logits alone."""
    assert found("mistral", {}, ["down_proj"], sliding_window=8)[0].shapes
    assert found("qwen3", {}, ["down_proj"])[0].shapes
    assert list(general(trial("llama"), "seed_oss"))
    gelu = trial("llama", hidden_act="gelu")
    assert next(general(gelu, "seed_oss")).content["hidden_act"] == "gelu"
    assert not equal_logits(trial("llama"), gelu)
    assert not equal_logits(trial("llama"), trial("llama", rms_norm_eps=0.1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_half_of_the_heads_are_not_heads_of_half_the_size(name):
    """Both explain the shapes; rotary tables and the scale of attention tell them apart."""
    assert found(name, heads(0.5))[1] == {"num_attention_heads": 2, "num_key_value_heads": 1}


def test_what_no_configuration_describes_keeps_its_shapes():
    written = {"model.layers.1.mlp.down_proj.weight": [32, 40]}
    source = trial("llama")
    assert describe(source, written, source.shapes) == Description(source.content, written)
    assert found("olmo2", heads(0.75))[0].shapes  # its norms have a weight for every head
    assert describe(source, {}, source.shapes) == Description(source.content)


@dataclass(frozen=True)
class Halves(Method):
    """Every second KV group and neuron goes; some consumers get a bias. share: of the KV groups that stay."""

    biased: bool = False

    def forecast(self, structure):
        from budwood.methods.structured import forecast

        return forecast(structure, lambda units: (len(units) + 1) // 2)

    def __call__(self, block):
        block.keep({name: torch.arange(0, len(units), 2) for name, units in block.units.items()})
        for name in [*block.units] if self.biased else []:
            linear = block.linears[name]
            linear.bias = torch.linspace(-1, 1, linear.shape[0])


CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
WRITTEN = [
    ("llama", False),
    ("llama", True),
    ("qwen2", True),
    ("gemma2", False),
    ("gpt_oss", False),
    ("mixtral", False),
]


@pytest.mark.parametrize(("name", "biased"), WRITTEN)
def test_a_uniform_folder_loads_without_budwood(tmp_path, name, biased):
    """Dense, under the usual names, with the logits that a folder with the plug-in has."""
    save_model(name, tmp_path / "in")
    report = prune(tmp_path / "in", tmp_path / "out", Halves(biased), IDS, **CALIBRATION)
    assert report["format"] == "dense"
    assert not report["needs_budwood"]
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in content
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not list((tmp_path / "out").glob("sparse*"))
    plain = logits_without_budwood(tmp_path / "out", TEXT, tmp_path / "logits")
    prune(tmp_path / "in", tmp_path / "packed", Halves(biased), IDS, format="bitmask", **CALIBRATION)
    torch.testing.assert_close(plain, logits_of(load(tmp_path / "packed").dequantize()), rtol=1e-4, atol=1e-5)
    assert not inspect(tmp_path / "out")["totals"]["broken"]
    assert report["totals"]["parameters_after"] == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()
    )
    repack(tmp_path / "packed", tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TEXT, use_cache=False).logits


def test_a_method_without_zeros_is_stored_dense_only_where_all_is_full(tmp_path):
    @dataclass(frozen=True)
    class Half(Method):
        def forecast(self, structure):
            return {name: Forecast(a * b / (2 if "down" in name else 1)) for name, (a, b) in structure.shapes.items()}

        def __call__(self, block):
            down = block.linears["mlp.down_proj"]
            down.weight = torch.where(torch.arange(down.shape[1]) % 2 == 0, down.weight, 0)

    save_model("llama", tmp_path / "in")
    assert prune(tmp_path / "in", tmp_path / "out", Half(), IDS, **CALIBRATION)["format"] == "auto"
    assert prune(tmp_path / "in", tmp_path / "dense", 'magnitude("0%")', IDS, **CALIBRATION)["format"] == "dense"
