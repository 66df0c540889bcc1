"""sds on tiny models: what it must keep of its inner method, what it must improve, and its control."""

import json
import math

import pytest
import torch
from families import save_model, token_ids, tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from budwood.errors import UsageError
from budwood.methods import parse_method, sds
from budwood.pruning import prune

OPTIONS = {"compute_dtype": "float32", "sparse_products": "off", "attention": "fused", "format": "dense"}
VOCABULARY, TOKENS, HIDDEN = 64, 32, 64
IDS = token_ids(9) % 90 + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        save_model(family, root / family)
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A random model, and windows that it wrote itself, for which it is the best predictor: no training is needed."""
    config = AutoConfig.for_model(
        "opt",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        dropout=0.0,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                size = (3 if module is model.lm_head else 1.6) / module.in_features**0.5
                module.weight.copy_(size * torch.randn(module.weight.shape, generator=random))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=random))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(0.3 * torch.randn(module.weight.shape, generator=random))
        ids = torch.randint(VOCABULARY, (512, 1), generator=random)
        for _ in range(TOKENS - 1):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1, generator=random)], 1)
    folder = tmp_path_factory.mktemp("corpus")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)  # of more tokens
    return folder, ids[:256], ids[256:]


def perplexity(folder, windows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return math.exp(float(model(windows, labels=windows).loss))


def pruned(source, target, method, windows=IDS, **options):
    return prune(source, target, method, windows, seq_length=windows.shape[1], num_samples=256, **OPTIONS, **options)


def weights(folder):
    names = json.loads((folder / "report.json").read_text())["linears"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    return {name: state[f"{name}.weight"] for name in names if f"{name}.weight" in state}


@pytest.mark.parametrize("inner", ['wanda("2:4")', 'wanda("70%")'])
def test_the_order_of_perplexities_on_a_text_not_seen(corpus, tmp_path, inner):
    folder, windows, test = corpus
    methods = {
        "inner": inner,
        "unadjusted": f"sds({inner}, adjust=None)",
        "refit": f"refit({inner})",
        "sds": f"sds({inner})",
    }
    found = {"dense": perplexity(folder, test)}
    for name, method in methods.items():
        pruned(folder, tmp_path / name, method, windows)
        found[name] = perplexity(tmp_path / name, test)
    assert found["inner"] > found["unadjusted"] > found["refit"]
    assert found["refit"] * 1.02 > found["sds"] > found["dense"]


@pytest.mark.parametrize("inner", ['magnitude("2:4")', 'wanda("50%")', 'sparsegpt("2:4")', "wrp(alpha=0.5)"])
def test_without_its_steps_it_is_the_inner_method(folders, tmp_path, inner):
    pruned(folders / "llama", tmp_path / "inner", inner)
    report = pruned(folders / "llama", tmp_path / "sds", f"sds({inner}, regrow=None, adjust=None)")
    found = weights(tmp_path / "sds")
    for name, weight in weights(tmp_path / "inner").items():
        assert torch.equal(found[name], weight), name
    assert f"after refit({inner})" in " ".join(report["notes"])


@pytest.mark.parametrize("adjust", ["frozen", "dynamic"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("data", ["sparse", "dense"])
def test_the_pattern_and_exact_zeros_remain(folders, tmp_path, adjust, rounds, data):
    method = f'sds(wanda("2:4"), adjust="{adjust}", rounds={rounds}, data="{data}", steps=60)'
    pruned(folders / "llama", tmp_path / "out", method)
    for name, weight in weights(tmp_path / "out").items():
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
        assert not weight[weight == 0].signbit().any()


@pytest.mark.parametrize("inner", ['wanda("2:4")', 'magnitude("50%")'])
def test_the_error_of_the_first_block_is_below_that_of_the_inner_method(corpus, tmp_path, inner):
    folder, windows, _ = corpus
    figures = {}
    for name, method in (("inner", f"sds({inner}, regrow=None, adjust=None)"), ("sds", f"sds({inner})")):
        report = pruned(folder, tmp_path / name, method, windows)
        figures[name] = report["blocks"][0]["relative_error"]
    assert figures["sds"] < 0.9 * figures["inner"]


def test_the_note_names_the_control_and_its_errors(corpus, tmp_path):
    folder, windows, _ = corpus
    (note,) = pruned(folder, tmp_path / "out", 'sds(wanda("2:4"))', windows)["notes"]
    assert "on held-out windows, mean of 2 blocks" in note
    errors = [float(part.split()[-1]) for part in note.replace(" after ", "\n").split("\n")[:3]]
    assert errors[0] > errors[1] > 0
    assert 'after refit(wanda("2:4"))' in note
    assert "the adjustment was kept in 2" in note
    assert "of the second mask is in the first" in note


def test_a_killed_run_continues_to_the_same_bytes_and_the_same_note(folders, tmp_path, monkeypatch):
    method = 'sds(sparsegpt("50%", block=16))'
    whole = pruned(folders / "llama", tmp_path / "whole", method)
    calls, run = [], sds.Cycle.run

    def killed(cycle):
        calls.append(cycle)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(cycle)

    monkeypatch.setattr(sds.Cycle, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(folders / "llama", tmp_path / "cut", method)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
    report = pruned(folders / "llama", tmp_path / "cut", method)
    assert len(calls) == 5  # blocks 1 and 2, the kill, blocks 3 and 4
    for shard in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes(), shard.name
    assert report["notes"] == whole["notes"]


def test_experts_with_few_tokens_stay_as_the_inner_method_made_them(folders, tmp_path):
    inner = 'wanda("2:4")'
    pruned(folders / "mixtral", tmp_path / "inner", inner, IDS[:3])
    report = pruned(folders / "mixtral", tmp_path / "sds", f"sds({inner})", IDS[:3])
    assert f"matrices of experts got too few tokens and were left as {inner} made them" in report["notes"][0]
    alone, found = (first_experts(tmp_path / name) for name in ("inner", "sds"))
    same = [torch.equal(alone[name], found[name]) for name in alone]
    assert any(same)


def first_experts(folder):
    """The fused matrices of the first block, expert by expert."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = {name: tensor for name, tensor in state.items() if "layers.0." in name and "experts" in name}
    return {(name, expert): part for name, tensor in found.items() for expert, part in enumerate(tensor.unbind())}


