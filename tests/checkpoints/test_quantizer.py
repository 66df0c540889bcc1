"""A packed folder is an ordinary transformers model: same logits as the dense one, saved, moved, trained."""

import copy
import json

import pytest
import torch
from families import tokenizer
from folders import change_config, change_tensor, logits, write_packed
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.checkpoints.checksums import INDEX_NAME
from budwood.checkpoints.loading import load
from budwood.checkpoints.quantizer import PackedConfig, register
from budwood.checkpoints.reader import Shards
from budwood.errors import RunError, UsageError
from budwood.formats import FORMATS
from budwood.kernels.linear import SparseLinear
from budwood.models.experts import ExpertLinears

SPARSE = [name for name in FORMATS if name != "dense"]
PACKED = ["llama", "qwen2", "gemma3", "phi3", "opt", "gpt2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
LINEAR = "model.layers.1.mlp.up_proj"
# Fused experts multiply in another order, and a rounded score may choose another expert; gpt2's Conv1D multiplies by
# the weight as [in, out], which some processors sum in another order than [out, in]: compared in float32.
# The tests of the export compare the weights of experts bit for bit.
ROUNDED = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "gpt2")

register()

pytestmark = pytest.mark.usefixtures("reference")  # bit-equality with the dense model


def opened(folder, **kwargs) -> PreTrainedModel:
    """By transformers alone; nothing may be missing, unexpected or of another size."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": "auto", **kwargs}, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


@pytest.fixture(scope="module", params=["two_four_compact", "two_four_compact_int8", "bitmask_int8"])
def written(tmp_path_factory, request):
    """A packed llama with a tokenizer, and the pruned model itself."""
    folder, model = write_packed(tmp_path_factory.mktemp("llama"), format=request.param)
    tokenizer().save_pretrained(folder)
    return folder, model


@pytest.fixture
def own(tmp_path):
    """A packed llama to damage."""
    return write_packed(tmp_path / "own", format="two_four_csr")[0]


@pytest.mark.parametrize("format", SPARSE)
def test_the_logits_are_those_of_the_dense_model_bit_for_bit(tmp_path, format):
    folder, model = write_packed(
        tmp_path, format=format, recovered=0.0 if format in ("two_four", "two_four_int8", "two_four_int4") else 0.03
    )
    packed = opened(folder)
    assert torch.equal(logits(packed), logits(model))
    assert packed.get_submodule(LINEAR).format == format


def test_transposed_linears_compute_bit_for_bit_what_linears_do(tmp_path):
    """The same product in the same layout; and the weights come back transposed, bit for bit."""
    folder, model = write_packed(tmp_path, "gpt2")
    packed, state = opened(folder), model.state_dict()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, linear)
    assert torch.equal(logits(packed), logits(model))
    packed.dequantize()
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


@pytest.mark.parametrize("name", PACKED)
def test_every_family_loads_saves_and_unpacks(tmp_path, name):
    """After `dequantize` it has the classes of transformers again: experts fused, Conv1D transposed."""
    folder, model = write_packed(tmp_path / "packed", name)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name in ROUNDED else {"rtol": 0, "atol": 0}
    packed = opened(folder, dtype=torch.float32 if name in ROUNDED else "auto")
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) > 8
    expected = logits(packed)
    torch.testing.assert_close(expected, logits(model.float() if name in ROUNDED else model), **tolerance)
    packed.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert torch.equal(logits(again), expected)
    again.dequantize()
    assert not any(isinstance(module, SparseLinear | ExpertLinears) for module in again.modules())
    torch.testing.assert_close(logits(again), expected, **tolerance)
    again.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(opened(tmp_path / "plain")), logits(again))


def test_a_tied_head_stays_tied(tmp_path):
    folder, _ = write_packed(tmp_path, "qwen2")
    packed = opened(folder)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_no_dense_copy_is_kept(written):
    """The parameters take the bytes of the file."""
    folder, _ = written
    packed = opened(folder)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in packed.parameters() if tensor.numel()}
    shards = Shards.of_folder(folder)
    assert sum(tensors.values()) == sum(place.nbytes for place in shards.places.values())
    assert packed.get_memory_footprint(return_buffers=False) == sum(tensors.values())


def test_packed_weights_require_no_gradient(written):
    packed = opened(written[0])
    for module in packed.modules():
        if isinstance(module, SparseLinear):
            assert not any(module.get_parameter(suffix).requires_grad for suffix in module.packed())


def test_saved_again_it_has_the_usual_file_names(written, tmp_path):
    opened(written[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "model.safetensors").is_file()
    assert "transformers_weights" not in config
    assert config["quantization_config"]["index"] is None
    assert set(config["quantization_config"]["linears"]) == set(
        json.loads((written[0] / "config.json").read_text())["quantization_config"]["linears"]
    )


def test_it_may_be_saved_and_loaded_many_times_in_many_shards(written, tmp_path):
    model = opened(written[0])
    for name in ("one", "two", "three"):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        model = opened(tmp_path / name)
    assert torch.equal(logits(model), logits(written[1]))


def test_another_dtype_casts_the_values_and_leaves_the_positions(written):
    single = opened(written[0], dtype=torch.float32)
    linear = single.get_submodule(LINEAR)
    assert linear.weight.dtype == torch.float32
    for suffix, tensor in opened(written[0]).get_submodule(LINEAR).packed().items():
        expected = torch.float32 if tensor.is_floating_point() else tensor.dtype
        assert getattr(linear, suffix).dtype == expected
    assert torch.equal(linear.unpack(), written[1].get_submodule(LINEAR).weight.float())
    half = opened(written[0]).to(torch.float16)
    assert half.get_submodule(LINEAR).unpack().dtype == torch.float16
    assert torch.isfinite(logits(half)).all()
    half.dequantize()
    assert half.get_submodule(LINEAR).weight.dtype == torch.float16


def test_the_base_model_loads_from_the_folder_of_the_whole(written):
    base = AutoModel.from_pretrained(written[0], dtype="auto")
    assert isinstance(base.get_submodule(LINEAR.removeprefix("model.")), SparseLinear)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_changes_nothing(written, device_map):
    assert torch.equal(logits(opened(written[0], device_map=device_map)), logits(written[1]))


def test_offloaded_to_disk_it_computes_and_saves_the_same(written, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(4)}
    packed = opened(written[0], device_map=device_map, offload_folder=tmp_path / "offload")
    assert packed.get_submodule(LINEAR).values.is_meta
    assert torch.equal(logits(packed), logits(written[1]))
    with pytest.raises(UsageError, match="is offloaded"):
        packed.dequantize()
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(written[1]))


def test_copies_and_generation(written):
    packed = opened(written[0])
    assert torch.equal(logits(copy.deepcopy(packed)), logits(packed))
    ids = torch.tensor([[1, 20, 30]])
    plain = written[1].generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(packed.generate(ids, max_new_tokens=5, do_sample=False), plain)


def test_adapters_train_and_packed_weights_stay(written, tmp_path):
    peft = pytest.importorskip("peft")
    packed = opened(written[0], dtype=torch.float32)
    before = packed.get_submodule(LINEAR).unpack()
    adapted = peft.get_peft_model(packed, peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = torch.arange(3, 35).view(2, 16)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    assert torch.equal(packed.get_submodule(LINEAR).base_layer.unpack(), before)
    again = peft.PeftModel.from_pretrained(opened(written[0], dtype=torch.float32), tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.equal(logits(again), logits(opened(written[0], dtype=torch.float32)))


def test_the_evaluation_harness_loads_it_by_its_folder(written):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    harness = lm_eval.HFLM(pretrained=str(written[0]), device="cpu", batch_size=1, dtype="auto")
    request = Instance("loglikelihood", {}, ("the cat", " sat"), 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    plain = lm_eval.HFLM(pretrained=written[1], tokenizer=tokenizer(), batch_size=1)
    ((expected, _),) = plain.loglikelihood([request], disable_tqdm=True)
    assert found == expected


@pytest.mark.parametrize("open_it", [load, AutoModelForCausalLM.from_pretrained])
def test_an_altered_shard_is_refused_by_name(own, open_it):
    file = own / "sparse-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"sparse-00002-of-00002\.safetensors was altered"):
        open_it(own)


@pytest.mark.parametrize("open_it", [load, AutoModelForCausalLM.from_pretrained])
def test_a_truncated_or_missing_shard_is_refused_by_name(own, open_it):
    file = own / "sparse-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"sparse-00001-of-00002\.safetensors"):
        open_it(own)
    file.unlink()
    with pytest.raises(RunError, match=r"sparse-00001-of-00002\.safetensors"):
        open_it(own)


def test_newer_versions_and_unknown_formats_are_refused(own):
    linears = json.loads((own / "config.json").read_text())["quantization_config"]["linears"]
    change_config(own, format_version=2)
    with pytest.raises(UsageError, match=r"format_version 2 .* install a newer budwood"):
        load(own)
    change_config(own, format_version=1, linears={**linears, LINEAR: {"format": "folded", "shape": [64, 32]}})
    with pytest.raises(UsageError, match=f"{LINEAR} is stored in format 'folded'"):
        load(own)
    change_config(own, linears={**linears, LINEAR: {"format": "two_four_csr", "shape": "big"}})
    with pytest.raises(RunError, match=rf"{LINEAR}\.shape is 'big' where a shape \[out, in\] should be"):
        load(own)
    change_config(own, linears={**linears, "model.layers.9.mlp.up_proj": linears[LINEAR]})
    with pytest.raises(RunError, match=r"model\.layers\.9\.mlp\.up_proj is packed in the checkpoint but missing"):
        load(own)


def test_a_missing_tensor_is_refused(own):
    change_tensor(own, f"{LINEAR}.rec_offsets", lambda tensor: None)
    with pytest.raises(RunError, match=rf"lacks {LINEAR}\.rec_offsets"):
        load(own)


def test_a_missing_plain_tensor_is_refused_by_load(own):
    change_tensor(own, "model.norm.weight", lambda tensor: None)
    with pytest.raises(RunError, match=r"lacks 1 weights of its model, model\.norm\.weight"):
        load(own)


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("rec_offsets", lambda tensor: tensor.flip(0), "row offsets"),
        ("rec_columns", lambda tensor: tensor + 1000, "outside the columns"),
        ("rec_columns", lambda tensor: tensor[:-1].clone(), "does not fit"),
        ("places", lambda tensor: tensor * 0, "a group of four"),
        ("values", lambda tensor: tensor.float().int(), "does not fit"),
        ("values", lambda tensor: tensor[:-1].clone(), "does not fit"),
    ],
)
def test_positions_that_do_not_fit_the_shape_are_refused(own, part, change, complaint):
    change_tensor(own, f"{LINEAR}.{part}", change)
    with pytest.raises(RunError, match=complaint):
        load(own)


def test_positions_offloaded_to_disk_are_checked_too(own, tmp_path):
    change_tensor(own, f"{LINEAR}.rec_columns", lambda tensor: tensor + 1000)
    device_map = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(RunError, match="outside the columns"):
        AutoModelForCausalLM.from_pretrained(own, device_map=device_map, offload_folder=tmp_path / "offload")


def test_a_dense_folder_is_loaded_too(written, tmp_path):
    written[1].save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(written[1]))
    assert torch.equal(logits(load(written[0], device="cpu")), logits(written[1]))


@pytest.mark.parametrize("folder", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_missing_folder_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="there is no folder"):
        load(folder)


def test_an_empty_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="safetensors"):
        load(tmp_path)


def test_unknown_keys_are_kept(own):
    config = PackedConfig.from_dict({"quant_method": "budwood", "dequantize": True, "novelty": [1]})
    assert not hasattr(config, "dequantize")
    assert config.to_dict()["novelty"] == [1]
    assert PackedConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    change_config(own, novelty={"a": 1})
    assert load(own).config.to_dict()["quantization_config"]["novelty"] == {"a": 1}


def test_a_dense_model_is_not_pruned_while_loading(written, tmp_path):
    written[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PackedConfig())


def test_the_index_may_have_another_name(own):
    (own / INDEX_NAME).rename(own / "other.safetensors.index.json")
    change_config(own, index="other.safetensors.index.json")
    opened(own)
