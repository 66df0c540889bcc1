"""tyr: an exact budget, the same bytes after an interruption anywhere, optimal repairs, a search that helps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import save_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.work import Work
from budwood.errors import UsageError
from budwood.methods.tyr import Tyr
from budwood.planning import plan
from budwood.pruning import prune
from budwood.sparsity.unit_removal import outputs_of, problem_of, remove_units
from budwood.stream.model import Model
from budwood.supernet import divergence, parse_method, supernet, tyr
from budwood.supernet.divergence import Divergence
from budwood.supernet.level_choice import POOL, PRESETS, Size, choose_levels
from budwood.supernet.pruned_copies import Copy, HeldOut, Pruner
from budwood.supernet.sites import Site, even_counts, levels_of, sites_of, spacings
from budwood.supernet.supernet import Supernet, averaged, build

CALIBRATION = {
    "num_samples": 8,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}
IDS = token_ids(1, 400) % 90 + 3
WINDOWS = token_ids(8, 24, seed=5)
TWO_ROUNDS = 'tyr(preset="test", rounds=2, generations=3, tokens=(24, 48, 96))'
SMALL = 'tyr(preset="test", tokens=(24, 48, 96))'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def sites_in(folder):
    return sites_of(ModelStructure(open_source(folder).config).units)


def site(units, kind="mlp", cost=96, block=0):
    return Site(block, kind, ("down",), units, 1, cost)


def supernet_in(folder, work, levels=4, accumulate="expectation", within_layer="joint", pruner=None):
    """A supernet of the first round at one half, built; and the model."""
    model = Model(open_source(folder))
    sites = sites_of(model.structure.units)
    spaced = zip(sites, even_counts(sites, 0.5), spacings(sites, 0), strict=True)
    found = Supernet(Work(work), "net", sites, [levels_of(*each, levels) for each in spaced])
    build(model, WINDOWS, found, pruner or Pruner(), accumulate, within_layer)
    return model, found


def test_shares_that_are_no_whole_units_are_spread():
    assert even_counts([site(3)] * 4, 0.5) == [2, 1, 2, 1]
    assert sum(even_counts([site(1536)] * 30, 0.3)) == round(0.3 * 1536 * 30)
    assert even_counts([site(1)] * 3, 0.9) == [0, 0, 0]  # one unit is kept


def test_levels_of_the_published_sizes():
    heads, neurons = [site(32, "attention")], [site(11008)]
    assert [spacings(heads, turn)[0] for turn in range(4)] == [4, 2, 1, 1]
    assert [spacings(neurons, turn)[0] for turn in range(4)] == [1376, 688, 344, 172]
    assert levels_of(heads[0], 16, 4) == {-4: 0, -3: 4, -2: 8, -1: 12, 0: 16, 1: 20, 2: 24, 3: 28}  # never all 32


def test_aligned_neurons():
    each = replace(site(1536), grain=16)
    counts = even_counts([each] * 30, 0.3)
    assert all(count % 16 == 0 for count in counts)
    assert abs(sum(counts) - 0.3 * 1536 * 30) <= 8
    assert [spacings([each], turn)[0] for turn in range(4)] == [192, 96, 48, 32]
    assert even_counts([replace(site(32), grain=16)], 0.9) == [16]


def test_sites_of_a_group_share_a_spacing():
    assert spacings([site(64), site(128), site(64, cost=7)], 0) == [16, 16, 8]


def test_experts_of_a_block_share_a_site(tmp_path):
    save_model("mixtral", tmp_path)
    found = sites_in(tmp_path)
    assert [each.kind for each in found] == ["attention", "mlp"] * 4
    assert all(len(each.consumers) == (4 if each.kind == "mlp" else 1) for each in found)


@pytest.mark.parametrize("levels", ["search", "uniform"])
def test_the_budget_is_exact(llama, tmp_path, levels):
    report = prune(
        llama, tmp_path / "out", f'tyr(preset="test", tokens=(24, 48, 96), levels="{levels}")', IDS, **CALIBRATION
    )
    linears = report["linears"]
    groups = [linear["shape"][0] for name, linear in linears.items() if "k_proj" in name]
    neurons = [linear["shape"][1] for name, linear in linears.items() if "down_proj" in name]
    assert sum(groups) == 16 * 4
    assert sum(neurons) == 32 * 4
    if levels == "uniform":
        assert len(set(groups)) == len(set(neurons)) == 1
    expected = parse_method(SMALL).forecast(ModelStructure(open_source(llama).config))
    assert sum(matrix["nonzeros"] for matrix in linears.values()) == sum(f.nonzeros for f in expected.values())
    planned = plan(llama, SMALL)
    assert planned["parameters_after"] == planned["parameters"] - planned["in_scope"] + sum(
        matrix["nonzeros"] for matrix in linears.values()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(WINDOWS).logits).all()
    assert any("forward passes over the calibration windows" in note for note in report["notes"])


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    prune(llama, folder, TWO_ROUNDS, IDS, **CALIBRATION)
    return folder


class Killed(Exception):
    pass


def killed_at(monkeypatch, owner, name, call):
    """Makes the function fail at its n-th call, as a signal would end the process there."""
    real, calls = getattr(owner, name), [0]

    def fails(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (divergence, "dense_states", 1),  # before the search of the first round
        (Supernet, "save", 3),  # in the first supernet
        (Supernet, "save", 6),  # in the second supernet
        (Divergence, "_compare", 4),  # in the second generation
        (Divergence, "_compare", 11),  # in a generation of the second round
        (tyr, "keep_chosen", 1),  # after the last search
        (Supernet, "remove", 1),  # after the first round was recorded
        (tyr.TyrStep, "__call__", 3),  # in the stream
    ],
)
def test_killed_and_resumed_is_byte_identical(llama, uninterrupted, tmp_path, monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        killed_at(patch, owner, name, call)
        with pytest.raises(Killed):
            prune(llama, tmp_path / "cut", TWO_ROUNDS, IDS, **CALIBRATION)
    report = prune(llama, tmp_path / "cut", TWO_ROUNDS, IDS, **CALIBRATION)
    for shard in sorted(uninterrupted.glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes(), shard.name
    expected = json.loads((uninterrupted / "report.json").read_text())["notes"]
    assert [note for note in report["notes"] if note.startswith("tyr:")] == [
        n for n in expected if n.startswith("tyr:")
    ]


def test_repaired_weights_are_least_squares_on_the_kept_inputs(llama, tmp_path):
    """The first block, whose inputs are the dense ones: the stored copy against a solver on the inputs themselves."""
    _, found = supernet_in(llama, tmp_path, pruner=Pruner(damp=0.02))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for place, each in found.at(0):
        name = each.consumers[0]
        linear, inputs = model.model.layers[0].get_submodule(name), []
        hook = linear.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(WINDOWS[:7])  # the eighth is held out
        hook.remove()
        x = inputs[0].flatten(0, 1).double()
        for level, count in found.levels[place].items():
            if count == 0:
                continue
            columns, weight = found.read(0, name, level)
            ridge = found.errors(0, name, level)[2] * x.square().sum(0).mean()
            rows = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1])])
            dense = linear.weight.detach().double()
            best = torch.linalg.lstsq(rows[:, columns], rows @ dense.T, driver="gelsd").solution.T
            assert torch.allclose(weight.double(), best, rtol=1e-3, atol=1e-4)
            error = outputs_of(dense, x.T @ x).error(columns, best)
            assert found.errors(0, name, level)[0] == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_the_search_is_not_worse_than_uniform_levels_on_its_own_batch(llama, tmp_path):
    model, found = supernet_in(llama, tmp_path)
    size = Size(1, 8, 12, (24, 96, 192), (3, 2, 1))
    choice = choose_levels(model, WINDOWS, Work(tmp_path), found, size, seed=0, published=False)
    state = choice.state
    fitness = Divergence(model, WINDOWS, (24, 96, 192), Work(tmp_path), found)
    uniform, searched = fitness([(0,) * len(state), state], 2, list(range(8)))
    assert searched <= uniform
    assert searched < uniform or not any(state)
    assert choice.log[-1]["fitness"] == pytest.approx(searched)
    assert choice.divergences == pytest.approx((uniform, searched))


def masked(folder, found, state):
    """The model with the removed columns zero and the repaired ones in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for place, each in enumerate(found.sites):
        for name in each.consumers:
            if found.levels[place][state[place]]:
                columns, weight = found.read(each.block, name, state[place])
                whole = model.model.layers[each.block].get_submodule(name).weight.detach()
                whole.zero_()
                whole[:, columns] = weight
    return model


