"""A folder whose tensors have other shapes than config.json describes, or more of them, loads like any other."""

import copy
import json

import pytest
import torch
from folders import change_config, change_tensor, logits
from reshaped import KEPT, write_reshaped
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from budwood.checkpoints import quantizer
from budwood.checkpoints.loading import load
from budwood.checkpoints.quantizer import PackedConfig, register
from budwood.errors import RunError
from budwood.kernels.linear import SparseLinear
from budwood.models.experts import ExpertLinears

FAMILIES = ["llama", "gpt2", "mixtral", "qwen3_moe"]
DOWN = "model.layers.1.mlp.down_proj"
register()


def opened(folder, **kwargs) -> PreTrainedModel:
    """By transformers alone; nothing may be missing, unexpected or of another size."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": "auto", **kwargs}, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def check_equal(name, found, model) -> None:
    """Parameters bit for bit. Logits too, except where experts or Conv1D are multiplied in another order."""
    tolerance = {"rtol": 0, "atol": 0} if name == "llama" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(found), logits(model), **tolerance)
    described = dict(model.named_parameters())
    for full, parameter in found.named_parameters():
        if full in described:
            assert torch.equal(parameter, described[full]), full


@pytest.mark.parametrize("format", ["two_four", "bitmask", None])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_model_in_memory(tmp_path, name, format):
    folder, model = write_reshaped(tmp_path, name, format=format)
    found = opened(folder)
    check_equal(name, found, model)
    assert sum(isinstance(module, SparseLinear) for module in found.modules()) == (
        0 if format is None else 2 if name == "gpt2" else 3
    )


@pytest.mark.parametrize("format", ["two_four", None])
def test_bfloat16(tmp_path, format):
    folder, model = write_reshaped(tmp_path, dtype=torch.bfloat16, format=format)
    found = opened(folder)
    assert found.dtype == torch.bfloat16
    check_equal("llama", found, model)
    check_equal("llama", opened(folder, dtype=torch.float32), model.float())
    assert {p.dtype for p in opened(folder).to(torch.float16).parameters() if p.is_floating_point()} == {torch.float16}


def test_sizes_are_those_of_the_weights(tmp_path):
    found = opened(write_reshaped(tmp_path)[0])
    mlp = found.model.layers[1].mlp
    assert (mlp.up_proj.in_features, mlp.up_proj.out_features) == (32, KEPT)
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (KEPT, 32)
    assert isinstance(mlp.down_proj, SparseLinear)
    assert mlp.down_proj.bias is not None


@pytest.mark.parametrize("neurons", [True, False])
@pytest.mark.parametrize("format", ["two_four", None])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_again(tmp_path, name, format, neurons):
    """Twice, as packed and as dense weights; without the plug-in neither is read."""
    model = opened(write_reshaped(tmp_path / "written", name, format=format, neurons=neurons)[0])
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    check_equal(name, again, model)
    check_refused_without_plug_in(tmp_path / "again")
    again.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in again.modules())
    assert any(isinstance(module, ExpertLinears) for module in again.modules()) == (
        neurons and name in ("mixtral", "qwen3_moe")
    )
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "plain")
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert settings["linears"] == {}
    assert settings["shapes"]
    plain = opened(tmp_path / "plain")
    check_equal(name, plain, again)
    assert {full: tuple(p.shape) for full, p in plain.named_parameters()} == {
        full: tuple(p.shape) for full, p in again.named_parameters()
    }
    check_refused_without_plug_in(tmp_path / "plain")


def check_refused_without_plug_in(folder) -> None:
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "quantization_config": {"quant_method": "unknown"}}))
    with pytest.raises((RuntimeError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    config.write_text(text)


@pytest.mark.parametrize("format", ["two_four", None])
def test_a_written_folder_is_refused_without_the_plug_in(tmp_path, format):
    check_refused_without_plug_in(write_reshaped(tmp_path, format=format)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_generation_with_a_cache(tmp_path, name):
    folder, model = write_reshaped(tmp_path, name)
    found = opened(folder)
    assert torch.equal(logits(copy.deepcopy(found)), logits(found))
    ids = torch.tensor([[1, 20, 30]])
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))
    assert torch.equal(copy.deepcopy(found).dequantize().generate(ids, **options), model.generate(ids, **options))


def test_the_base_model_and_the_whole_model_read_the_same_folder(tmp_path, reference):
    folder, model = write_reshaped(tmp_path / "whole")
    base = AutoModel.from_pretrained(folder)
    assert base.layers[1].mlp.down_proj.bias is not None
    base.save_pretrained(tmp_path / "base")
    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, expected)


def test_offloaded_to_disk(tmp_path):
    folder, model = write_reshaped(tmp_path / "written")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(4)}
    found = opened(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(found), logits(model))


def test_a_bias_in_the_file_is_used_without_an_entry(tmp_path):
    folder, model = write_reshaped(tmp_path)
    shapes = json.loads((folder / "config.json").read_text())["quantization_config"]["shapes"]
    change_config(folder, shapes={name: shape for name, shape in shapes.items() if name != f"{DOWN}.bias"})
    assert torch.equal(logits(opened(folder)), logits(model))


def test_added_and_reshaped_parameters_are_never_random(tmp_path):
    folder, _ = write_reshaped(tmp_path, format=None)
    change_tensor(folder, f"{DOWN}.bias", lambda tensor: None)
    with pytest.raises(RunError, match=rf"{DOWN}\.bias the shape \[32\] and the checkpoint lacks it"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_shape_that_the_file_contradicts_is_refused(tmp_path):
    folder, _ = write_reshaped(tmp_path, format=None)
    change_tensor(folder, f"{DOWN}.weight", lambda tensor: tensor[:, 1:].clone())
    with pytest.raises(RunError, match=rf"the shape \[32, {KEPT}\] and the checkpoint has \[32, {KEPT - 1}\]"):
        load(folder)


@pytest.mark.parametrize("shape", ["big", [], [0, 3], [4.0], None, [True]])
def test_a_bad_shape_is_named(shape):
    with pytest.raises(RunError, match=r"a\.weight the shape .*a list of positive integers"):
        PackedConfig(shapes={"a.weight": shape}).check()


def test_shapes_that_are_no_mapping_are_refused():
    with pytest.raises(RunError, match="should be given by name"):
        PackedConfig(shapes=["a.weight"]).check()


def test_an_unknown_module_is_named(tmp_path):
    folder, _ = write_reshaped(tmp_path)
    change_config(folder, shapes={"model.layers.9.mlp.up_proj.bias": [4]})
    with pytest.raises(RunError, match=r"model\.layers\.9\.mlp\.up_proj is missing in LlamaForCausalLM"):
        load(folder)


def test_the_configuration_keeps_shapes_only_when_there_are_some():
    assert "shapes" not in PackedConfig().to_dict()
    config = PackedConfig(shapes={"a.bias": [3]})
    assert quantizer.PackedConfig.from_dict(config.to_dict()).shapes == {"a.bias": [3]}
