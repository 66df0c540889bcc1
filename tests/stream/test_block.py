"""One filled block: its linears, its statistics, its outputs, and what is written of it."""

import pytest
import torch
from families import BLOCKS, save_model, token_ids

from budwood.checkpoints.source import open_source
from budwood.errors import RunError
from budwood.sparsity.statistics import Gram, SquaredNorm
from budwood.stream.activations import Activations
from budwood.stream.arithmetic import Arithmetic
from budwood.stream.linear import all_finite, relative_error, same
from budwood.stream.model import Model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in ("llama", "gpt2", "mixtral")}
    for family, folder in made.items():
        save_model(family, folder, dtype=torch.bfloat16)
    return made


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def folder(request, folders):
    return folders[request.param]


def first_block(folder, windows=True, **options):
    stream = Model(open_source(folder), **options).blocks(token_ids(3) if windows else None, batch=2)
    block = next(stream)
    block.stream = stream  # a generator that is dropped takes the block's weights away
    return block


def last_linear(block):
    return list(block.linears.values())[-1]


def count_runs(block, monkeypatch):
    runs, real = [], block.run
    monkeypatch.setattr(block, "run", lambda batch: runs.append(batch) or real(batch))
    return runs


def test_statistics_are_those_of_the_inputs(folder):
    """Counted from hooks of the test's own, on the outputs of the whole block."""
    block = first_block(folder)
    found, inputs = block.collect(SquaredNorm), {name: [] for name in block.linears}
    hooks = [
        linear.module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name, linear in block.linears.items()
    ]
    with torch.no_grad():
        for batch in block.activations.indices():
            block.run(batch)
    for hook in hooks:
        hook.remove()
    for name, statistic in found.items():
        rows = [x.reshape(-1, x.shape[-1]) for x in inputs[name]]
        assert statistic.count == sum(map(len, rows))
        expected = sum(x.float().square().sum(0) for x in rows) if rows else torch.zeros(block.linears[name].shape[1])
        torch.testing.assert_close(statistic.total.float(), expected, rtol=1e-5, atol=1e-6)
    if "self_attn.q_proj" in found:
        assert found["self_attn.q_proj"] is found["self_attn.k_proj"] is not found["self_attn.o_proj"]


def test_one_pass_collects_all_that_is_shared(folder, monkeypatch):
    block = first_block(folder)
    alone = {kind: block.collect(kind) for kind in (SquaredNorm, Gram)}
    runs = count_runs(block, monkeypatch)
    with block.sharing(SquaredNorm, Gram):
        assert runs == []  # nothing is collected before it is asked for
        together = {kind: block.collect(kind) for kind in (Gram, SquaredNorm)}
        assert block.collect(Gram)["self_attn.q_proj" if "self_attn.q_proj" in block.linears else "attn.c_proj"]
        assert runs == [0, 1]
        with block.sharing(Gram):
            block.collect(Gram)
        block.collect(Gram)
        assert runs == [0, 1]
    block.collect(Gram)
    assert runs == [0, 1] * 2
    for kind, statistics in together.items():
        for name, statistic in statistics.items():
            assert torch.equal(statistic.total, alone[kind][name].total)


def test_shared_statistics_are_those_of_the_weights_at_the_first_call(folders):
    block = first_block(folders["llama"])
    before = block.collect(Gram)["mlp.down_proj"].total
    with block.sharing(Gram, SquaredNorm):
        block.collect(SquaredNorm)
        block.linears["mlp.up_proj"].weight = 2 * block.linears["mlp.up_proj"].weight
        assert torch.equal(block.collect(Gram)["mlp.down_proj"].total, before)
    assert not torch.equal(block.collect(Gram)["mlp.down_proj"].total, before)


def test_statistics_need_windows(folder):
    with pytest.raises(RunError, match="there are no calibration windows"):
        first_block(folder, windows=False).collect(SquaredNorm)


def test_the_state_holds_the_very_tensors_that_were_read(folder):
    block = first_block(folder, windows=False)
    state = block.state(torch.bfloat16)
    assert {f"{block.name}.{name}" for name in block.module.state_dict()} == set(state)
    for name, tensor in state.items():
        assert tensor.data_ptr() == block.stored[name].data_ptr(), name
        assert torch.equal(tensor, block.stored[name])