def test_a_single_window_is_enough(folders, tmp_path):
    report = pruned(folders / "llama", tmp_path / "out", 'sds(wanda("2:4"))', IDS[:1])
    assert math.isfinite(report["blocks"][-1]["relative_error"] or 0)


def test_the_inner_method_gets_all_windows(folders, tmp_path):
    """The first mask of the first block, which refit leaves, is that of the method alone."""
    pruned(folders / "llama", tmp_path / "inner", 'wanda("2:4")')
    pruned(folders / "llama", tmp_path / "sds", 'sds(wanda("2:4"), regrow=None, adjust="frozen")')
    found = weights(tmp_path / "sds")
    for name, weight in weights(tmp_path / "inner").items():
        if "layers.0." in name:
            assert torch.equal(found[name] != 0, weight != 0), name
            assert not torch.equal(found[name], weight)


def test_options_replace_those_of_the_preset():
    method = parse_method('sds(wanda("2:4"), regrow="regularised", growth=7, l2=0.5)')
    assert (method.regrowth.steps, method.regrowth.l1, method.regrowth.l2) == (7, 0.01, 0.5)
    assert method.regrowth.accelerated
    assert parse_method(str(method)) == method
    assert parse_method("sds(wanda(), regrow=None)").regrowth is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sds(3)", "sds needs a method such as"),
        ("sds", "sds needs inner"),
        ('sds(wanda(), regrow="fast")', "regrow must be one of"),
        ('sds(wanda(), adjust="later")', "adjust must be one of"),
        ('sds(wanda(), data="both")', "data must be one of"),
        ("sds(wanda(), steps=0)", "steps must be"),
        ("sds(wanda(), rounds=0)", "rounds must be"),
        ("sds(wanda(), growth=-1)", "growth must be"),
        ("sds(wanda(), rate=1.5)", "rate must be"),
        ("sds(wanda(), l1=-1)", "l1 must be"),
        ("sds(llm_pruner())", "prunes every block twice, which llm_pruner"),
        ("sds(refit(matched(wanda())))", "prunes every block twice, which matched"),
        ("sds(graft(steps=3))", "prunes every block twice, which graft"),
        ("sds(sds(wanda()))", "prunes every block twice, which sds"),
    ],
)
def test_invalid_options_are_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_method(text)


@pytest.mark.parametrize("inner", ["wrp(alpha=0.5)", 'allocate(wanda("50%", scope="matrix"))'])
def test_a_mask_is_not_chosen_anew_where_the_pattern_does_not_give_it(inner):
    method = parse_method(f'sds({inner}, adjust="dynamic")')
    with pytest.raises(UsageError, match=r"fc: the pattern of .* does not say which weights"):
        method.check({"fc": (8, 32)})
    parse_method('sds(wanda("50%"), adjust="dynamic")').check({"fc": (8, 32)})
