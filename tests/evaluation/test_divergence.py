"""Divergence from the dense model: nothing from itself, sums of a direct computation, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import save_model, token_ids
from transformers import AutoModelForCausalLM

from budwood.errors import UsageError
from budwood.evaluation.divergence import gaps, percentile
from budwood.evaluation.evaluate import evaluate
from budwood.evaluation.perplexity import evaluate as perplexity_of
from budwood.evaluation.repetition import repeated
from budwood.pruning import prune
from budwood.reports.result_files import HEADING, read_results
from budwood.reports.results import Divergence, Pair, Perplexity, Repetition

IDS = token_ids(batch=3, tokens=48, seed=4).clamp(max=98)
LENGTH = 24
OPTIONS = {"seq_length": LENGTH}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save_model("llama", folder)
    return str(folder)


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "out"
    prune(dense, folder, 'magnitude("2:4")')
    return str(folder)


@pytest.fixture(scope="module")
def results(dense, pruned):
    return evaluate(pruned, IDS, against=dense, continuations=2, **OPTIONS)


def test_a_model_does_not_diverge_from_itself(dense):
    found = evaluate(dense, IDS, against=dense, continuations=0, **OPTIONS)
    perplexity, divergence, pair = found
    assert set(divergence.kl) == {0.0}
    assert (divergence.kl_mean, divergence.kl_max, divergence.same_top, divergence.ln_ratio) == (0, 0, 1, 0)
    assert (divergence.ln_ratio_error, divergence.dp_rms, pair.difference, pair.p) == (0, 0, 0, 1)
    assert perplexity.perplexity == divergence.dense_perplexity


def test_figures_are_those_of_a_direct_computation(dense, pruned, results):
    windows = IDS.view(-1, LENGTH)
    ours, theirs = (
        torch.log_softmax(AutoModelForCausalLM.from_pretrained(folder).eval()(windows).logits[:, :-1].double(), -1)
        for folder in (pruned, dense)
    )
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    top = ours.argmax(-1) == theirs.argmax(-1)
    next_ = windows[:, 1:, None]
    change = (theirs.gather(-1, next_) - ours.gather(-1, next_)).flatten()
    found = results[1]
    assert isinstance(found, Divergence)
    assert found.tokens == kl.numel()
    assert list(found.kl) == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert list(found.top) == pytest.approx(top.double().mean(1).tolist())
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_median == pytest.approx(kl.flatten().quantile(0.5).item(), rel=1e-4)
    assert found.kl_999 == pytest.approx(kl.flatten().quantile(0.999).item(), rel=1e-4)
    assert found.ln_ratio == pytest.approx(change.mean().item(), rel=1e-4)
    assert found.ln_ratio_error == pytest.approx((change.std() / math.sqrt(len(change))).item(), rel=1e-4)


def test_the_ratio_is_the_difference_of_the_mean_losses(dense, pruned, results):
    ours, theirs = (perplexity_of(folder, IDS, **OPTIONS) for folder in (pruned, dense))
    perplexity, divergence, pair, _ = results
    assert list(perplexity.losses) == ours["losses"]
    assert list(divergence.dense_losses) == theirs["losses"]
    assert divergence.ln_ratio == pytest.approx(ours["mean_loss"] - theirs["mean_loss"], abs=1e-12)
    assert divergence.ln_ratio == pytest.approx(math.log(ours["perplexity"] / theirs["perplexity"]))
    assert pair.difference == pytest.approx(divergence.ln_ratio)
    assert divergence.text.sha256 == ours["data"]["sha256"] == pair.sha256


def test_streamed_and_in_memory_agree(dense, pruned, results):
    streamed = evaluate(pruned, IDS, against=dense, stream=True, **OPTIONS)
    assert [type(result) for result in streamed] == [Perplexity, Divergence, Pair]
    assert streamed[0].losses == results[0].losses
    assert streamed[1].kl == pytest.approx(results[1].kl)


def test_repetition_is_measured_beside_dense(results):
    found = results[3]
    assert isinstance(found, Repetition)
    assert len(found.shares) == len(found.dense_shares) == 2
    assert (found.text.windows, found.text.seq_length, found.new_tokens) == (2, 32, 32)
    assert 0 <= found.share <= 1


@pytest.mark.parametrize(("tokens", "share"), [("abcdefgh", 0.0), ("aaaaaaa", 0.75), ("abcdabcd", 0.2), ("abc", 0.0)])
def test_repeated_grams(tokens, share):
    assert repeated(list(map(ord, tokens))) == pytest.approx(share)


def test_results_are_kept_in_report_and_card(pruned, results):
    folder = Path(pruned)
    assert [result.kind for result in read_results(folder)] == [result.kind for result in results]
    again = evaluate(pruned, IDS, **OPTIONS)  # the newest of a kind stays
    kept = read_results(folder)
    assert [result.kind for result in kept] == [result.kind for result in results]
    assert kept[0] == again[0]
    card = (folder / "README.md").read_text()
    assert card.count(HEADING) == 1
    assert f"{again[0].perplexity:.4f}" in card


def test_several_texts_at_once(dense, tmp_path):
    (tmp_path / "a.txt").write_text("a b c " * 40)
    (tmp_path / "b.txt").write_text("xyz, " * 40)
    found = evaluate(dense, f"first={tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", limit=2, **OPTIONS)
    assert [result.text.name for result in found] == ["first", str(tmp_path / "b.txt")]
    alone = evaluate(dense, tmp_path / "b.txt", limit=2, **OPTIONS)
    assert found[1].losses == alone[0].losses


def test_other_vocabularies_and_tokens_are_refused(dense, tmp_path):
    from families import build

    smaller = build("llama")
    smaller.resize_token_embeddings(120)
    smaller.save_pretrained(tmp_path / "smaller")
    with pytest.raises(UsageError, match="different vocabularies cannot be compared"):
        evaluate(dense, IDS, against=str(tmp_path / "smaller"), continuations=0, **OPTIONS)
    save_model("llama", tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    settings["post_processor"] = None  # no start token
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"makes other tokens of .* than that of the model"):
        evaluate(dense, ["a b c " * 20], against=str(tmp_path / "other"), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "nothing to measure"),
        ({"tasks": ["piqa"], "stream": True}, "--tasks needs the whole model in memory"),
        ({"data": IDS, "continuations": 3, "stream": True}, "--continuations needs the whole model"),
        ({"tasks": ["piqa"], "continuations": 3}, "--continuations needs a text"),
    ],
)
def test_what_cannot_be_is_refused(options, reason):
    with pytest.raises(UsageError, match=reason):
        evaluate("no-such-model", **options)


def test_gaps_of_a_worked_example():
    """Two tokens of a vocabulary of two: fair against three to one."""
    fair, uneven = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0]] * 2)
    found = gaps(uneven, fair, torch.tensor([0, 1]))
    assert found.kl.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)] * 2)
    assert found.loss.tolist() == pytest.approx([math.log(0.5 / 0.75), math.log(0.5 / 0.25)])
    assert found.probability.tolist() == pytest.approx([0.25, -0.25])
    assert percentile(torch.tensor([0.0, 1.0, 2.0, 4.0]), 0.5) == 1.5