def test_what_was_changed_is_in_the_state_and_nothing_else(folder):
    block = first_block(folder, windows=False)
    linear = last_linear(block)
    norm, vector = next((name, p) for name, p in block.module.named_parameters() if p.dim() == 1)
    linear.weight = 2 * linear.weight
    linear.bias = torch.full((linear.shape[0],), 0.3)
    with torch.no_grad():
        vector += 1
    state = block.state(torch.bfloat16)
    changed = {name for name, tensor in state.items() if not same(block.stored.get(name, torch.empty(0)), tensor)}
    assert changed == {f"{linear.name}.weight", f"{linear.name}.bias", f"{block.name}.{norm}"}
    assert {state[name].dtype for name in changed} == {torch.bfloat16}


def test_a_weight_is_rounded_to_storage_and_computed_with(folder):
    """Storage in bfloat16, products in float32; [out, in] whatever the orientation of the module."""
    block = first_block(folder)
    linear = last_linear(block)
    assert linear.weight.dtype == torch.float32
    new = torch.randn(linear.shape)
    linear.weight = new
    assert torch.equal(linear.stored, new.bfloat16())
    assert torch.equal(linear.weight, new.bfloat16().float())
    x = torch.randn(5, linear.shape[1])
    bias = 0 if linear.bias is None else linear.bias
    torch.testing.assert_close(linear.module(x).detach(), x @ linear.weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_resized_weight_resizes_the_module(folder):
    block = first_block(folder, windows=False)
    linear = last_linear(block)
    out, width = linear.shape
    linear.weight = torch.ones(out, width - 8)
    assert linear.shape == (out, width - 8)
    assert linear.module(torch.ones(2, width - 8)).shape == (2, out)


def test_a_bias_may_be_added_and_must_fit(folders):
    block = first_block(folders["llama"], windows=False)
    linear = block.linears["mlp.up_proj"]
    assert linear.bias is None
    plain = linear.module(torch.ones(1, linear.shape[1])).detach()
    linear.bias = torch.full((linear.shape[0],), 0.3)
    assert torch.equal(linear.bias, torch.full((linear.shape[0],), 0.3).bfloat16().float())
    torch.testing.assert_close(linear.module(torch.ones(1, linear.shape[1])).detach(), plain + linear.bias)
    with pytest.raises(ValueError, match="does not fit 64 outputs"):
        linear.bias = torch.zeros(3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused(folders, value):
    block = first_block(folders["llama"], windows=False)
    linear = block.linears["mlp.up_proj"]
    broken = linear.weight.double()
    broken[1, 2] = value
    with pytest.raises(RunError, match="the new weights do not fit"):
        linear.weight = broken
    with pytest.raises(RunError, match="the new bias does not fit"):
        linear.bias = torch.full((linear.shape[0],), value, dtype=torch.float64)


def test_changes_of_the_modules_themselves_are_taken_in(folder):
    block = first_block(folder, windows=False)
    untouched = {name: linear.stored for name, linear in block.linears.items()}
    linear = last_linear(block)
    with torch.no_grad():
        linear.module.weight.mul_(2)
    assert torch.equal(linear.weight, untouched[list(block.linears)[-1]].float())
    block.take_in_changes()
    assert torch.equal(linear.weight, 2 * untouched[list(block.linears)[-1]].float())
    assert all(linear.stored is untouched[name] for name, linear in list(block.linears.items())[:-1])


def test_a_forward_pass_with_other_weights_leaves_the_block_alone(folder):
    block = first_block(folder)
    linear, name = last_linear(block), list(block.linears)[-1]
    hidden = block.activations.read(0, block.device)
    other = (linear.weight * 1.5).requires_grad_()
    before = block.forward(hidden.clone()).detach()
    with torch.enable_grad():
        outputs = block.forward(hidden, {name: other})
        (gradient,) = torch.autograd.grad(outputs.square().sum(), other)
    assert gradient.shape == linear.shape
    assert gradient.abs().sum() > 0
    assert torch.equal(block.forward(hidden.clone()), before)
    with torch.no_grad():
        assert torch.equal(block.forward(hidden, {name: linear.weight}), before)
        linear.weight = other.detach()
        torch.testing.assert_close(
            block.forward(hidden.clone()), block.forward(hidden, {name: linear.weight}), rtol=0, atol=0
        )
    assert not torch.equal(outputs.detach(), before)


def test_the_error_of_the_outputs_is_measured_against_the_dense_block(folders):
    stream = Model(open_source(folders["llama"])).blocks(token_ids(3), batch=2)
    errors, hidden = [], []
    for block in stream:
        block.collect(SquaredNorm)
        hidden = block.activations.hidden[:2].clone()
        dense = block.run(0)
        if block.index == 1:
            linear = block.linears["mlp.down_proj"]
            linear.weight = 0.5 * linear.weight
        expected = relative_error(block.run(0), dense)
        block.propagate()
        errors.append((block.relative_error, expected))
        block.activations.write(0, hidden)  # as if it had not run; the stream runs it
        block._dense = None
    assert all(found == expected for found, expected in errors)
    assert [found > 0 for found, _ in errors] == [False, True] + [False] * (BLOCKS - 2)


def test_outputs_that_are_not_finite_name_the_block(folders):
    block = first_block(folders["llama"], arithmetic=Arithmetic(torch.float16))
    with torch.no_grad():
        block.module.mlp.down_proj.weight.fill_(6e4)
        block.module.mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(
        RunError, match=r"outputs of model\.layers\.0 hold NaN or infinite values in float16; compute in float32"
    ):
        block.propagate()


def test_relative_error_is_a_ratio_of_norms():
    before = torch.tensor([3.0, 4.0])
    assert relative_error(before + torch.tensor([0.0, 0.5]), before) == pytest.approx(0.1)
    assert relative_error(before.bfloat16(), before) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_all_finite():
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.tensor([[1.0, -2.0]]))
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.tensor([[1.0, value], [2.0, 3.0]]))


