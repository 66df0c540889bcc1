"""Intermediate results and rewritten blocks of a run: computed once, continued when interrupted, removed at the end."""

from dataclasses import dataclass, field

import pytest
import torch
from disk import CALIBRATION, contents, crash_states, model_files
from families import save_model, token_ids

from budwood.checkpoints.work import Work
from budwood.errors import RunError, UsageError
from budwood.methods.magnitude import Magnitude
from budwood.methods.method import Step, Wrapper
from budwood.pruning import prune
from budwood.runs.target import WORK

IDS = token_ids(1, 400) % 90 + 3


class Stopped(RunError):
    """What ends a run in these tests."""


@dataclass
class Script:
    """When the method below stops, and what it computed."""

    stop_at_block: int | None = None
    stop_in_rewrite: int | None = None
    surveys: list[str] = field(default_factory=list)


SCRIPT = Script()


@dataclass(frozen=True)
class Surveyed(Wrapper):
    """Surveys the model before the stream, and scales a norm of every block after it."""

    @property
    def calibrated(self):
        return True

    def prepare(self, model, windows, work):
        def survey():
            SCRIPT.surveys.append("record")
            return {"scale": 1.5}

        def tensors():
            SCRIPT.surveys.append("tensors")
            return {"shift": torch.tensor([0.25])}

        scale, shift = work.record("survey", survey)["scale"], work.tensors("shift", tensors)["shift"]
        return SurveyedStep(self.inner.prepare(model, windows, work), scale, shift)


@dataclass(frozen=True)
class SurveyedStep(Step):
    inner: Step
    scale: float
    shift: torch.Tensor

    def __call__(self, block):
        if block.index == SCRIPT.stop_at_block:
            raise Stopped("stopped in the stream")
        self.inner(block)

    def finish(self, run):
        self.inner.finish(run)
        for block in run.rewrite():
            if block.index == SCRIPT.stop_in_rewrite:
                raise Stopped("stopped while rewriting")
            block.module.post_attention_layernorm.weight.mul_(self.scale).add_(self.shift)


METHOD = Surveyed(Magnitude("2:4"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setitem(globals(), "SCRIPT", Script())
    return SCRIPT


def run(llama, target, **options):
    return prune(llama, target, METHOD, IDS, **CALIBRATION, **options)


def test_work_is_computed_once(tmp_path):
    work, made = Work(tmp_path / "work"), []
    for _ in range(2):
        assert work.record("a", lambda: made.append("a") or {"x": [1, 2]}) == {"x": [1, 2]}
        found = work.tensors("b", lambda: made.append("b") or {"y": torch.arange(3)})
        assert torch.equal(found["y"], torch.arange(3))
    assert made == ["a", "b"]
    work.save("b", {"y": torch.arange(4)})
    assert len(work.tensors("b", dict)["y"]) == 4


def test_work_survives_a_failure_and_goes_when_the_run_is_finished(llama, tmp_path, script):
    script.stop_at_block = 2
    with pytest.raises(Stopped):
        run(llama, tmp_path / "out")
    assert (tmp_path / "out" / WORK / "survey.json").is_file()
    script.stop_at_block = None
    report = run(llama, tmp_path / "out")
    assert script.surveys == ["record", "tensors"]
    assert [block["seconds"] is None for block in report["blocks"]] == [True, True, False, False]
    assert not (tmp_path / "out" / WORK).exists()
    run(llama, tmp_path / "whole")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


@pytest.mark.parametrize("block", [0, 2])
def test_a_rewrite_that_failed_is_continued(llama, tmp_path, script, block):
    script.stop_in_rewrite = block
    with pytest.raises(Stopped):
        run(llama, tmp_path / "out")
    script.stop_in_rewrite = None
    report = run(llama, tmp_path / "out")
    assert all(one["seconds"] is None for one in report["blocks"])
    run(llama, tmp_path / "whole")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_a_kill_at_any_moment_never_rewrites_a_block_twice(llama, tmp_path, script, monkeypatch):
    states = crash_states(monkeypatch, tmp_path / "out", tmp_path / "states", lambda: run(llama, tmp_path / "out"))
    rewriting = [state for state in states if list((state / WORK).glob("rewrite-1*"))]
    assert len(rewriting) > 8
    expected = model_files(tmp_path / "out")
    for state in states[::4] + rewriting:
        run(llama, state)
        assert model_files(state) == expected, state


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_deleted_shard_of_a_rewritten_folder_is_written_again(llama, tmp_path, script, which):
    """The other shards are rewritten ones, which are no inputs for its block: all are done again."""
    run(llama, tmp_path / "out")
    expected = model_files(tmp_path / "out")
    sorted((tmp_path / "out").glob("*.safetensors"))[which].unlink()
    run(llama, tmp_path / "out")
    assert model_files(tmp_path / "out") == expected


def test_stale_work_in_a_finished_folder_is_not_used(llama, tmp_path, script, monkeypatch):
    """A kill while the work folder is removed leaves parts of it; then a shard is deleted."""
    states = crash_states(monkeypatch, tmp_path / "out", tmp_path / "states", lambda: run(llama, tmp_path / "out"))
    expected = model_files(tmp_path / "out")
    stale = [state for state in states if (state / "config.json").is_file() and (state / WORK).is_dir()]
    assert len(stale) > 2
    for state in stale:
        sorted(state.glob("*.safetensors"))[2].unlink()
        run(llama, state)
        assert model_files(state) == expected, state


@pytest.mark.parametrize("created", [True, False])
def test_a_failure_before_the_first_block_leaves_nothing(llama, tmp_path, created):
    from budwood.methods import parse_method

    target = tmp_path / "a" / "out"
    if not created:
        target.mkdir(parents=True)
    save_model(
        "llama", tmp_path / "nan", change=lambda m: m.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    )
    for method in ('magnitude("2:4")', parse_method("wrp()")):
        with pytest.raises(RunError, match="NaN"):
            prune(tmp_path / "nan", target, method, IDS, **CALIBRATION)
        assert (tmp_path / "a").exists() is not created
        assert created or list(target.iterdir()) == []


def test_a_failure_after_the_first_block_keeps_it(llama, tmp_path, script):
    script.stop_at_block = 1
    with pytest.raises(Stopped):
        run(llama, tmp_path / "out")
    kept = [name for name in contents(tmp_path / "out") if name.endswith(".safetensors") and WORK not in name]
    assert kept == ["sparse-00002-of-00005.safetensors"]
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(UsageError, match="holds another run"):
        prune(llama, tmp_path / "out", 'magnitude("2:4")')
    script.stop_at_block = None
    report = run(llama, tmp_path / "out")
    assert [block["seconds"] is None for block in report["blocks"]] == [True, False, False, False]
