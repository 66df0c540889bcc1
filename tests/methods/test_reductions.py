"""Methods that remove whole experts or blocks: what is left is the same model, and an ordinary one."""

import json

import pytest
import torch
from families import BLOCKS, MOE, build, save_model, token_ids
from plain import logits_without_budwood
from transformers import AutoConfig, AutoModelForCausalLM

from budwood.checkpoints import reader
from budwood.checkpoints import reduction as checkpoints_reduction
from budwood.checkpoints.meta_model import read_config
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.work import Work
from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import evaluate
from budwood.methods import drop_blocks, parse_method, reap, reduced_step
from budwood.methods.drop_blocks import DropBlocks
from budwood.models.experts import ExpertLinears
from budwood.planning import plan
from budwood.pruning import prune
from budwood.sparsity.experts import SCORES
from budwood.stream.model import Model

IDS = token_ids(1, 400) % 90 + 3
TEXT = token_ids(1, 30) % 90 + 3
CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
MIXTURES = (*MOE, "deepseek_v3")


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def logits(model, ids=TEXT):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def loaded(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def names(folder):
    return set(reader.Shards.of_folder(folder).names())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of every family that is asked for, made once."""
    made = {}

    def source(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(name, made[name])
        return made[name]

    return source


@pytest.mark.parametrize("name", MIXTURES)
def test_fewer_experts_are_an_ordinary_model(sources, tmp_path, name):
    """The names of the source, the bytes of the plan, the logits of the whole model without the removed experts."""
    source = sources(name)
    report = prune(source, tmp_path / "out", "reap()", IDS, **CALIBRATION)
    assert not report["needs_budwood"]
    assert sorted(file.name for file in (tmp_path / "out").glob("model*"))[-1] == "model.safetensors.index.json"
    planned = plan(source, "reap()")
    assert planned["bytes_after"] == report["totals"]["bytes"] < planned["bytes_dense"]
    assert planned["parameters"] == report["totals"]["parameters"]
    small, whole = loaded(tmp_path / "out"), loaded(source)
    assert planned["parameters_after"] == sum(parameter.numel() for parameter in small.parameters())
    assert names(tmp_path / "out") < names(source) or name == "gpt_oss"  # which has all experts in one tensor
    found = logits_without_budwood(tmp_path / "out", TEXT, tmp_path / "logits")
    torch.testing.assert_close(found, logits(small), rtol=1e-5, atol=1e-5)
    keep_experts(whole, small)
    torch.testing.assert_close(found, logits(whole), rtol=1e-4, atol=1e-4)
    streamed = evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=3, stream=True)
    assert streamed["losses"] == pytest.approx(evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=3)["losses"])


def keep_experts(whole, small):
    """Makes the router of `whole` choose among the experts that `small` has, which are found by their weights."""
    for layer, other in zip(whole.model.layers, small.model.layers, strict=True):
        if not hasattr(layer.mlp, "experts"):
            continue
        down = layer.mlp.experts.down_proj.detach()
        kept = [next(i for i, e in enumerate(down) if torch.equal(e, expert)) for expert in other.mlp.experts.down_proj]
        assert kept == sorted(kept)
        router = getattr(layer.mlp, "gate", None) or layer.mlp.router
        gone = [index for index in range(len(down)) if index not in kept]
        assert torch.equal(
            (other.mlp.gate if hasattr(other.mlp, "gate") else other.mlp.router).weight, router.weight[kept]
        )
        forward = type(router).forward

        def masked(hidden, router=router, gone=gone, forward=forward):
            linear = torch.nn.functional.linear

            def product(*args, **kwargs):
                return linear(*args, **kwargs).index_fill(-1, torch.tensor(gone), -torch.inf)

            torch.nn.functional.linear = product
            try:
                return forward(router, hidden)
            finally:
                torch.nn.functional.linear = linear

        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[gone] = -torch.inf
        router.forward = masked


def test_grouped_experts_stay_in_equal_numbers(sources, tmp_path):
    prune(sources("deepseek_v3"), tmp_path / "out", "reap(keep=4)", IDS, **CALIBRATION)
    whole, small = loaded(sources("deepseek_v3")), loaded(tmp_path / "out")
    for layer, other in list(zip(whole.model.layers, small.model.layers, strict=True))[1:]:
        down = layer.mlp.experts.down_proj.detach()
        kept = [next(i for i, e in enumerate(down) if torch.equal(e, expert)) for expert in other.mlp.experts.down_proj]
        assert sum(index < 4 for index in kept) == 2
        assert torch.equal(other.mlp.gate.e_score_correction_bias, layer.mlp.gate.e_score_correction_bias[kept])
        assert torch.equal(other.mlp.shared_experts.up_proj.weight, layer.mlp.shared_experts.up_proj.weight)
    assert torch.equal(whole.model.layers[0].mlp.up_proj.weight, small.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("score", SCORES)
def test_the_experts_of_the_lowest_scores_go(sources, tmp_path, score):
    """Scores computed from the fused module's own call: the weights and the outputs that really reach a token."""
    source = sources("qwen3_moe")
    report = prune(source, tmp_path / "out", f'reap(keep=3, score="{score}")', IDS, **CALIBRATION)
    whole, small = loaded(source), loaded(tmp_path / "out")
    from budwood.checkpoints.tokenizer import load_tokenizer
    from budwood.data.windows import calibration_windows

    ids = calibration_windows(IDS, load_tokenizer(source), num_samples=4, seq_length=24).ids
    calls = []
    for layer in whole.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: calls.append((module, *args)))
    logits(whole, ids)
    for (module, hidden, chosen, weights), layer in zip(calls, small.model.layers, strict=True):
        values = []
        for expert in range(4):
            gate, up = (hidden @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            lengths = (module.act_fn(gate) * up @ module.down_proj[expert].T).double().norm(dim=-1)
            tokens, place = torch.where(chosen == expert)
            lengths, gates = lengths[tokens], weights[tokens, place].double()
            values.append(
                {
                    "reap": (gates * lengths).mean(),
                    "ean": lengths.sum(),
                    "frequency": torch.tensor(float(len(tokens))),
                    "man": lengths.mean(),
                    "msan": lengths.square().mean(),
                }[score].item()
            )
        gone = min(range(4), key=lambda expert: (values[expert], -expert))
        kept = [expert for expert in range(4) if expert != gone]
        assert torch.equal(layer.mlp.experts.down_proj, module.down_proj[kept])
    assert report["notes"][-1].startswith("3 of 4 experts stay in each of 4 layers")


@pytest.mark.parametrize("keep", ["1.0", "4"])
def test_all_experts_kept_change_nothing(sources, tmp_path, keep):
    prune(sources("mixtral"), tmp_path / "out", f"reap(keep={keep})", IDS, **CALIBRATION)
    before, after = loaded(sources("mixtral")).state_dict(), loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert names(tmp_path / "out") == names(sources("mixtral"))


def test_permuted_experts_permute_what_stays(tmp_path):
    order = torch.tensor([2, 0, 3, 1])

    def permute(model):
        for layer in model.model.layers:
            for tensor in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                tensor.data = tensor.data[order].clone()

    save_model("mixtral", tmp_path / "one")
    save_model("mixtral", tmp_path / "other", change=permute)
    kept = []
    for name in ("one", "other"):
        prune(tmp_path / name, tmp_path / f"{name}-out", "reap()", IDS, **CALIBRATION)
        experts = [layer.mlp.experts.down_proj for layer in loaded(tmp_path / f"{name}-out").model.layers]
        kept.append([{tuple(expert.flatten().tolist()) for expert in layer} for layer in experts])
    assert kept[0] == kept[1]


def starve(model):
    """Sends no token to expert 3. A logit is one feature, so that fewer rows do not round it differently."""
    for layer in model.model.layers:
        router = layer.mlp.router
        router.weight.data = torch.eye(*router.weight.shape)
        router.bias.data[3] = -1e4


def test_an_expert_without_tokens_is_noted_and_leaves_the_logits_as_they_are(tmp_path):
    """Bit for bit in a family whose gates are a softmax over the chosen experts alone."""
    save_model("gpt_oss", tmp_path / "in", change=starve)
    report = prune(tmp_path / "in", tmp_path / "out", "reap(keep=3)", IDS, **CALIBRATION)
    unreached, rest = report["notes"][-1].split(" ", 1)
    assert int(unreached) >= BLOCKS
    assert rest == "of 16 experts got no calibration token; they are the first to go"
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "in")))


