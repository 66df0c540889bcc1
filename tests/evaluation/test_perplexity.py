"""Perplexity against a direct computation with transformers."""

import math

import pytest
import torch
from families import save_model, tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import evaluate
from budwood.evaluation.subject import context, window_loss
from budwood.kernels import native
from budwood.pruning import prune

TEXTS = ["".join(chr(97 + (i * i + i // 7) % 26) for i in range(200)), "".join(chr(97 + i % 17) for i in range(90))]
LENGTH = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def direct(folder, ids):
    """Loss of every window of ids [windows, tokens] by transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(window[None], labels=window[None]).loss.item() for window in ids]


def cut(text, special):
    ids = torch.tensor(tokenizer()(text, add_special_tokens=special)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("variant", ["plain", "gptq"])
@pytest.mark.parametrize("bos", ["auto", "none"])
def test_it_is_the_exponential_of_the_mean_loss(llama, stream, variant, bos):
    ids = cut("\n\n".join(TEXTS), special=bos == "auto")
    found = evaluate(str(llama), TEXTS, variant=variant, seq_length=LENGTH, bos=bos, stream=stream)
    expected = direct(llama, ids)
    assert found["losses"] == pytest.approx(expected, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-6)
    assert found["mean_loss"] == pytest.approx(math.log(found["perplexity"]))
    assert (found["windows"], found["tokens"], found["seq_length"]) == (len(ids), ids.numel(), LENGTH)
    assert (found["variant"], found["bos"], found["streamed"], found["dtype"]) == (variant, bos, stream, "float32")


def test_every_window_may_begin_with_the_start_token(llama):
    found = evaluate(str(llama), TEXTS, seq_length=LENGTH, bos="every", limit=2)
    text = torch.tensor(tokenizer()("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"])
    ids = torch.stack([torch.cat([torch.ones(1, dtype=torch.int64), part]) for part in text[:46].view(2, 23)])
    assert found["losses"] == pytest.approx(direct(llama, ids), rel=1e-6)


def test_random_windows_depend_on_the_seed_only(llama):
    options = {"variant": "c4-random", "seq_length": LENGTH, "limit": 3}
    first, again, other = (evaluate(str(llama), TEXTS, seed=seed, **options)["losses"] for seed in (0, 0, 1))
    assert len(first) == 3
    assert first == again != other


def test_the_context_of_the_model_bounds_the_windows(llama):
    found = evaluate(str(llama), TEXTS, seq_length=4096)
    assert found["seq_length"] == 64 == context(AutoModelForCausalLM.from_pretrained(llama).config)


@pytest.mark.parametrize("stream", [False, True])
def test_another_dtype_is_used_and_named(llama, stream):
    found = evaluate(str(llama), TEXTS, seq_length=LENGTH, limit=2, dtype="bfloat16", stream=stream)
    plain = evaluate(str(llama), TEXTS, seq_length=LENGTH, limit=2)
    assert found["dtype"] == "bfloat16"
    assert found["losses"] != plain["losses"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=0.02)
    with pytest.raises(UsageError, match="no such dtype"):
        evaluate(str(llama), TEXTS, seq_length=LENGTH, dtype="float31")


def test_kernels_do_not_change_a_perplexity(llama, tmp_path, monkeypatch):
    """Of a pruned folder: products are torch's, whatever kernels there are, resident and streamed."""
    prune(llama, tmp_path / "out", 'magnitude("2:4")')
    losses = []
    for kernels in ("reference", "auto"):
        if kernels == "auto" and native.file() is None:
            continue
        monkeypatch.setenv(native.VARIABLE, kernels)
        losses += [
            evaluate(str(tmp_path / "out"), TEXTS, seq_length=LENGTH, stream=stream)["losses"]
            for stream in (False, True)
        ]
    assert all(found == losses[0] for found in losses)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [(False, "the loss of window 2 is not finite"), (True, r"outputs of model\.layers\.0 hold NaN or infinite values")],
)
def test_a_loss_that_is_not_finite_is_refused(tmp_path, stream, reason):
    """The third window holds a letter whose embedding is NaN."""
    letter = tokenizer().convert_tokens_to_ids("z")
    save_model(
        "llama", tmp_path, change=lambda model: model.get_input_embeddings().weight.data[letter].fill_(torch.nan)
    )
    texts = ["a" * LENGTH * 2 + "z" * LENGTH]
    with pytest.raises(RunError, match=reason):
        evaluate(str(tmp_path), texts, seq_length=LENGTH, bos="none", stream=stream)
    assert evaluate(str(tmp_path), texts, seq_length=LENGTH, bos="none", limit=2, stream=stream)["windows"] == 2


def test_the_loss_of_a_window_is_that_of_its_tokens_but_the_first():
    logits, ids = torch.randn(1, 5, 7), torch.arange(5)[None]
    expected = sum(cross_entropy(logits[0, i], ids[0, i + 1]).item() for i in range(4)) / 4
    assert window_loss(logits, ids) == pytest.approx(expected)