def test_a_part_of_the_windows_is_all_that_statistics_see(folder):
    block = first_block(folder)
    whole = block.activations
    with block.limited_to(slice(0, 1)):
        norms = block.collect(SquaredNorm)
        assert block.run(0).shape[0] == 1
        assert block.activations.hidden.data_ptr() == whole.hidden.data_ptr()
    assert block.activations is whole
    attention = next(iter(block.linears))
    assert norms[attention].count == whole.shape[1]
    block.propagate()  # the error of the dense outputs that are known, fewer than a batch
    assert block.relative_error is not None


def test_another_shape_of_batch_runs_too(folder):
    block = first_block(folder)
    batch, hidden = block.run(0), block.activations.read(0, torch.device("cpu"))
    rows = torch.cat([hidden, hidden, hidden[:1]])
    with torch.no_grad():
        torch.testing.assert_close(block.forward(rows)[:2], batch, rtol=1e-4, atol=1e-4)


def test_other_parameters_may_be_replaced_and_set(folders):
    block = first_block(folders["llama"])
    name = "input_layernorm.weight"
    value = block.module.get_parameter(name).detach().float() * 1.3
    hidden, before = block.activations.read(0, torch.device("cpu")), block.run(0)
    changed = block.forward(hidden, others={name: value.to(torch.bfloat16)})
    assert not torch.equal(changed, before)
    assert torch.equal(block.run(0), before)
    block.set_parameter(name, value)
    assert torch.equal(block.run(0), changed)
    assert torch.equal(block.state(torch.bfloat16)[f"{block.name}.{name}"], value.to(torch.bfloat16))
    with pytest.raises(RunError, match=r"input_layernorm\.weight: the new values"):
        block.set_parameter(name, value * float("nan"))


def test_outputs_are_written_without_changing_the_inputs(folder):
    block = first_block(folder)
    before = block.activations.hidden.clone()
    into = Activations(block.activations.shape, before.dtype, 2, 2**20)
    block.write_outputs(into)
    assert torch.equal(block.activations.hidden, before)
    block.propagate()
    assert torch.equal(block.activations.hidden, into.hidden)