@pytest.mark.parametrize(
    ("name", "expression", "message"),
    [
        ("mixtral", "reap(keep=1)", "leaves 1 of 4 experts, and .* routes every token to 2; keep 2 to 4"),
        ("mixtral", "reap(keep=0.2)", "leaves 1 of 4"),
        ("mixtral", "reap(keep=5)", "leaves 5 of 4"),
        ("llama", "reap()", "removes experts, and LlamaForCausalLM has none"),
        ("deepseek_v3", "reap(keep=5)", "cannot divide into its 2 groups"),
        ("deepseek_v3", "reap(keep=2)", "too few experts for the router"),  # which adds up two scores of each group
        ("llama", "drop_blocks(count=4)", "removes 4 of 4 blocks; remove 1 to 3"),
        ("llama", "drop_blocks(drop=0.1)", "removes 0 of 4 blocks"),
        ("llama", "drop_blocks(count=3, protect=(0, -1))", "no 3 blocks of 4 are not protected"),
        ("llama", "drop_blocks(count=2, protect=(1,), consecutive=True, drop=0.5)", None),
        ("llama", "drop_blocks(count=2, protect=(1, 2), consecutive=True)", "no 2 blocks of 4 are in one run"),
        ("llama", "drop_blocks(protect=(4,))", "protects block 4, and LlamaForCausalLM has 4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(sources, tmp_path, name, expression, message):
    if message is None:
        plan(sources(name), expression)
        return
    for verb in (plan, lambda source, method: prune(source, tmp_path / "out", method, IDS, **CALIBRATION)):
        with pytest.raises(UsageError, match=message):
            verb(sources(name), expression)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["keep=0.0", "keep=1.5", "keep=0", "keep=True", 'score="gate"', "keep_super=1"])
def test_bad_options_of_reap(option):
    with pytest.raises(UsageError):
        parse_method(f"reap({option})")


@pytest.mark.parametrize("option", ["drop=2", "count=0", "count=1.5", "protect=0", "consecutive=1"])
def test_bad_options_of_drop_blocks(option):
    with pytest.raises(UsageError):
        parse_method(f"drop_blocks({option})")
    assert str(parse_method("drop_blocks(count=1, protect=(0, -1))")) == "drop_blocks(count=1, protect=(0, -1))"


DROPPING = ("llama", "gpt2", "opt", "gemma3", "gpt_oss", "deepseek_v3", "phi3", "bloom")


@pytest.mark.parametrize(("name", "gone"), [(name, [0, 2]) for name in DROPPING] + [("llama", [1]), ("gpt_oss", [1])])
def test_fewer_blocks_are_an_ordinary_model(sources, tmp_path, monkeypatch, name, gone):
    """The logits of the whole model with these blocks taken out of its list."""
    monkeypatch.setattr(DropBlocks, "removed", lambda *_: gone)
    method = f"drop_blocks(count={len(gone)})"
    report = prune(sources(name), tmp_path / "out", method, IDS, **CALIBRATION)
    small = loaded(tmp_path / "out")
    assert not report["needs_budwood"]
    assert len(report["blocks"]) == BLOCKS - len(gone)
    planned = plan(sources(name), method)
    assert planned["bytes_after"] == report["totals"]["bytes"]
    assert planned["parameters"] == report["totals"]["parameters"]
    whole = loaded(sources(name))
    path = ModelStructure(read_config(sources(name))).path
    blocks = whole.get_submodule(path)
    kept = [block for index, block in enumerate(blocks) if index not in gone]
    owner, _, attribute = path.rpartition(".")
    setattr(whole.get_submodule(owner), attribute, torch.nn.ModuleList(kept))
    for config in (whole.config, whole.get_submodule(owner).config):  # which the forward passes read
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        for key in ("num_hidden_layers", "layer_types"):
            if key in fields:
                setattr(config, key, fields[key])
    expected = logits(whole)
    assert torch.equal(logits(small), expected)
    assert torch.equal(logits_without_budwood(tmp_path / "out", TEXT, tmp_path / "logits"), expected)


def test_generation_with_a_cache(sources, tmp_path):
    prune(sources("gemma3"), tmp_path / "out", "drop_blocks(count=2)", IDS, **CALIBRATION)
    model = loaded(tmp_path / "out")
    options = {"max_new_tokens": 12, "do_sample": False}
    cached, plain = (model.generate(TEXT[:, :5], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_blocks_that_turn_the_hidden_states_least_go(sources, tmp_path):
    """Scores of single blocks, and of runs of them, from the model's own hidden states."""
    source = sources("llama")
    model, whole = Model(open_source(source)), loaded(source)
    ids = IDS[0, :360].view(15, 24)
    states = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in whole.model.layers]
    hooks.append(whole.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    logits(whole, ids)
    for span in (1, 2, 3):
        expected = [
            1 - torch.cosine_similarity(states[i].double(), states[i + span].double(), dim=-1).mean().item()
            for i in range(BLOCKS + 1 - span)
        ]
        assert drop_blocks.survey(model, ids, span) == pytest.approx(expected, rel=1e-5)


def test_a_run_of_blocks_is_scored_on_evenly_spaced_tokens(sources, monkeypatch):
    model, ids = Model(open_source(sources("llama"))), IDS[0, :360].view(15, 24)
    whole = drop_blocks.survey(model, ids, 2)
    monkeypatch.setattr(drop_blocks, "SAMPLED", 90)
    assert drop_blocks.survey(model, ids, 2) == pytest.approx(whole, rel=0.1)
    assert drop_blocks.survey(model, ids, 2) != whole


@pytest.mark.parametrize(
    ("name", "expression", "module"), [("mixtral", "reap()", reap), ("llama", "drop_blocks(count=1)", drop_blocks)]
)
@pytest.mark.parametrize("at", ["survey", "second block", "last block"])
def test_killed_anywhere_it_ends_with_the_same_bytes(sources, tmp_path, monkeypatch, name, expression, module, at):
    prune(sources(name), tmp_path / "whole", expression, IDS, **CALIBRATION)
    survey, call, surveys, blocks = module.survey, reduced_step.ReducedStep.__call__, [], []

    def counted(model, *args):
        surveys.append(1)
        if at == "survey" and len(surveys) == 1:
            stream = model.survey(args[0], "survey")
            next(stream), next(stream)
            raise KeyboardInterrupt
        return survey(model, *args)

    def failing(self, block):
        blocks.append(block.index)
        if blocks == ([0, 1] if at == "second block" else list(range(len(blocks)))) and (
            at == "second block" or (at == "last block" and block.index == len(self.kept.blocks) - 1)
        ):
            raise KeyboardInterrupt
        call(self, block)

    monkeypatch.setattr(module, "survey", counted)
    monkeypatch.setattr(reduced_step.ReducedStep, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        prune(sources(name), tmp_path / "cut", expression, IDS, **CALIBRATION)
    report = prune(sources(name), tmp_path / "cut", expression, IDS, **CALIBRATION)
    assert len(surveys) == (2 if at == "survey" else 1)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["totals"] == whole["totals"]
    assert report["notes"][-1] == whole["notes"][-1]
    assert not [file for file in (tmp_path / "cut").iterdir() if file.is_dir()]


@pytest.mark.parametrize(("name", "expression"), [("mixtral", "reap()"), ("llama", "drop_blocks(count=2)")])
def test_one_forward_pass_and_no_second(sources, tmp_path, monkeypatch, name, expression):
    tokens, forward = [], Model.embed

    def counted(self, windows, batch=None):
        tokens.append(windows.numel())
        return forward(self, windows, batch)

    monkeypatch.setattr(Model, "embed", counted)
    prune(sources(name), tmp_path / "out", expression, IDS, **CALIBRATION)
    assert [count for count in tokens if count == 4 * 24] == [4 * 24]  # the others try a single window


def test_a_configuration_that_hides_a_difference_is_found(sources, tmp_path, monkeypatch):
    """A block that computes something else in the reduced model is an error, and names the block."""
    with_blocks = checkpoints_reduction.with_blocks

    def wrong(trial, *args):
        found = with_blocks(trial, *args)
        return found.changed(rms_norm_eps=0.5)

    monkeypatch.setattr(checkpoints_reduction, "with_blocks", wrong)
    with pytest.raises(RunError, match=r"model\.layers\.\d computes something else as model\.layers\.0"):
        prune(sources("llama"), tmp_path / "out", "drop_blocks(count=1)", IDS, **CALIBRATION)


def test_the_names_of_the_published_configuration_are_kept(tmp_path):
    """Published configurations may use another name for a number than the class of today."""
    save_model("qwen3_moe", tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    content = json.loads(file.read_text())
    content["num_experts"] = content.pop("num_local_experts")
    file.write_text(json.dumps(content))
    prune(tmp_path / "in", tmp_path / "out", "reap()", IDS, **CALIBRATION)
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert changed["num_experts"] == 2
    assert "num_local_experts" not in changed
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts == 2


@pytest.mark.parametrize("expression", ["reap()", "drop_blocks(count=2)"])
def test_bfloat16_and_pruned_again(sources, tmp_path, expression):
    """The result can be pruned by any other method; and a packed model can be reduced."""
    source = sources("qwen3_moe")
    prune(source, tmp_path / "small", expression, IDS, dtype="bfloat16", **CALIBRATION)
    assert loaded(tmp_path / "small").dtype == torch.bfloat16
    report = prune(tmp_path / "small", tmp_path / "both", 'wanda("2:4")', IDS, **CALIBRATION)
    assert report["totals"]["density"] == 0.5
    prune(source, tmp_path / "packed", 'wanda("2:4")', IDS, **CALIBRATION)
    report = prune(tmp_path / "packed", tmp_path / "last", expression, IDS, **CALIBRATION)
    assert {matrix["density"] for matrix in report["linears"].values()} == {0.5}
    again = loaded(tmp_path / "last")
    whole = build("qwen3_moe")
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in whole.parameters())


def test_observers_are_removed_after_a_survey(sources):
    model = Model(open_source(sources("mixtral")))
    found = reap.survey(model, IDS[0, :48].view(2, 24))
    assert {tuple(sums.shape) for sums in found.values()} == {(5, 4)}
    assert all(int(sums[0].sum()) == 48 * 2 for sums in found.values())
    assert all(m.observer is None for m in model.module.modules() if isinstance(m, ExpertLinears))


def test_work_is_shared_by_settings_of_the_same_survey(sources, tmp_path):
    """The sums of one pass serve all scores."""
    model, work = Model(open_source(sources("mixtral"))), Work(tmp_path / "work")
    ids = IDS[0, :48].view(2, 24)
    kept = [parse_method(f'reap(score="{score}")').prepare(model, ids, work).kept for score in SCORES]
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert all(len(experts) == 2 for one in kept for experts in one.experts.values())


@pytest.mark.parametrize("name", ["refit({})", "matched({}, steps=1)", "sparsegpt(mask={})", "sds({})"])
def test_methods_on_whole_blocks_refuse_to_contain_a_reduction(sources, tmp_path, name):
    with pytest.raises(UsageError):
        prune(sources("llama"), tmp_path / "out", name.format("drop_blocks(count=1)"), IDS, **CALIBRATION)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["refit({})", "sparsegpt(mask={})", "sds({})"])
def test_methods_on_masks_refuse_to_contain_one_that_cuts(sources, tmp_path, name):
    with pytest.raises(UsageError, match="magnitude_sp"):
        prune(sources("llama"), tmp_path / "out", name.format("magnitude_sp(drop=0.5)"), IDS, **CALIBRATION)
    assert not (tmp_path / "out").exists()