@torch.no_grad()
def test_divergences_are_those_of_the_masked_models(llama, tmp_path):
    """Prefixes that candidates share, windows in several chunks: the same as one model after the other."""
    model, found = supernet_in(llama, tmp_path)
    centre = (0,) * len(found.sites)
    states = [centre, (*centre[:-1], 1), (0, 2, *centre[2:]), (0, 2, *centre[2:-1], -1)]
    fitness = Divergence(model, WINDOWS, (24, 60, 192), Work(tmp_path), found)
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for stage, samples, length in ((0, [3], 24), (1, [5, 2], 24), (2, list(range(8)), 24)):
        ids = WINDOWS[samples, :length]
        right = dense(ids).logits[:, :-1].log_softmax(-1)
        expected = []
        for state in states:
            other = masked(llama, found, state)(ids).logits[:, :-1].log_softmax(-1)
            expected.append(float((right.exp() * (right - other)).sum() / other[..., 0].numel()))
        assert fitness(states, stage, samples) == pytest.approx(expected, rel=1e-2)
        model.activation_limit = 4 * 24 * 32 * 4  # one window at a time
    assert fitness.passes < 4 * (1 + 2 + 8) / 8  # what the candidates share is computed once


def test_the_dense_model_has_no_divergence(llama, tmp_path):
    model = Model(open_source(llama))
    sites = sites_of(model.structure.units)
    none = Supernet(Work(tmp_path), "none", sites, [{0: 0}] * len(sites))
    fitness = Divergence(model, WINDOWS, (10,), Work(tmp_path), none)
    assert fitness([(0,) * len(sites)], 0, [1])[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("within_layer", ["joint", "sequential"])
def test_what_is_propagated(llama, tmp_path, within_layer):
    """expectation and centre change what later blocks are fitted to, none does not; the first block is not affected."""
    nets = {
        mode: supernet_in(llama, tmp_path / mode, accumulate=mode, within_layer=within_layer)[1]
        for mode in ("expectation", "centre", "uniform", "none")
    }
    weights = {mode: [net.read(block, "self_attn.o_proj", 0)[1] for block in (0, 2)] for mode, net in nets.items()}
    for mode in ("centre", "uniform", "none"):
        assert torch.equal(weights[mode][0], weights["expectation"][0])
        assert weights[mode][1].shape != weights["expectation"][1].shape or not torch.equal(
            weights[mode][1], weights["expectation"][1]
        )


def test_the_average_is_that_of_the_outputs():
    random = torch.Generator().manual_seed(0)
    dense, x = torch.randn(5, 8, generator=random), torch.randn(20, 8, generator=random)
    copies = {
        0: (torch.tensor([0, 2, 3, 7]), torch.randn(5, 4, generator=random)),
        1: (torch.tensor([2]), torch.ones(5, 1)),
    }
    counts = {-1: 0, 0: 4, 1: 7}
    outputs = [x @ dense.T, *(x[:, columns] @ weight.T for columns, weight in copies.values())]
    for mode, shares in (("expectation", [8, 4, 1]), ("uniform", [1, 1, 1]), ("centre", [0, 1, 0])):
        mean = sum(share * output for share, output in zip(shares, outputs, strict=True)) / sum(shares)
        assert torch.allclose(x @ averaged(dense, copies, counts, 8, mode).T, mean, atol=1e-5)
    assert averaged(dense, copies, counts, 8, "none") is dense


def test_held_out_windows_are_not_fitted():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 10, 6, generator=random)
    found = HeldOut(6, period=4)
    for batch in x.split(3):
        found.add(batch)
    fit, held = found.moments(6)
    rows = lambda some: x[some].flatten(0, 1).double()
    assert torch.allclose(fit, rows([0, 1, 2, 4, 5, 6]).T @ rows([0, 1, 2, 4, 5, 6]), rtol=1e-4, atol=1e-4)
    assert torch.allclose(held, rows([3, 7]).T @ rows([3, 7]), rtol=1e-4, atol=1e-4)
    assert found.count == 80


