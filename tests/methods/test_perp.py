"""perp: zeros and sizes of before, the same bytes after interruptions, any family, sliced and rounded models."""

import json
from functools import cache

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM

from budwood.errors import UsageError
from budwood.evaluation.perplexity import evaluate
from budwood.inspection import inspect
from budwood.methods import parse_method
from budwood.methods.perp import Perp
from budwood.models.linears import prunable, read
from budwood.planning import plan
from budwood.pruning import prune
from budwood.training import recovery
from budwood.training.adapters import ADAPTERS

IDS = (torch.arange(600) ** 2 // 5 % 23 + 30)[None]  # what a model can learn
CALIBRATION = {
    "num_samples": 12,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
QUICK = "rank=4, steps=10, batch=4, rate=0.01"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name, **options):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(name, made[name], **options)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def llama(folders):
    return folders("llama")


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """What a method gives without the training, by family: folder and report."""

    @cache
    def of(name, method):
        folder = tmp_path_factory.mktemp("alone")
        return folder, prune(folders(name), folder, method, IDS, **CALIBRATION)

    return of


def weights(folder):
    """The prunable matrices [out, in], and all other tensors, as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "hf_quantizer"):
        model = model.dequantize()
    matrices = {name: read(linear).detach() for name, linear in prunable(model).items()}
    own = {f"{name}.weight" for name in matrices}
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    return matrices, others


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def compared(pruned, trained):
    """Asserts that zeros are where they were; returns the names of the tensors that changed."""
    before, after = weights(pruned), weights(trained)
    for name, weight in after[0].items():
        assert torch.equal(weight != 0, before[0][name] != 0), name
        assert not torch.signbit(weight[weight == 0]).any()
    changed = {name for name in before[0] if not torch.equal(before[0][name], after[0][name])}
    return changed | {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}


@pytest.mark.parametrize("move", [*ADAPTERS, "norms", "biases+norms+masklora", "embeddings+norms", "head"])
def test_only_what_moves_changes_and_the_size_stays(llama, alone, tmp_path, move):
    folder, plain = alone("llama", 'magnitude("50%")')
    text = f'perp(magnitude("50%"), move="{move}", {QUICK})'
    report = prune(llama, tmp_path / "out", text, IDS, **CALIBRATION)
    changed = compared(folder, tmp_path / "out")
    assert report["totals"] == plain["totals"]
    sizes = [{name: matrix | {"change": None} for name, matrix in each["linears"].items()} for each in (plain, report)]
    assert sizes[0] == sizes[1]
    matrices = {name for name in changed if not name.endswith("weight")}
    assert (len(matrices) == 28) == (move in ADAPTERS or "masklora" in move)
    assert any("norm" in name for name in changed) == ("norms" in move)
    assert ("model.norm.weight" in changed) == ("norms" in move)
    assert ("model.embed_tokens.weight" in changed) == ("embeddings" in move)
    assert ("lm_head.weight" in changed) == (move == "head")
    section = report["training"][0]
    losses = [loss for _, loss in section["held_out"]]
    assert section["best_step"] > 0
    assert min(losses) < losses[0]
    test = {"seq_length": 24, "limit": 4}
    resident = evaluate(str(tmp_path / "out"), IDS, **test)
    streamed = evaluate(str(tmp_path / "out"), IDS, stream=True, **test)
    assert streamed["losses"] == pytest.approx(resident["losses"], rel=1e-6)
    assert not inspect(tmp_path / "out")["totals"]["broken"]


@pytest.mark.parametrize("reconstruct", ["none", "block"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2", "qwen3_moe", "gpt_oss"])
def test_any_family(folders, alone, tmp_path, name, reconstruct):
    folder, plain = alone(name, 'magnitude("2:4")')
    text = f'perp(magnitude("2:4"), {QUICK}, reconstruct="{reconstruct}")'
    report = prune(folders(name), tmp_path / "out", text, IDS, **CALIBRATION)
    changed = compared(folder, tmp_path / "out")
    assert report["totals"]["bytes"] == plain["totals"]["bytes"]
    assert any("bias" in name for name in changed) == (name != "qwen3_moe")
    assert any("norm" in name or "ln_" in name for name in changed)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in changed)
    if name == "opt":  # softmax cancels these, so they are not trained
        assert not any(name.endswith("k_proj.bias") for name in changed)
    section = report["training"][0]
    if reconstruct == "block":
        assert len(section["blocks"]) == 4
        assert sum(block["error_after"] < block["error_before"] for block in section["blocks"]) >= 3
    else:
        assert section["best_step"] > 0


@pytest.mark.parametrize("place", ["training", "rewriting", "stream"])
def test_killed_and_continued_it_ends_with_the_same_bytes(llama, tmp_path, monkeypatch, place):
    from budwood.methods import recovery as writing

    text = f'perp(wanda("2:4"), {QUICK})'
    monkeypatch.setattr(recovery.Recovery, "save_every", 3)
    whole = prune(llama, tmp_path / "whole", text, IDS, **CALIBRATION)
    calls = []
    owner, name = {
        "training": (recovery, "slope"),
        "rewriting": (writing, "apply"),
        "stream": (type(parse_method("wanda()")), "__call__"),
    }[place]
    real = getattr(owner, name)

    def failing(*args):
        calls.append(1)
        if len(calls) in (2, 8, 9):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, name, failing)
    interrupted = 0
    for _ in range(5):
        try:
            report = prune(llama, tmp_path / "cut", text, IDS, **CALIBRATION)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == {"training": 3, "rewriting": 1, "stream": 1}[place]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    without_seconds = lambda section: {key: value for key, value in section.items() if key != "seconds"}
    assert without_seconds(report["training"][0]) == without_seconds(whole["training"][0])
    assert not [file for file in (tmp_path / "cut").iterdir() if file.is_dir()]


@pytest.mark.parametrize(
    "text",
    [
        'perp(llm_pruner(0.25), rank=2, steps=6, batch=4, rate=0.001, reconstruct="{}")',
        'perp(perp(magnitude("60%"), rank=2, steps=4, batch=4, reconstruct="{}"), move="norms", steps=4, batch=4)',
    ],
)
@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_sliced_models_and_nesting(llama, tmp_path, text, reconstruct):
    text = text.format(reconstruct)
    inner = "llm_pruner(0.25)" if "llm" in text else 'magnitude("60%")'
    plain = prune(llama, tmp_path / "plain", inner, IDS, **CALIBRATION)
    report = prune(llama, tmp_path / "out", text, IDS, **CALIBRATION)
    assert compared(tmp_path / "plain", tmp_path / "out")
    assert report["totals"]["bytes"] == plain["totals"]["bytes"]
    assert len(report["training"]) == text.count("perp(")
    assert parse_method(str(parse_method(text))) == parse_method(text)


@pytest.mark.parametrize(
    ("name", "inner"), [("llama", "flap(drop=0.25)"), ("llama", "drop_blocks(0.25)"), ("qwen3_moe", "reap(0.5)")]
)
@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_models_that_lose_biases_blocks_or_experts(folders, tmp_path, name, inner, reconstruct):
    dense = folders(name)
    plain = prune(dense, tmp_path / "plain", inner, IDS, **CALIBRATION)
    text = f'perp({inner}, rank=16, steps=6, batch=4, rate=0.001, reconstruct="{reconstruct}")'
    if reconstruct == "block" and "flap" not in inner:
        with pytest.raises(UsageError, match="no outputs of the dense block"):
            prune(dense, tmp_path / "out", text, IDS, **CALIBRATION)
        return
    report = prune(dense, tmp_path / "out", text, IDS, **CALIBRATION)
    assert report["totals"]["bytes"] == plain["totals"]["bytes"]
    assert len(report["blocks"]) == len(plain["blocks"])
    assert compared(tmp_path / "plain", tmp_path / "out")
    assert plan(dense, text)["bytes_after"] == plan(dense, inner)["bytes_after"]


def test_half_precision_and_rounded_values(tmp_path):
    save_model("llama", tmp_path / "dense", dtype=torch.bfloat16)
    for values in (None, "int8"):
        plain = prune(
            tmp_path / "dense", tmp_path / f"plain{values}", 'wanda("2:4")', IDS, values=values, **CALIBRATION
        )
        out = tmp_path / f"out{values}"
        report = prune(tmp_path / "dense", out, f'perp(wanda("2:4"), {QUICK})', IDS, values=values, **CALIBRATION)
        assert report["totals"]["bytes"] == plain["totals"]["bytes"]
        before, after = weights(tmp_path / f"plain{values}")[0], weights(out)[0]
        for name, weight in after.items():
            assert not weight[before[name] == 0].any()
            assert values or torch.equal(weight != 0, before[name] != 0)
        assert report["training"][0]["best_step"] > 0


def test_a_model_without_biases_has_none_to_train(llama, tmp_path):
    with pytest.raises(UsageError, match="has no biases"):
        prune(llama, tmp_path / "out", 'perp(magnitude("2:4"), move="biases")', IDS, **CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_refused_before_anything_is_written(folders, tmp_path):
    with pytest.raises(UsageError, match="tied"):
        prune(folders("qwen2"), tmp_path / "out", 'perp(magnitude("2:4"), move="head")', IDS, **CALIBRATION)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    ["move='all'", "rank=0", "steps=-1", "batch=0", "rate=2", "reconstruct='row'", "move='head', reconstruct='block'"],
)
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        parse_method(f"perp(wanda(), {options})")


@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_nothing_to_gain_is_noted_and_changes_nothing(llama, tmp_path, reconstruct):
    ids = IDS[:, : 12 * 24].clone()
    ids[:, 6 * 24 : 7 * 24] += 40  # the window that is held out has tokens which the others teach to avoid
    steps = "steps=1, rate=0.02" if reconstruct == "none" else "steps=4, rate=1"
    prune(llama, tmp_path / "plain", 'magnitude("2:4")', ids, **CALIBRATION)
    text = f'perp(magnitude("2:4"), move="weights", {steps}, reconstruct="{reconstruct}")'
    report = prune(llama, tmp_path / "out", text, ids, **CALIBRATION)
    assert not compared(tmp_path / "plain", tmp_path / "out")
    assert any("did not fall" in note for note in report["notes"])


def test_steps_of_zero_are_the_inner_method(llama, tmp_path):
    prune(llama, tmp_path / "plain", 'magnitude("2:4")', IDS, **CALIBRATION)
    prune(llama, tmp_path / "out", 'perp(magnitude("2:4"), steps=0)', IDS, **CALIBRATION)
    assert not compared(tmp_path / "plain", tmp_path / "out")


def test_plan_knows_the_bytes_and_the_work(llama, tmp_path):
    method = Perp(parse_method('wanda("2:4")'), rank=4)
    report = prune(llama, tmp_path / "out", 'wanda("2:4")', IDS, **CALIBRATION)
    planned = plan(llama, method)
    assert planned["bytes_after"] == report["totals"]["bytes"]
    assert planned["work_bytes"] > 16 * 4 * 7 * 4 * 32
    assert json.loads((tmp_path / "out" / "report.json").read_text()).get("training") is None
