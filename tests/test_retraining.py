"""budwood retrain: a pruned folder, its zeros and its format of before, and the same as training after pruning."""

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM

import budwood
from budwood.errors import UsageError
from budwood.evaluation.perplexity import evaluate
from budwood.inspection import inspect
from budwood.models.linears import prunable, read
from budwood.progress import Silent
from budwood.pruning import prune
from budwood.retraining import retrain
from budwood.runs.recipe import read_recipe, recipe_options
from budwood.training import recovery

IDS = (torch.arange(600) ** 2 // 5 % 23 + 30)[None]
WINDOWS = {"num_samples": 12, "seq_length": 24, "compute_dtype": "float32"}
CALIBRATION = {**WINDOWS, "sparse_products": "off", "attention": "fused"}
QUICK = {"rank": 4, "steps": 8, "batch": 4, "rate": 0.01}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def state(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "hf_quantizer"):
        model = model.dequantize()
    return model


def same_zeros(before, after):
    one, other = prunable(state(before)), prunable(state(after))
    for name, linear in other.items():
        assert torch.equal(read(linear) != 0, read(one[name]) != 0), name
    return any(not torch.equal(read(linear), read(one[name])) for name, linear in other.items())


@pytest.mark.parametrize(
    ("method", "layout"),
    [("wrp(alpha=0.5)", layout) for layout in ("auto", "dense", "bitmask", "two_four_csr")]
    + [('wanda("2:4")', "two_four")],
)
def test_zeros_and_format_stay(llama, tmp_path, method, layout):
    pruned = prune(llama, tmp_path / "pruned", method, IDS, format=layout, **CALIBRATION)
    report = retrain(tmp_path / "pruned", tmp_path / "out", IDS, **QUICK, **WINDOWS)
    assert same_zeros(tmp_path / "pruned", tmp_path / "out")
    for key in ("bytes", "density", "recovered", "bits_per_weight"):
        assert report["totals"][key] == pruned["totals"][key]
    assert {name: found["format"] for name, found in report["linears"].items()} == {
        name: found["format"] for name, found in pruned["linears"].items()
    }
    section = report["training"][0]
    assert min(loss for _, loss in section["held_out"]) < section["held_out"][0][1]
    test = {"seq_length": 24, "limit": 4}
    before, after = (evaluate(str(tmp_path / name), IDS, **test) for name in ("pruned", "out"))
    assert after["perplexity"] < before["perplexity"]
    assert evaluate(str(tmp_path / "out"), IDS, stream=True, **test)["losses"] == pytest.approx(
        after["losses"], rel=1e-6
    )
    assert not inspect(tmp_path / "out")["totals"]["broken"]
    ids = state(tmp_path / "out").generate(IDS[:, :8], max_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 12)
    recipe = read_recipe(tmp_path / "out" / "recipe.json")
    assert (recipe.verb, recipe.method, recipe.source["name"]) == ("retrain", method, str(tmp_path / "pruned"))
    assert recipe.training["move"] == "biases+norms+masklora"
    assert recipe.made_from["verb"] == "prune"
    with pytest.raises(UsageError, match="not made by prune"):
        recipe_options(tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Training" in page
    assert "held-out loss" in page


def test_it_is_what_perp_does_after_pruning(llama, tmp_path):
    prune(llama, tmp_path / "pruned", 'wanda("2:4")', IDS, **CALIBRATION)
    retrain(tmp_path / "pruned", tmp_path / "out", IDS, **QUICK, **WINDOWS)
    prune(llama, tmp_path / "perp", 'perp(wanda("2:4"), rank=4, steps=8, batch=4, rate=0.01)', IDS, **CALIBRATION)
    one, other = state(tmp_path / "out").state_dict(), state(tmp_path / "perp").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("fail_at", [1, 4, 7])
def test_killed_and_continued_it_ends_with_the_same_bytes(llama, tmp_path, monkeypatch, fail_at):
    prune(llama, tmp_path / "pruned", 'wanda("2:4")', IDS, **CALIBRATION)
    options = {**QUICK, **WINDOWS, "save_every": 3}
    retrain(tmp_path / "pruned", tmp_path / "whole", IDS, **options)
    real = recovery.slope

    def failing(model, windows, settings, many, step):
        if step == fail_at:
            raise KeyboardInterrupt
        return real(model, windows, settings, many, step)

    monkeypatch.setattr(recovery, "slope", failing)
    with pytest.raises(KeyboardInterrupt):
        retrain(tmp_path / "pruned", tmp_path / "cut", IDS, **options)
    with pytest.raises(UsageError, match="its training is"):
        retrain(tmp_path / "pruned", tmp_path / "cut", IDS, **{**options, "steps": 9})
    steps = []
    monkeypatch.setattr(recovery, "slope", lambda *args: steps.append(args[-1]) or real(*args))
    retrain(tmp_path / "pruned", tmp_path / "cut", IDS, **options)
    assert steps == list(range(fail_at // 3 * 3, 8))
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not [file for file in (tmp_path / "cut").iterdir() if file.is_dir()]
    again = retrain(tmp_path / "pruned", tmp_path / "cut", IDS, **options)  # finished already
    assert again["training"][0]["steps"] == 8


@pytest.mark.parametrize(
    ("name", "method"), [("gpt2", "magnitude"), ("qwen3_moe", "magnitude"), ("llama", "llm_pruner")]
)
def test_other_families_and_sliced_models(tmp_path, name, method):
    save_model(name, tmp_path / "dense")
    expression = 'magnitude("2:4")' if method == "magnitude" else "llm_pruner(0.25)"
    pruned = prune(tmp_path / "dense", tmp_path / "pruned", expression, IDS, **CALIBRATION)
    report = retrain(tmp_path / "pruned", tmp_path / "out", IDS, **{**QUICK, "rate": 0.003}, **WINDOWS)
    assert report["totals"]["bytes"] == pruned["totals"]["bytes"]
    assert same_zeros(tmp_path / "pruned", tmp_path / "out")


def test_rounded_values_and_a_second_retraining(llama, tmp_path):
    pruned = prune(llama, tmp_path / "pruned", 'wanda("2:4")', IDS, values="int8", **CALIBRATION)
    once = retrain(tmp_path / "pruned", tmp_path / "once", IDS, **QUICK, **WINDOWS)
    twice = retrain(tmp_path / "once", tmp_path / "twice", IDS, move="norms", **QUICK, **WINDOWS)
    assert pruned["totals"]["bytes"] == once["totals"]["bytes"] == twice["totals"]["bytes"]
    assert read_recipe(tmp_path / "twice" / "recipe.json").made_from["verb"] == "retrain"


def test_what_cannot_be_is_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="prune it first"):
        retrain(llama, tmp_path / "out", IDS, **WINDOWS)
    prune(llama, tmp_path / "pruned", 'wanda("2:4")', IDS, **CALIBRATION)
    with pytest.raises(UsageError, match="give another folder"):
        retrain(tmp_path / "pruned", tmp_path / "pruned", IDS, **WINDOWS)
    with pytest.raises(UsageError, match="no 'all'"):
        retrain(tmp_path / "pruned", tmp_path / "out", IDS, move="all", **WINDOWS)
    assert not (tmp_path / "out").exists()
    assert budwood.retrain is retrain


def test_progress_gets_every_step_with_its_loss(llama, tmp_path):
    losses = []

    class Listening(Silent):
        def block(self, index, name, seconds, relative_error=None, loss=None):
            if loss is not None:
                losses.append((index, loss))

    prune(llama, tmp_path / "pruned", 'wanda("2:4")', IDS, **CALIBRATION)
    report = retrain(tmp_path / "pruned", tmp_path / "out", IDS, progress=Listening(), **QUICK, **WINDOWS)
    assert [index for index, _ in losses] == list(range(8))
    assert [loss for _, loss in losses] == pytest.approx(report["training"][0]["loss"])
