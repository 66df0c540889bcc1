"""The contract of all registered methods, each in several settings, on tiny random models."""

import json
import logging
import shutil
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM

from budwood.checkpoints.meta_model import read_config
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.work import Work
from budwood.methods import METHODS, parse_method
from budwood.methods.magnitude import Magnitude
from budwood.methods.method import Wrapper
from budwood.methods.reduction import Reduction
from budwood.methods.structured import Structured
from budwood.planning import plan
from budwood.pruning import prune
from budwood.sparsity.statistics import Gram, SquaredNorm
from budwood.stream.block import Block
from budwood.stream.linear import Linear
from budwood.stream.model import Model

SETTINGS = {
    "magnitude": ['magnitude("2:4")', 'magnitude("50%")', 'magnitude("2:4", published=True)'],
    "wanda": [
        'wanda("2:4")',
        'wanda("50%")',
        'wanda("4:8")',
        'wanda("30%", scope="matrix")',
    ],
    "sparsegpt": [
        'sparsegpt("2:4")',
        'sparsegpt("50%", block=16)',
        'sparsegpt("50%", published=True)',
    ],
    "wrp": [
        "wrp(alpha=0.5)",
        "wrp(density=0.05)",
        "wrp(block=16, k=1)",
        "wrp(block=8, density=0.25)",
        'wrp(alpha=0.5, metric="magnitude")',
        'wrp(alpha=0.5, metric="obs")',
        'wrp(density=0.05, scope="matrix")',
    ],
    "refit": [
        "refit(wrp(alpha=0.5))",
        'refit(magnitude("2:4"))',
        'refit(wanda("50%"))',
        'refit(sparsegpt("2:4"))',
        'refit(wanda("50%"), target=0.5)',
    ],
    "allocate": [
        'allocate(wanda("50%", scope="matrix"))',
        'allocate(sparsegpt("50%"))',
        'allocate(wrp(density=0.05, scope="matrix"))',
        'refit(allocate(wanda("50%", scope="matrix")))',
    ],
    "gblm": ["gblm()", 'gblm("2:4", norm="l2")', 'gblm("50%", published=True)'],
    "perp": [
        'perp(magnitude("2:4"), move="masklora", rank=2, steps=4, rate=0.01)',
        'perp(wanda("50%"), move="weights", steps=4, batch=2, rate=0.01, reconstruct="block")',
    ],
    "alps": ['alps("2:4")', 'alps("50%")', 'alps("2:4", extra=0.05)', 'alps("50%", scope="row")'],
    "graft": [
        "graft(bits=9.75)",
        'graft(bits=9.0, pattern="free")',
        'graft(bits=9.75, allocate="uniform")',
        'graft(bits=9.5, allocate="uniform", select="wanda", fit=False)',
        'graft(bits=9.75, allocate="uniform", steps=3, rate=0.01, move="weights")',
    ],
    "sds": [
        'sds(wanda("2:4"))',
        'sds(wrp(alpha=0.5), regrow="regularised")',
        'sds(sparsegpt("50%", block=16), adjust="dynamic", steps=60, rounds=2)',
        'sds(allocate(wanda("50%", scope="matrix")), regrow=None, adjust="frozen")',
    ],
    "matched": [
        'matched(magnitude("2:4"), steps=3, move="weights")',
        'matched(wrp(alpha=0.5), steps=2, target="dense", move="weights", loss="plain")',
        'matched(refit(wanda("50%")), steps=3, target=0.5, move="weights", tokens=48)',
    ],
}
EXPRESSIONS = [pytest.param(expression, id=expression) for settings in SETTINGS.values() for expression in settings]
# Settings whose count depends on the scores, or changes by a rank in all rows: coarse at 32 inputs.
ROUGH = ("alpha", "parity", "density=0.05)")
CHANGING = ("sparsegpt", "refit", "alps", "graft", "matched", "sds", "perp")  # methods that change kept weights
DIVIDING = (
    "allocate(",
    "graft(bits=9.75)",
    'graft(bits=9.0, pattern="free")',
)  # matrices keep different shares
# These read more hidden states than those that enter linears, or train the written model.
TWO_STREAMS = ("steps=", "target=", "sds(")
CALIBRATION = {
    "num_samples": 6,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}


