"""graft with moments of differences and with sensitivities of rows: what changes, and that it is resumed."""

import shutil

import pytest
import torch
from families import save_model, token_ids
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.pruning import prune
from budwood.stream.model import Model
from budwood.training import gradients as training_gradients
from budwood.training.sensitivities import row_sensitivities

OPTIONS = {
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
    "format": "dense",
}
IDS = token_ids(4) % 90 + 3
FREE = 'graft(bits=9.0, pattern="free", allocate="uniform", rounds=4{})'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "opt"):
        save_model(family, root / family)
    return root


def weights_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: value for name, value in model.state_dict().items() if "layers.0." in name}


@pytest.mark.parametrize("way", ["accumulate", "accumulate_by_block"])
def test_sensitivities_are_those_of_automatic_differentiation(folders, monkeypatch, way):
    ids = IDS[:2, :12]
    model = Model(open_source(folders / "llama"))
    chosen = getattr(training_gradients, way)
    monkeypatch.setattr(
        "budwood.training.sensitivities.gradients",
        lambda model, windows, linears, fold, held: chosen(model, windows, linears, fold),
    )
    found = row_sensitivities(model, ids, model.linears)
    whole = AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    outputs = {name: [] for name in model.linears}

    def hook(name):
        def after(module, args, output):
            output.retain_grad()
            outputs[name].append(output)

        return after

    for name in model.linears:
        whole.get_submodule(name).register_forward_hook(hook(name))
    for window in ids:
        logits = whole(window[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, window[1:]).backward()
    for name, parts in outputs.items():
        expected = sum(part.grad.square().sum(dim=(0, 1)) for part in parts) / ids.numel()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-12)


def test_sensitivities_move_the_masks_alone(folders, tmp_path):
    """The number of kept weights stays, their division among the rows of a matrix changes."""
    plain = prune(folders / "llama", tmp_path / "plain", FREE.format(""), IDS, **OPTIONS)
    ranked = prune(folders / "llama", tmp_path / "ranked", FREE.format(", sensitivities=True"), IDS, **OPTIONS)
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "ranked")
    name = "model.layers.0.mlp.up_proj"
    assert plain["linears"][name]["nonzeros"] == ranked["linears"][name]["nonzeros"]
    rows = [(weights[f"{name}.weight"] != 0).sum(dim=1) for weights in (before, after)]
    assert not torch.equal(*rows)
    sensitivities = row_sensitivities(model := Model(open_source(folders / "llama")), IDS[:, :24], model.linears)[name]
    high, low = sensitivities.topk(16).indices, (-sensitivities).topk(16).indices
    assert (rows[1] - rows[0])[high].sum() > 0 > (rows[1] - rows[0])[low].sum()


def test_differences_fit_the_bias_too(folders, tmp_path):
    prune(folders / "opt", tmp_path / "plain", FREE.format(""), IDS, **OPTIONS)
    prune(folders / "opt", tmp_path / "mixed", FREE.format(', differences=1.0, pairs="all"'), IDS, **OPTIONS)
    dense, plain, mixed = (weights_of(folder) for folder in (folders / "opt", tmp_path / "plain", tmp_path / "mixed"))
    bias = next(name for name in dense if name.endswith("fc1.bias"))
    assert torch.equal(plain[bias], dense[bias])
    assert not torch.equal(mixed[bias], dense[bias])
    report = prune(folders / "opt", tmp_path / "half", FREE.format(", differences=0.5"), IDS, **OPTIONS)
    assert report["blocks"][0]["relative_error"] < 1


def test_a_killed_run_continues_to_the_same_bytes(folders, tmp_path):
    expression = FREE.format(", differences=0.3, sensitivities=True")
    prune(folders / "llama", tmp_path / "out", expression, IDS, **OPTIONS)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for name in [*(shard.name for shard in shards[2:]), "config.json", "report.json"]:
        (tmp_path / "cut" / name).unlink()
    prune(folders / "llama", tmp_path / "cut", expression, IDS, **OPTIONS)
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes(), shard.name


def test_refusals():
    for options in ("differences=2", 'pairs="none"', "sensitivities=1"):
        with pytest.raises(UsageError):
            parse_method(f"graft({options})")
