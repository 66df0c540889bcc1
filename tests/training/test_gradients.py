"""Gradients one linear at a time are those of a plain backward pass through the whole model."""

import pytest
import torch
from families import BLOCKS, save_model, token_ids
from torch.nn.functional import cross_entropy

from budwood.checkpoints.source import open_source
from budwood.errors import RunError
from budwood.models.experts import unfuse
from budwood.models.linears import prunable, read
from budwood.stream.arithmetic import Arithmetic
from budwood.stream.model import Model
from budwood.training.gradients import Sums, accumulate, accumulate_by_block, gradients

WAYS = [accumulate, accumulate_by_block]
KINDS = ("gradient", "magnitude", "square")


def plain_gradients(whole, ids, batch=1):
    """By name of the linear, one gradient [out, in] for every batch of a plain backward pass."""
    unfuse(whole)
    linears = prunable(whole)
    found = {name: [] for name in linears}
    for part in ids.split(batch):
        whole.zero_grad()
        logits = whole(part, use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).backward()
        for name, module in linears.items():
            gradient = module.weight.grad
            found[name].append(torch.zeros_like(read(module)) if gradient is None else read(module, gradient).clone())
    return {name: torch.stack(each) for name, each in found.items()}


def streamed(folder, ids, way, batch=1, arithmetic=None, **options):
    model = Model(open_source(folder), **({"arithmetic": arithmetic} if arithmetic else {}), **options)
    found = {name: [] for name in model.linears}
    way(model, ids, model.linears, lambda name, gradient: found[name].append(gradient.clone()), batch=batch)
    return model, found


def close(found, expected, tolerance=1e-5):
    for name, each in expected.items():
        scale = float(each.abs().max())
        torch.testing.assert_close(found[name].to(each), each, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_every_gradient_is_that_of_a_plain_backward_pass(family, way, tmp_path):
    whole = save_model(family, tmp_path)
    ids = token_ids(3)
    model = Model(open_source(tmp_path))
    sums = Sums(*KINDS)
    way(model, ids, model.linears, sums)
    expected = plain_gradients(whole, ids)
    assert list(expected) == list(model.linears)
    found = {name: sums.take(name, read(module)) for name, module in model.linears.items()}
    close({name: kinds["gradient"] for name, kinds in found.items()}, {n: g.sum(0) for n, g in expected.items()})
    close({name: kinds["magnitude"] for name, kinds in found.items()}, {n: g.abs().sum(0) for n, g in expected.items()})
    close({name: kinds["square"] for name, kinds in found.items()}, {n: g.square().sum(0) for n, g in expected.items()})


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_has_the_gradient_of_its_mean_loss(way, tmp_path):
    whole = save_model("llama", tmp_path)
    ids = token_ids(3)
    _, found = streamed(tmp_path, ids, way, batch=2)
    expected = plain_gradients(whole, ids, batch=2)
    close({name: torch.stack(each) for name, each in found.items()}, expected)


@pytest.mark.parametrize("way", WAYS)
def test_afterwards_there_are_no_weights_and_no_gradients(way, tmp_path):
    save_model("llama", tmp_path)
    ids = token_ids()
    held = []
    model = Model(open_source(tmp_path))

    def fold(name, gradient):
        held.append(sum(parameter.grad is not None for parameter in model.module.parameters()))

    way(model, ids, model.linears, fold)
    assert len(held) == len(ids) * len(model.linears)
    assert not any(held)
    for parameter in model.module.parameters():
        assert parameter.is_meta
        assert not parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_only_the_linears_asked_for_get_gradients(way, tmp_path):
    whole = save_model("llama", tmp_path)
    ids = token_ids()
    model = Model(open_source(tmp_path))
    some = {name: module for name, module in model.linears.items() if ".2." in name and "mlp" in name}
    sums, finished = Sums("gradient"), []
    way(model, ids, some, sums, finished.append)
    assert set(sums.sums) == set(some)
    assert sorted(finished) == list(range(2, BLOCKS))
    expected = plain_gradients(whole, ids)
    close({n: sums.sums[n]["gradient"] for n in some}, {n: expected[n].sum(0) for n in some})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_blocked_attention_change_gradients_by_rounding_only(way, dtype, tmp_path):
    whole = save_model("llama", tmp_path)
    ids = token_ids()
    expected = plain_gradients(whole, ids)
    _, found = streamed(tmp_path, ids, way, arithmetic=Arithmetic(dtype, blocked_attention=dtype == torch.bfloat16))
    for name, each in expected.items():
        assert float((torch.stack(found[name]) - each).norm() / each.norm()) < 0.1, name


@pytest.mark.parametrize("way", WAYS)
def test_blocked_attention_has_the_same_gradients(way, tmp_path):
    whole = save_model("llama", tmp_path)
    ids = token_ids()
    _, found = streamed(tmp_path, ids, way, arithmetic=Arithmetic(torch.float32, blocked_attention=True))
    close({name: torch.stack(each) for name, each in found.items()}, plain_gradients(whole, ids))


def test_block_inputs_may_be_kept_in_files(tmp_path):
    whole = save_model("llama", tmp_path / "model")
    ids = token_ids()
    _, found = streamed(tmp_path / "model", ids, accumulate_by_block, activation_limit=0, scratch=tmp_path)
    close({name: torch.stack(each) for name, each in found.items()}, plain_gradients(whole, ids))


@pytest.mark.parametrize(
    ("windows", "memory", "resident"), [(3, 1 << 40, False), (3, 1000, False), (80, 1 << 40, True), (80, 1000, False)]
)
def test_the_way_follows_windows_and_memory(windows, memory, resident, tmp_path, monkeypatch):
    """By block where that takes less, or where the weights do not fit."""
    save_model("llama", tmp_path)
    monkeypatch.setattr("budwood.training.gradients.memory_of", lambda device: memory)
    model, sums, finished = Model(open_source(tmp_path)), Sums("gradient"), []
    gradients(model, token_ids(windows), model.linears, sums, finished.append)
    assert finished == (list(range(BLOCKS)) if resident else list(reversed(range(BLOCKS))))
    assert set(sums.sums) == set(model.linears)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_not_finite_is_refused(way, tmp_path):
    save_model("llama", tmp_path, change=lambda model: model.model.norm.weight.data.fill_(float("inf")))
    with pytest.raises(RunError, match="loss of a calibration window"):
        streamed(tmp_path, token_ids(), way)


def test_a_resident_model_computes_the_logits_of_the_whole_model(tmp_path):
    whole = save_model("mixtral", tmp_path)
    ids = token_ids()
    model = Model(open_source(tmp_path))
    with model.resident(), torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, whole(ids).logits)
    assert all(parameter.is_meta for parameter in model.module.parameters())