# A family with Conv1D, one with grouped queries and tied embeddings, one with experts; one cheap setting per method.
OTHERS = ("gpt2", "qwen2", "qwen3_moe")
CHEAP = {
    "magnitude": 'magnitude("2:4")',
    "wanda": 'wanda("50%")',
    "sparsegpt": 'sparsegpt("2:4")',
    "wrp": "wrp(block=8, density=0.25)",
    "refit": 'refit(sparsegpt("50%", block=16), iterations=3)',
    "allocate": 'allocate(wanda("50%", scope="matrix"))',
    "gblm": 'gblm("2:4")',
    "perp": 'perp(wanda("50%"), rank=2, steps=4, rate=0.01)',
    "alps": 'alps("2:4", rounds=8, iterations=2)',
    "graft": "graft(bits=9.75, rounds=4, iterations=2)",
    "matched": 'matched(wanda("50%"), steps=2)',
    "sds": 'sds(wanda("2:4"), growth=5, steps=9)',
}
FEW = ("magnitude", "sparsegpt", "wrp", "graft")  # for the family that differs least from the one above
OTHERS_CHEAP = [
    pytest.param(family, CHEAP[name], id=f"{family}-{name}")
    for family in OTHERS
    for name in (FEW if family == "qwen2" else CHEAP)
]
UNREACHED = 3  # the expert that no token reaches


def mentions(expression, words):
    return any(word in expression for word in words)


def test_every_method_is_tested():
    structured = {
        name for name, kind in METHODS.items() if issubclass(kind, Structured | Reduction)
    }  # each in a file of its own
    changes_nothing = {"dense"}  # in tests/test_pruning.py
    assert set(SETTINGS) == set(CHEAP) == set(METHODS) - structured - changes_nothing


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def starve(model):
    """Makes the router of every block send no token to one expert: the first feature is positive and counts against it.

    Nothing that a block adds changes that feature much.
    """
    weights = model.state_dict()
    weights["model.embed_tokens.weight"][:, 0] = 4
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            weight[UNREACHED] = 0
            weight[UNREACHED, 0] = -20
        if name.endswith("layernorm.weight"):
            weight[0] = 1
        if name.endswith("o_proj.weight"):
            weight[0] *= 0.01
        if name.endswith("experts.down_proj"):  # [experts, out, in]
            weight[:, 0] *= 0.01


