"""What is pruned is what `from_pretrained` would load, tensor by tensor; what can mean two things is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE, UNSPLIT, save_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from budwood.benchmarking import bench
from budwood.checkpoints.loading import load
from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import evaluate
from budwood.inspection import inspect
from budwood.planning import plan
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.retraining import retrain

NOTHING = 'magnitude("0%")'
IDS = token_ids(1, 200) % 90 + 3
SHORT = {"seq_length": 24, "limit": 2}


def opened(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(folder, dtype="auto"):
    with torch.no_grad():
        return opened(folder, dtype)(token_ids(), use_cache=False).logits


def assert_same(source, out):
    """Equal logits and equal tensors, dtypes included, of what transformers loads from both."""
    models = opened(source), opened(out)
    expected, found = (model.state_dict() for model in models)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(*(model(token_ids(), use_cache=False).logits for model in models))


@pytest.mark.parametrize("name", [*FAMILIES, *MORE, *UNSPLIT])
def test_a_method_that_changes_nothing_writes_the_same_model(name, tmp_path):
    dtype = torch.bfloat16 if name in MORE or name in UNSPLIT else torch.float32
    save_model(name, tmp_path / "source", dtype=dtype)
    prune(tmp_path / "source", tmp_path / "out", NOTHING, format="dense")
    assert_same(tmp_path / "source", tmp_path / "out")


KEPT = [
    ("deepseek_v3", "bfloat16", "e_score_correction_bias"),
    ("deepseek_v3", "float16", "mlp.gate.weight"),
    ("gpt_oss", "float16", "input_layernorm.weight"),  # in half precision alone
    ("longcat", "float16", "router.classifier.weight"),
]


@pytest.mark.parametrize(("name", "dtype", "part"), KEPT)
def test_what_transformers_keeps_in_float32_is_written_in_float32(name, dtype, part, tmp_path):
    save_model(name, tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "out", NOTHING, format="dense", dtype=dtype)
    expected, found = opened(tmp_path / "source", dtype).state_dict(), opened(tmp_path / "out").state_dict()
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    files = {key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()}
    assert {value.dtype for key, value in files.items() if part in key} == {torch.float32}


def test_what_is_kept_in_float32_is_so_in_a_stream(tmp_path):
    save_model("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    losses = [
        evaluate(str(tmp_path), IDS, stream=stream, dtype="bfloat16", **SHORT)["losses"] for stream in (False, True)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied and an untied model of one family, and a packed folder of the latter."""
    folder = tmp_path_factory.mktemp("made")
    save_model("qwen2", folder / "tied")
    save_model("llama", folder / "untied")
    prune(folder / "untied", folder / "packed", 'magnitude("2:4")')
    return folder


