"""The contract of methods: all that a block changed is written, shapes may change, steps finish; each in one file."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from families import MOE, save_model, token_ids
from transformers import AutoModelForCausalLM

from budwood.errors import RunError
from budwood.evaluation.perplexity import evaluate
from budwood.inspection import inspect
from budwood.methods import parse_method
from budwood.methods.magnitude import Magnitude
from budwood.methods.method import Method, Step, Wrapper
from budwood.methods.option import option
from budwood.models.linears import read
from budwood.planning import plan
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.statistics import SquaredNorm

IDS = token_ids(1, 400) % 90 + 3
CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}


@dataclass(frozen=True)
class Narrow(Method):
    """A structured method: drops the MLP neurons whose inputs to the last matrix are smallest, and adds their mean."""

    keep: float = option(0.75, "share of the neurons that stay")

    def forecast(self, structure):
        return {name: self._forecast(shape, name) for name, shape in structure.shapes.items()}

    def _forecast(self, shape, name):
        if ".mlp." in name:
            out, width = shape
            shape = (out, int(self.keep * width)) if "down" in name else (int(self.keep * out), width)
        return Forecast(shape[0] * shape[1], shape=shape)

    def __call__(self, block):
        norms = block.collect(SquaredNorm)
        last = block.linears["mlp.down_proj"]
        kept = norms["mlp.down_proj"].norms().topk(int(self.keep * last.shape[1])).indices.sort().values
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            block.linears[name].weight = block.linears[name].weight[kept]
        last.bias = last.weight.sum(dim=1) * 0.01
        last.weight = last.weight[:, kept]


@dataclass(frozen=True)
class Trained(Wrapper):
    """A method that trains: after the inner one, one step of gradient descent on a norm of every block, then again."""

    rate: float = option(0.1, "of the step")

    def prepare(self, model, windows, work):
        return TrainedStep(self, self.inner.prepare(model, windows, work))


@dataclass(frozen=True)
class TrainedStep(Step):
    method: Trained
    inner: Step

    def __call__(self, block):
        self.inner(block)
        norm = block.module.input_layernorm.weight
        with torch.enable_grad():
            norm.requires_grad_(True)
            (gradient,) = torch.autograd.grad(block.forward(block.activations.read(0, block.device)).sum(), norm)
        norm.requires_grad_(False)
        norm -= self.method.rate * gradient.sign()

    def finish(self, run):
        self.inner.finish(run)
        for block in run.rewrite():
            block.module.post_attention_layernorm.weight.mul_(1.5)
            linear = next(iter(block.linears.values()))
            linear.bias = torch.full((linear.shape[0],), 0.25)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


METHODS = {"narrow": Narrow(), "trained": Trained(Magnitude("2:4")), "both": Trained(Narrow())}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("layout", ["auto", "dense"])
def test_what_a_method_changes_is_written_and_loaded(llama, tmp_path, method, layout):
    """Norms, biases that were not there, other shapes: in the shards, in from_pretrained, streamed, and exported."""
    report = prune(llama, tmp_path / "out", method, IDS, format=layout, **CALIBRATION)
    dense = AutoModelForCausalLM.from_pretrained(llama)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    narrow = "narrow" in str(method)
    for one, other in zip(loaded.model.layers, dense.model.layers, strict=True):
        assert one.mlp.up_proj.weight.shape[0] == (48 if narrow else 64)
        assert one.mlp.down_proj.in_features == (48 if narrow else 64)
        assert (one.mlp.down_proj.bias is not None) == narrow
        assert (one.self_attn.q_proj.bias is not None) == isinstance(method, Trained)
        if isinstance(method, Trained):
            assert torch.equal(one.self_attn.q_proj.bias, torch.full((64,), 0.25))
            assert torch.equal(one.post_attention_layernorm.weight, 1.5 * other.post_attention_layernorm.weight)
            assert not torch.equal(one.input_layernorm.weight, other.input_layernorm.weight)
        else:
            assert torch.equal(one.post_attention_layernorm.weight, other.post_attention_layernorm.weight)
    resident = evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=3)
    streamed = evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=3, stream=True)
    assert streamed["losses"] == resident["losses"]
    packed = report["format"] != "dense"  # nothing is packed where no weight is zero
    assert report["needs_budwood"] == packed
    repack(tmp_path / "out", tmp_path / "again", "dense" if packed else "auto")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS[:, :30]).logits, loaded(IDS[:, :30]).logits)
    loaded.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(saved(IDS[:, :30]).logits, loaded(IDS[:, :30]).logits)
    if narrow:
        assert report["totals"]["density"] == 0.875  # half of the weights are in the MLP
        assert report["linears"]["model.layers.0.mlp.up_proj"]["shape"] == [48, 32]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_interrupted_at_any_block_it_ends_with_the_same_bytes(llama, tmp_path, method, monkeypatch):
    prune(llama, tmp_path / "whole", method, IDS, **CALIBRATION)
    calls, real = [], type(method).__call__ if isinstance(method, Narrow) else TrainedStep.__call__
    owner = type(method) if isinstance(method, Narrow) else TrainedStep

    def failing(self, block):
        calls.append(block.index)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        real(self, block)

    monkeypatch.setattr(owner, "__call__", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "cut", method, IDS, **CALIBRATION)
    prune(llama, tmp_path / "cut", method, IDS, **CALIBRATION)
    assert calls == [0, 1, 1, 2, 2, 3]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not [file for file in (tmp_path / "cut").iterdir() if file.is_dir()]


@pytest.mark.parametrize("at", [1, 3])
def test_what_finishes_a_run_may_be_interrupted_too(llama, tmp_path, monkeypatch, at):
    method = Trained(Magnitude("2:4"))
    prune(llama, tmp_path / "whole", method, IDS, **CALIBRATION)
    real, seen = TrainedStep.finish, []

    def failing(self, run):
        for block in run.rewrite():
            seen.append(block.index)
            if len(seen) == at:
                raise KeyboardInterrupt
            block.module.post_attention_layernorm.weight.mul_(1.5)
            next(iter(block.linears.values())).bias = torch.full((64,), 0.25)

    monkeypatch.setattr(TrainedStep, "finish", failing)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "cut", method, IDS, **CALIBRATION)
    monkeypatch.setattr(TrainedStep, "finish", real)
    prune(llama, tmp_path / "cut", method, IDS, **CALIBRATION)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_plan_knows_the_shapes_to_come(llama, tmp_path):
    planned = plan(llama, Narrow())
    report = prune(llama, tmp_path / "out", Narrow(), IDS, **CALIBRATION)
    # Of four blocks, which a forecast of matrices does not hold; those of gate and up are zeros.
    biases = 4 * (32 + 2 * 48) * 4
    assert planned["bytes_after"] + biases == report["totals"]["bytes"] < planned["bytes_dense"]


def test_a_narrowed_folder_can_be_pruned_again(llama, tmp_path):
    prune(llama, tmp_path / "once", Narrow(), IDS, **CALIBRATION)
    report = prune(tmp_path / "once", tmp_path / "twice", "refit(wrp(alpha=0.5))", IDS, **CALIBRATION)
    assert report["linears"]["model.layers.2.mlp.down_proj"]["shape"] == [32, 48]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert loaded.model.layers[2].mlp.down_proj.weight.shape == (32, 48)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    for one, other in zip(loaded.model.layers, first.model.layers, strict=True):
        assert torch.equal(one.mlp.down_proj.bias, other.mlp.down_proj.bias)
    assert not inspect(tmp_path / "twice")["totals"]["broken"]


@pytest.mark.parametrize("name", ["gpt2", *MOE])
def test_any_family_may_be_changed(name, tmp_path):
    """A norm everywhere, and a bias on the last matrix of every block, be it Conv1D or one expert of many."""

    @dataclass(frozen=True)
    class Shifted(Wrapper):
        def __call__(self, block):
            self.inner(block)
            next(weight for weight in block.module.parameters() if weight.dim() == 1).mul_(1.25)
            linear = list(block.linears.values())[-1]
            linear.bias = torch.full((linear.shape[0],), 0.5)

    save_model(name, tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "out", Shifted(Magnitude("2:4")), IDS, format="auto", **CALIBRATION)
    resident = evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=2)
    streamed = evaluate(str(tmp_path / "out"), IDS, seq_length=24, limit=2, stream=True)
    assert streamed["losses"] == pytest.approx(resident["losses"], rel=1e-6)
    plain = prune(tmp_path / "dense", tmp_path / "plain", Magnitude("2:4"), IDS, **CALIBRATION)
    assert plain["totals"]["density"] == 0.5
    other = evaluate(str(tmp_path / "plain"), IDS, seq_length=24, limit=2)
    assert other["losses"] != pytest.approx(resident["losses"], rel=1e-4)


def test_weights_set_in_the_module_itself_count(llama, tmp_path):
    @dataclass(frozen=True)
    class Direct(Method):
        def forecast(self, structure):
            return {}

        def __call__(self, block):
            for linear in block.linears.values():
                with torch.no_grad():
                    read(linear.module)[:, ::2] = 0

    report = prune(llama, tmp_path / "out", Direct(), IDS, **CALIBRATION)
    assert report["totals"]["density"] == 0.5


def test_a_bias_of_the_wrong_size_and_a_weight_that_overflows_are_refused(llama, tmp_path):
    @dataclass(frozen=True)
    class Wrong(Method):
        large: bool = False

        def forecast(self, structure):
            return {}

        def __call__(self, block):
            linear = block.linears["self_attn.q_proj"]
            if self.large:
                linear.weight = linear.weight * 1e6
            linear.bias = torch.zeros(3)

    with pytest.raises(ValueError, match="does not fit 64 outputs"):
        prune(llama, tmp_path / "out", Wrong(), IDS, **CALIBRATION)
    with pytest.raises(RunError, match=r"do not fit torch\.float16"):
        prune(llama, tmp_path / "out", Wrong(large=True), IDS, dtype="float16", **CALIBRATION)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "expression",
    ["refit(graft(steps=2, rate=0.01))", "refit(refit(wrp(alpha=0.5), target=1))", "sparsegpt(mask=refit(wrp()))"],
)
def test_wrappers_hand_on_all_of_a_block(llama, tmp_path, expression):
    report = prune(llama, tmp_path / "out", expression, IDS, **CALIBRATION)
    assert 0.4 < report["totals"]["density"] < 0.75


@pytest.mark.parametrize(
    "expression",
    [
        "wrp(published=True)",
        "refit(wrp(published=True))",
        "refit(refit(wanda(published=True)))",
        "sparsegpt(mask=wanda(published=True))",
        'refit(sparsegpt(mask=refit(magnitude("2:4", published=True))))',
    ],
)
def test_published_figures_are_handed_on(expression):
    assert parse_method(expression).published
    assert not parse_method(expression.replace("published=True", "")).published
    assert parse_method(str(parse_method(expression))) == parse_method(expression)


def test_a_survey_is_kept_until_the_run_is_finished(llama, tmp_path, monkeypatch):
    """Killed after the survey, the run does not survey again; and the copy of its counts goes when it is finished."""
    from budwood.methods import allocation

    surveys, real = [], allocation.survey

    def counted(*args):
        surveys.append(1)
        return real(*args)

    monkeypatch.setattr(allocation, "survey", counted)
    prune(llama, tmp_path / "whole", "graft(bits=9.75)", IDS, **CALIBRATION)
    assert len(surveys) == 1
    from budwood.methods.graft import GraftStep

    call = GraftStep.__call__
    monkeypatch.setattr(GraftStep, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "cut", "graft(bits=9.75)", IDS, **CALIBRATION)
    monkeypatch.setattr(GraftStep, "__call__", call)
    kept = list((tmp_path / "cut").rglob("allocation-*.json"))
    assert len(kept) == 1
    assert sum(json.loads(kept[0].read_text())["value"].values()) > 0
    prune(llama, tmp_path / "cut", "graft(bits=9.75)", IDS, **CALIBRATION)
    assert len(surveys) == 2
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("allocation-*.json"))
    shutil.rmtree(tmp_path / "cut")