@pytest.fixture(scope="module")
def other(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_model(request.param, folder, change=starve if request.param == "qwen3_moe" else None)
    return folder


@pytest.fixture(scope="module")
def text():
    return ["".join(chr(97 + (i * i + i // 7) % 26) for i in range(600))]


@pytest.fixture(scope="module")
def written(llama, text, tmp_path_factory):
    """The folder and the report of a method, pruned once for all tests that only read it."""

    @cache
    def of(expression):
        folder = tmp_path_factory.mktemp("written")
        return folder, prune(llama, folder, expression, text, **CALIBRATION)

    return of


def stored_in(folder):
    """The prunable matrices [out, in] of a folder, dense or pruned, by full name."""
    blocks = Model(open_source(folder)).blocks()
    return {linear.name: linear.stored.clone() for block in blocks for linear in block.linears.values()}


def linears_of(folder):
    """The pruned matrices [out, in] as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = json.loads((folder / "report.json").read_text())["linears"]
    return {name: model.get_submodule(name).weight.detach() for name in names}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_density_is_reached_and_other_tensors_are_unchanged(llama, written, expression):
    folder, report = written(expression)
    method = parse_method(expression)
    dense, whole_model = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (llama, folder))
    pruned = {name: whole_model.get_submodule(name).weight.detach() for name in report["linears"]}
    structure = ModelStructure(read_config(llama))
    expected = {name: held.nonzeros for name, held in method.forecast(structure).items()}
    whole = sum(weight.numel() for weight in pruned.values())
    tolerance = 0.02 if mentions(expression, ROUGH) else 1e-9
    assert report["totals"]["density"] == pytest.approx(sum(expected.values()) / whole, abs=max(tolerance, 1 / whole))
    for name, weight in pruned.items():
        assert torch.isfinite(weight).all()
        if not mentions(expression, DIVIDING):
            density = expected[name] / weight.numel()
            assert report["linears"][name]["density"] == pytest.approx(density, abs=tolerance)
        assert int(torch.count_nonzero(weight)) == report["linears"][name]["nonzeros"]
        if not mentions(expression, CHANGING):
            kept = weight != 0
            assert torch.equal(weight[kept], dense.get_submodule(name).weight[kept])
    tensors = whole_model.state_dict()
    for name, tensor in dense.state_dict().items():
        assert name.rpartition(".")[0] in report["linears"] or torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(("other", "expression"), OTHERS_CHEAP, indirect=["other"])
def test_other_families_have_the_same_contract(other, text, tmp_path, expression, caplog):
    """Density, planned bytes, finite weights, byte-identical after an interruption; also where no token arrives."""
    with caplog.at_level(logging.WARNING, logger="budwood"):
        report = prune(other, tmp_path / "out", expression, text, **CALIBRATION)
    starved = {record.args[0] for record in caplog.records if "no calibration token" in record.message}
    dense, pruned = stored_in(other), stored_in(tmp_path / "out")
    experts = {name for name in dense if ".experts." in name} if parse_method(expression).calibrated else set()
    assert {name for name in experts if name.endswith(f".{UNREACHED}")} <= starved <= experts
    assert starved < experts or not experts
    assert set(pruned) == set(report["linears"]) == set(dense)
    forecast = parse_method(expression).forecast(ModelStructure(read_config(other)))
    expected = {name: held.nonzeros for name, held in forecast.items()}
    divides = mentions(expression, ("allocate", "graft"))
    for name, weight in pruned.items():
        assert torch.isfinite(weight).all()
        assert int(torch.count_nonzero(weight)) == report["linears"][name]["nonzeros"]
        assert divides or report["linears"][name]["nonzeros"] == expected[name]
        if not mentions(expression, CHANGING):
            assert torch.equal(weight, torch.where(weight != 0, dense[name], 0))
    assert sum(matrix["nonzeros"] for matrix in report["linears"].values()) == sum(expected.values())
    for name, weight in linears_of(tmp_path / "out").items():
        assert torch.equal(weight, pruned[name]), name
    planned = plan(other, expression)
    assert planned["bytes_after"] == pytest.approx(report["totals"]["bytes"], rel=0.02 if divides else 1e-12)

    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    for shard in (shards[0], *shards[3:]):  # as if it had been killed in the third block
        shard.unlink()
    for name in ("config.json", "report.json"):
        (tmp_path / "cut" / name).unlink()
    prune(other, tmp_path / "cut", expression, text, **CALIBRATION)
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes(), shard.name


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_planned_bytes_are_written_bytes(llama, written, expression):
    _, report = written(expression)
    planned = plan(llama, expression)
    exact = not mentions(expression, (*ROUGH, *DIVIDING))
    assert planned["bytes_after"] == pytest.approx(report["totals"]["bytes"], rel=1e-12 if exact else 0.02)
    assert planned["in_scope"] == report["totals"]["in_scope"]
    assert planned["parameters"] == report["totals"]["parameters"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_interrupted_and_resumed_is_byte_identical(llama, written, text, tmp_path, expression):
    folder, whole = written(expression)
    shutil.copytree(folder, tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    for shard in [shards[0], *shards[2:]]:  # as if it had been killed in the second block
        shard.unlink()
    for name in ("config.json", "report.json"):
        (tmp_path / "cut" / name).unlink()
    report = prune(llama, tmp_path / "cut", expression, text, **CALIBRATION)
    for shard in shards:
        assert shard.read_bytes() == (folder / shard.name).read_bytes(), shard.name
    assert report["linears"] == whole["linears"]
    assert report["totals"] == whole["totals"]


@pytest.mark.parametrize("expression", [text for text in EXPRESSIONS if not mentions(text.values[0], TWO_STREAMS)])
def test_streamed_equals_resident(llama, text, tmp_path, expression):
    """The method on a model that is wholly in memory, blocks called by the model's own forward."""
    report = prune(llama, tmp_path / "out", expression, text, format="dense", **CALIBRATION)
    streamed = linears_of(tmp_path / "out")
    method = parse_method(expression)
    ids = calibration_ids(llama, text, report)
    step = method.prepare(Model(open_source(llama)), ids, Work(tmp_path / "work"))
    resident = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for index, layer in enumerate(resident.model.layers):
        step(Resident(resident, layer, f"model.layers.{index}", ids))
    for name, weight in streamed.items():
        assert torch.equal(weight, resident.get_submodule(name).weight), name


def calibration_ids(folder, text, report):
    from budwood.checkpoints.tokenizer import load_tokenizer
    from budwood.data.windows import calibration_windows, digest

    if report["data"] is None:
        return None
    ids = calibration_windows(text, load_tokenizer(folder), num_samples=6, seq_length=24).ids
    assert digest(ids) == report["data"]["sha256"]
    return ids


@dataclass(frozen=True)
class Measured(Wrapper):
    """Runs the dense block first, so that the output error of a method without calibration is known too."""

    def __call__(self, block):
        block.collect(SquaredNorm)
        self.inner(block)


@dataclass(frozen=True)
class Smallest(Magnitude):
    """Keeps the smallest weights of every group."""

    def prune_block(self, block, pattern_for):
        for linear in block.linears.values():
            keep = pattern_for(linear.shape, linear.name).keep(-linear.weight.abs())
            linear.weight = torch.where(keep, linear.weight, 0)


class Resident(Block):
    """A block of a model that is wholly in memory, its statistics collected in the model's own forward pass."""

    def __init__(self, model, layer, name, ids):
        self.model, self.module, self.ids, self.name, self._shared = model, layer, ids, name, {}
        self.linears = {
            path: Linear(f"{name}.{path}", module, module.weight.detach())
            for path, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    def _pass(self, statistic, only=None):
        found = {name: statistic(linear.shape[1]) for name, linear in self.linears.items()}
        hooks = [
            linear.module.register_forward_pre_hook(lambda module, args, name=name: found[name].add(args[0]))
            for name, linear in self.linears.items()
        ]
        with torch.no_grad():
            self.model(self.ids)
        for hook in hooks:
            hook.remove()
        return found


def test_shared_inputs_share_a_statistic_and_the_last_linear_runs_once(llama, text):
    model = Model(open_source(llama))
    ids = torch.randint(3, 100, (70, 64), generator=torch.Generator().manual_seed(0))
    calls = []
    for block in model.blocks(ids):
        down = block.linears["mlp.down_proj"].module
        hook = down.register_forward_hook(lambda *_: calls.append(1))
        norms = block.collect(SquaredNorm)
        hook.remove()
        assert norms["self_attn.q_proj"] is norms["self_attn.k_proj"] is norms["self_attn.v_proj"]
        assert norms["mlp.gate_proj"] is norms["mlp.up_proj"] is not norms["self_attn.q_proj"]
        assert len({id(norm) for norm in norms.values()}) == 4
        assert {norm.count for norm in norms.values()} == {70 * 64}
        gram = block.collect(Gram)["self_attn.o_proj"]
        assert gram.matrix().diagonal().tolist() == pytest.approx(norms["self_attn.o_proj"].total.tolist(), rel=1e-5)
        break
    assert len(calls) == 1  # in the first batch only


@pytest.mark.parametrize("better", ['wanda("2:4")', 'sparsegpt("2:4")', "wrp(alpha=0.5)"])
def test_output_error_is_below_that_of_magnitude(llama, text, tmp_path, better):
    """The first block's, where both start from the same inputs. The worst weights to keep have a larger error still."""
    expressions = {"worst": Measured(Smallest("2:4")), "magnitude": Measured(Magnitude("2:4")), "better": better}
    worst, magnitude, found = (
        prune(llama, tmp_path / name, method, text, **CALIBRATION)["blocks"][0]["relative_error"]
        for name, method in expressions.items()
    )
    assert 0 < found < magnitude < worst