@pytest.fixture
def copy(made, tmp_path):
    def copied(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return copied


def with_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def untie(tensors):
    tensors["lm_head.weight"] = torch.flip(tensors["model.embed_tokens.weight"], (0,)).contiguous()


def tie_twice(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_only(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize("change", [untie, tie_twice, head_only])
def test_heads_and_embeddings_are_tied_where_transformers_ties_them(copy, tmp_path, change):
    source = copy("tied")
    with_tensors(source, change)
    prune(source, tmp_path / "out", NOTHING, format="dense")
    assert_same(source, tmp_path / "out")
    if change is untie:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert not torch.equal(
            opened(tmp_path / "out").lm_head.weight, opened(tmp_path / "out").model.embed_tokens.weight
        )
    prune(source, tmp_path / "packed", 'magnitude("2:4")')
    losses = [evaluate(str(tmp_path / "packed"), IDS, stream=stream, **SHORT)["losses"] for stream in (False, True)]
    assert losses[0] == losses[1]
    assert torch.equal(opened(tmp_path / "packed").lm_head.weight, opened(source).lm_head.weight)


def test_tensors_of_another_dtype_than_most_are_not_rounded_by_a_stream(copy):
    source = copy("untied")
    norm = torch.linspace(0.9, 1.1, 32)

    def change(tensors):
        tensors |= {name: tensor.bfloat16() for name, tensor in list(tensors.items()) if tensor.is_floating_point()}
        tensors["model.norm.weight"] = norm

    with_tensors(source, change)
    resident, streamed = (evaluate(str(source), IDS, stream=stream, **SHORT)["losses"] for stream in (False, True))
    assert resident == streamed


def old_index(folder, other):
    """Shards of an earlier, larger save with their index beside model.safetensors."""
    half = dict(list(load_file(other / "model.safetensors").items()))
    save_file(half, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    listed = dict.fromkeys(half, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_a_single_file_beside_an_old_index(copy, tmp_path):
    source = copy("untied")
    save_model("llama", tmp_path / "other", seed=1)
    old_index(source, tmp_path / "other")
    prune(source, tmp_path / "out", NOTHING, format="dense")
    assert_same(source, tmp_path / "out")
    resident, streamed = (evaluate(str(source), IDS, stream=stream, **SHORT)["losses"] for stream in (False, True))
    assert resident == streamed


def in_shards(source, change):
    """The tensors in two shards and their index; `change` is given the tensors of each, and which the index says."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]
    listed = {name: shard for part, shard in zip(parts, shards, strict=True) for name in part}
    change(*parts, listed)
    for part, shard in zip(parts, shards, strict=True):
        save_file(part, source / shard, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def in_both(first, second, listed):
    for part, other in ((first, second), (second, first)):
        name = sorted(part)[3]
        other[name] = part[name] + 1


def that_no_file_has(first, second, listed):
    listed["model.nothing.weight"] = listed[next(iter(first))]


def in_the_other(first, second, listed):
    other = {listed[next(iter(first))]: second, listed[next(iter(second))]: first}
    listed |= {name: shard for shard, part in other.items() for name in part}


def not_listed(first, second, listed):
    del listed[sorted(second)[2]]


@pytest.mark.parametrize("change", [in_both, that_no_file_has, in_the_other, not_listed])
def test_an_index_that_does_not_say_what_its_shards_hold(copy, tmp_path, change):
    """The shards count, and of two tensors of one name the later one, as in transformers."""
    source = copy("untied")
    in_shards(source, change)
    prune(source, tmp_path / "out", NOTHING, format="dense")
    assert_same(source, tmp_path / "out")


def test_a_shard_that_no_tensor_is_listed_in_is_not_read(copy, tmp_path):
    source = copy("untied")
    in_shards(source, lambda first, second, listed: [listed.pop(name) for name in second])
    for call in (lambda: prune(source, tmp_path / "out", NOTHING), lambda: load(source)):
        with pytest.raises(RunError, match="lacks"):
            call()


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_two_tensors_of_one_parameter_are_refused(copy, tmp_path, name):
    """With and without the name of the base model: which of them counts is nowhere said."""
    source = copy("untied")
    with_tensors(source, lambda tensors: tensors.update({name: tensors[f"model.{name}"] + 1}))
    verbs = {
        "prune": lambda: prune(source, tmp_path / "out", NOTHING),
        "plan": lambda: plan(source, NOTHING),
        "stream": lambda: evaluate(str(source), IDS, stream=True, **SHORT),
        "inspect": lambda: inspect(source),
    }
    for verb, call in verbs.items():
        with pytest.raises(UsageError, match=rf"holds both (model\.)?{name} and (model\.)?{name}"):
            call()
        assert not (tmp_path / "out").exists(), verb


@pytest.mark.parametrize("packed", [True, False])
def test_what_transformers_saved_over_a_packed_folder(copy, tmp_path, packed):
    """The shards of the former model stay there, and no verb reads them."""
    folder = copy("packed")
    model = opened(folder)
    if not packed:
        model = model.dequantize()
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    model.save_pretrained(folder)
    assert list(folder.glob("sparse-*.safetensors"))
    repack(folder, tmp_path / "out", "dense") if packed else prune(folder, tmp_path / "out", NOTHING, format="dense")
    assert torch.equal(opened(tmp_path / "out").model.norm.weight, model.model.norm.weight)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    resident, streamed = (evaluate(str(folder), IDS, stream=stream, **SHORT)["losses"] for stream in (False, True))
    assert resident == streamed
    assert inspect(folder)["checksums"] == "no checksums to compare"


@pytest.mark.parametrize("base", [".", "/etc", "owner/other"])
@pytest.mark.parametrize("name", ["untied", "packed"])
def test_an_adapter_beside_a_model_is_refused_by_every_verb(copy, tmp_path, name, base):
    folder = copy(name)
    content = {"peft_type": "LORA", "base_model_name_or_path": base, "target_modules": ["q_proj"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    verbs = {
        "prune": lambda: prune(folder, tmp_path / "out", NOTHING),
        "plan": lambda: plan(folder, NOTHING),
        "export": lambda: repack(folder, tmp_path / "out", "dense"),
        "evaluate": lambda: evaluate(str(folder), IDS),
        "stream": lambda: evaluate(str(folder), IDS, stream=True),
        "inspect": lambda: inspect(folder),
        "bench": lambda: bench(folder),
        "retrain": lambda: retrain(folder, tmp_path / "out", IDS, num_samples=4, seq_length=24, steps=1),
        "load": lambda: load(folder),
    }
    for verb, call in verbs.items():
        with pytest.raises(UsageError, match="holds an adapter"):
            call()
        assert not (tmp_path / "out").exists(), verb


@pytest.mark.parametrize("pruned", [None, 'magnitude("2:4")', "flap(drop=0.3)"])
@pytest.mark.parametrize(("family", "field", "value"), [("gpt2", "n_positions", 300), ("llama", "vocab_size", 256)])
def test_a_shape_that_the_configuration_does_not_give_is_refused(family, field, value, pruned, tmp_path):
    """Outside of the blocks too: transformers does not load such a folder, nor what would be written of it."""
    source = tmp_path / "source"
    save_model(family, source)
    if pruned is not None:
        source = tmp_path / "pruned"
        prune(tmp_path / "source", source, pruned, IDS, num_samples=4, seq_length=24)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: value}))
    verbs = [
        lambda: prune(source, tmp_path / "out", NOTHING),
        lambda: evaluate(str(source), IDS, stream=True, **SHORT),
        lambda: plan(source, NOTHING) if pruned is None else repack(source, tmp_path / "out", "dense"),
    ]
    for verb in verbs:
        with pytest.raises(RunError, match=rf"and by config.json it is \[{value}"):
            verb()
    with pytest.raises((RunError, UsageError)):
        load(source)
    assert not (tmp_path / "out" / "config.json").exists()
