"""A comparison that is killed at any moment, or interrupted: the same command ends with the same results."""

import json
import shutil
from dataclasses import replace

import malformed
import pytest
from disk import crash_states
from families import save_model
from safetensors.torch import load_file, save_file

from budwood.comparison import execute
from budwood.comparison.compare import Comparison, compare
from budwood.comparison.task import FILE, STEPS, begin
from budwood.errors import RunError, UsageError
from budwood.progress import Silent
from budwood.runs.target import Target

RECIPE = """\
title: Tiny
sources: {{tiny: {folder}/dense}}
calibration: {{data: {folder}/text.txt, num_samples: 4, seq_length: 24}}
prune: {{compute_dtype: float32, sparse_products: "off", attention: fused}}
methods:
  - dense
  - rtn("int8")
  - wanda("2:4")
evaluate:
  texts:
    words: {{data: {folder}/text.txt, seq_length: 32, limit: 1}}
keep_models: false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_model("llama", folder / "dense")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


def figures(results):
    """What is measured, without times."""
    timed = ("seconds", "peak memory")
    return {
        row["name"]: {name: value for name, value in row["figures"].items() if name not in timed}
        for row in results["rows"]
    }


def test_killed_at_any_moment_it_ends_with_the_same_figures(recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    states = crash_states(monkeypatch, out, tmp_path / "states", lambda: compare(recipe, out, jobs=0))
    expected = figures(json.loads((out / "results.json").read_text()))
    assert set(expected["tiny-wanda-2-4-0"]) >= {"perplexity words", "D", "bits per weight", "density"}
    assert len(states) > 20
    # Some of them, from before the first record to the last deletion of a model.
    for state in [*states[:: len(states) // 5], states[-1]]:
        again = tmp_path / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(state, again)
        done = {file: file.stat().st_mtime_ns for file in again.glob("runs/*/steps/*.json")}
        results = compare(recipe, again, jobs=0)
        assert figures(results) == expected, state
        assert results["complete"]
        assert {file: file.stat().st_mtime_ns for file in done} == done  # finished steps are not done again
        assert not list(again.glob("runs/*/model"))


def test_an_interruption_keeps_what_is_finished(recipe, tmp_path, monkeypatch):
    real = execute.MEASURES["perplexity"]
    calls = []

    def interrupted(models, asked):
        calls.append(models.task.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(models, asked)

    with monkeypatch.context() as patched:
        patched.setitem(execute.MEASURES, "perplexity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe, tmp_path / "out", jobs=0)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["status"] for row in found["rows"]] == ["done", "waiting", "waiting"]
    assert compare(recipe, tmp_path / "out", jobs=0)["complete"]


def test_two_processes_do_not_fill_one_folder(recipe, tmp_path):
    held = Target.claim(tmp_path / "out")
    try:
        with pytest.raises(UsageError, match="another budwood process writes to"):
            compare(recipe, tmp_path / "out", jobs=0)
    finally:
        held.release()


@pytest.fixture
def begun(recipe, tmp_path):
    """A comparison of a source of its own, of which every run is noted in its folder."""
    source = shutil.copytree(recipe.parent / "dense", tmp_path / "dense")
    (tmp_path / "recipe.yaml").write_text(recipe.read_text().replace(f"{recipe.parent}/dense", str(source)))

    def read():
        found = Comparison.read(tmp_path / "recipe.yaml", tmp_path / "out", jobs=0)
        found.find_tasks()
        return found

    for task in read().tasks.values():
        begin(task)
    return read


def test_a_source_that_changed_behind_the_first_bytes_is_another_run(begun, tmp_path):
    """Finished figures would be those of another model."""
    begun()
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    assert tensors["model.embed_tokens.weight"].nbytes > 2 * 4096
    tensors["model.embed_tokens.weight"][-1, -1] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match="holds another run: its content is"):
        begun()


def test_a_companion_that_changed_is_another_source(begun, tmp_path):
    (tmp_path / "dense" / "generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(UsageError, match="holds another run"):
        begun()


def test_a_source_that_changes_during_a_comparison_gives_no_figures(begun):
    task = begun().tasks["tiny-wanda-2-4-0"]
    source = {**task.identity["source"], "content": "another"}
    changed = replace(task, identity={**task.identity, "source": source})
    assert "was changed during the comparison" in execute.execute(changed, Silent())
    assert changed.missing()[0] == "prune"


@pytest.mark.parametrize("content", [*malformed.WHOLE, '{"identity": []}', '{"id": 3}'], ids=lambda text: text[:6])
def test_a_record_that_is_damaged_is_one_sentence(begun, content):
    task = begun().tasks["tiny-wanda-2-4-0"]
    (task.folder / FILE).write_text(content)
    with pytest.raises(RunError, match=r"run\.json is damaged.*delete it"):
        begun()
    (task.folder / STEPS).mkdir()
    (task.folder / STEPS / "prune.json").write_text(content)
    with pytest.raises(RunError, match=r"prune\.json is damaged.*delete it"):
        task.missing()


def test_a_record_of_its_step_with_other_content_is_one_sentence(begun):
    task = begun().tasks["tiny-wanda-2-4-0"]
    sound = {"seconds": 1.0, "machine": {}, "results": []}
    task.write("perplexity words", sound)
    assert task.record("perplexity words")
    for change in ({"seconds": "x"}, {"machine": None}, {"results": [3]}, {"results": {}}, {"seconds": 10**400}):
        task.write("perplexity words", sound | change)
        with pytest.raises(RunError, match=r"perplexity-words\.json is damaged"):
            task.record("perplexity words")