def test_few_tokens_are_damped_more_than_many():
    """With fewer tokens than columns an undamped repair fits noise, which the held-out tokens show."""
    random = torch.Generator().manual_seed(0)
    weight, levels, chosen = torch.randn(6, 32, generator=random), {0: 16}, {}
    mix = torch.randn(32, 32, generator=random)  # correlated inputs: others can stand in for those that are removed
    for tokens in (6, 400):
        statistic = HeldOut(32, period=4)
        statistic.add(torch.randn(8, tokens // 2, 32, generator=random) @ mix)
        copy = Pruner(damp=1e-3).copies(weight, statistic, site(32), torch.arange(32)[:, None], levels)[0]
        chosen[tokens] = copy.damp
        overfitted = copy.held_out / copy.error
        assert overfitted > 2 if tokens == 6 else overfitted == pytest.approx(1, rel=0.2)
    assert chosen[6] > chosen[400]


def test_without_tokens_units_go_by_magnitude():
    weight = torch.diag(torch.arange(1.0, 9.0))
    copy = Pruner().copies(weight, HeldOut(8, None), site(8), torch.arange(8)[:, None], {0: 3})[0]
    assert copy.kept.tolist() == [3, 4, 5, 6, 7]
    assert torch.allclose(copy.weight.float(), weight[:, copy.columns])


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_predicted_bytes_of_the_supernet(name, tmp_path):
    save_model(name, tmp_path / "model")
    _, _found = supernet_in(tmp_path / "model", tmp_path / "work")
    written = sum(file.stat().st_size for file in (tmp_path / "work").glob("net-*"))
    structure = ModelStructure(open_source(tmp_path / "model").config)
    assert Tyr().work_bytes(structure, 4) == pytest.approx(written, rel=0.1)


def test_quick_takes_at_most_forty_passes():
    size, windows = PRESETS["quick"], 32 * 512
    for available in (8 * 24, windows, 128 * 2048, POOL):
        first, second, third = size.stage_tokens(available)
        search = size.children * first + size.survivors[0] * second + (size.survivors[1] + 1) * third
        outside = 1 + 2 + 2 * third / available + 1  # dense states, supernet, the winner and the centre, pruning
        assert outside + size.rounds * size.generations * search / available <= 40
        assert size.rounds == 1


def test_quick_counts_its_passes(llama, tmp_path):
    report = prune(llama, tmp_path / "out", 'tyr(preset="quick", drop=0.25)', IDS, **CALIBRATION)
    note = next(note for note in report["notes"] if note.startswith("tyr:"))
    passes = float(re.search(r"([\d.]+) forward passes", note)[1])
    assert 4 < passes <= 39  # and one to prune


def test_memory_of_copies_is_bounded(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(supernet, "CACHE", 5000)
    _, found = supernet_in(llama, tmp_path)
    read = {(block, level): found.read(block, "mlp.down_proj", level) for block in range(4) for level in (0, 1, 2)}
    assert sum(tensor.nbytes for copy in found._cache.values() for tensor in copy) <= 5000
    for (block, level), (columns, weight) in read.items():
        again = found.read(block, "mlp.down_proj", level)
        assert torch.equal(columns, again[0])
        assert torch.equal(weight, again[1])


def test_files_of_finished_rounds_are_removed(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, tyr.TyrStep, "__call__", 1)
        with pytest.raises(Killed):
            prune(llama, tmp_path / "out", SMALL, IDS, **CALIBRATION)
    left = [file.name for file in tmp_path.rglob("tyr-*")]
    assert any(name.startswith("tyr-chosen") for name in left)
    assert not any("block" in name or "dense" in name for name in left)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tyr(drop=1.5)", "drop must be a number from 0 to 1"),
        ('tyr(preset="slow")', "preset must be one of"),
        ("tyr(tokens=(5, 6))", "of the same length"),
        ("tyr(tokens=5)", "numbers in parentheses"),
        ("tyr(survivors=(5, 0, 1))", "survivors must be a whole number"),
        ('tyr(accumulate="mean")', "accumulate must be one of"),
    ],
)
def test_options_that_cannot_be(expression, message):
    with pytest.raises(UsageError, match=message):
        parse_method(expression)


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi3", "mixtral", "olmo2"])
def test_other_families(name, tmp_path):
    """Biases, weights stored transposed, fused producers, experts, and heads that cannot be removed, which stay."""
    save_model(name, tmp_path / "dense")
    report = prune(tmp_path / "dense", tmp_path / "out", SMALL, IDS, **CALIBRATION)
    assert report["totals"]["parameters"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(WINDOWS).logits).all()
    if name == "olmo2":
        assert any("left whole" in note for note in report["notes"])


def test_published_follows_the_released_pruner():
    """One scoring for heads and sixteen for neurons, the given damping, all windows fitted."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 64, generator=random), torch.randn(8, 30, 64, generator=random)
    x = x @ torch.randn(64, 64, generator=random)
    statistic = HeldOut(64, None)
    statistic.add(x)
    for each, columns, rounds in (
        (Site(0, "attention", ("o",), 8, 8, 1), torch.arange(64).view(8, 8), 1),
        (site(64), torch.arange(64)[:, None], 16),
    ):
        count = each.units // 2
        copy = Pruner(published=True).copies(weight, statistic, each, columns, {0: count})[0]
        expected = remove_units(problem_of(weight, statistic.fit.matrix()), columns, [count], rounds=rounds)[count]
        assert torch.equal(copy.kept, expected.kept)
        assert torch.equal(copy.weight, expected.weight)
        assert copy.damp == 0.01


REFERENCE = Path(__file__).parents[1] / "data" / "reference"
TINY = REFERENCE / "models" / "tiny-mha"


def released(mode):
    """The released program's copies of a tiny model: tensors by name of the linear and level, units kept, KL."""
    about = json.loads((REFERENCE / "tyr" / "tyr_tiny.json").read_text())
    prefix = f"supernet.tiny-mha.{mode}"
    tensors = load_file(REFERENCE / "tyr" / "tyr_tiny.safetensors")
    found = {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return found, about["supernet"][prefix]["levels"], about["kl"]["kl"]


def released_levels(sites, kept):
    """Units removed by level; the copies that keep none are left out, they have no share in the expectation."""
    names = [f"model.layers.{each.block}.{each.consumers[0]}" for each in sites]
    return [
        {int(level): each.units - count for level, count in kept[name].items() if count}
        for each, name in zip(sites, names, strict=True)
    ]


@pytest.mark.parametrize(("accumulate", "mode"), [("none", "released"), ("expectation", "intended_expectation")])
def test_released_supernet(tmp_path, monkeypatch, accumulate, mode):
    """Kept units of all levels and weights of the centre, through all blocks.

    The program weighs its smallest MLP by a share of 0.1 and keeps 15 neurons of 160, not 16; here it gets that weight.
    """
    tensors, kept, _ = released(mode)
    model = Model(open_source(TINY))
    sites = sites_of(model.structure.units)
    found = Supernet(Work(tmp_path), "net", sites, released_levels(sites, kept))

    def as_released(dense, copies, counts, units, mode):
        return averaged(dense, copies, {level: 144 if n == 145 else n for level, n in counts.items()}, units, mode)

    monkeypatch.setattr(supernet, "averaged", as_released)
    ids = load_file(REFERENCE / "models" / "tokens.safetensors")["input_ids"]
    build(model, ids, found, Pruner(published=True), accumulate, "joint")
    for place, each in enumerate(sites):
        consumer, name = each.consumers[0], f"model.layers.{each.block}.{each.consumers[0]}"
        for level, count in found.levels[place].items():
            expected = tensors.get(f"{name}/{level}.kept")
            if expected is not None and count:
                assert found.kept(each.block, consumer, level).tolist() == expected.nonzero().flatten().tolist()
        columns, weight = found.read(each.block, consumer, 0)
        assert torch.allclose(weight, tensors[f"{name}/0.weight"][:, columns], rtol=1e-4, atol=1e-4)


def test_released_divergence(tmp_path):
    """Seven windows and the first 20 tokens of the eighth, the released centre copies in place."""
    tensors, kept, expected = released("released")
    model = Model(open_source(TINY))
    sites = sites_of(model.structure.units)
    found = Supernet(Work(tmp_path), "net", sites, [{0: levels[0]} for levels in released_levels(sites, kept)])
    copies = {}
    for each in sites:
        name = f"model.layers.{each.block}.{each.consumers[0]}"
        weight = tensors[f"{name}/0.weight"]
        columns = weight.any(0).nonzero().flatten()
        copy = Copy(columns[:: each.width] // each.width, columns, weight[:, columns], 0.0, 0.0, 0.01)
        copies.setdefault(each.block, {})[each.consumers[0]] = {0: copy}
    for index, held in copies.items():
        found.save(index, held, torch.float32)
    ids = load_file(REFERENCE / "models" / "tokens.safetensors")["input_ids"]
    fitness = Divergence(model, ids, (32, 20), Work(tmp_path), found)
    state = [(0,) * len(sites)]
    whole, cut = fitness(state, 0, range(7))[0], fitness(state, 1, [7])[0]
    assert (7 * 31 * whole + 19 * cut) / (7 * 31 + 19) == pytest.approx(expected, rel=1e-4)
