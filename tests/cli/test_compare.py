"""`budwood compare` on a tiny model: planned, carried out, continued, with a row that fails and one that is added."""

import csv
import json
import math

import pytest
from families import save_model

RECIPE = """\
title: Tiny
sources: {{tiny: {folder}/dense}}
calibration: {{data: {folder}/text.txt, num_samples: 4, seq_length: 24}}
prune: {{compute_dtype: float32, sparse_products: "off", attention: fused}}
methods:
  - dense
  - rtn("int4", group=16)
  - magnitude("2:4")
  - name: WRP
    method: wrp(alpha={{0.25,0.5}})
evaluate:
  texts:
    words: {{data: {folder}/text.txt, seq_length: 32, limit: 3}}
  divergence: true
keep_models: false
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_model("llama", folder / "dense")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


def times(out):
    """When each record of a step was written."""
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in out.glob("runs/*/steps/*.json")}


def test_a_comparison_from_the_plan_to_an_added_row(tiny, tmp_path, run_here):
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    text = (tiny / "recipe.yaml").read_text()
    recipe.write_text(text)
    shown = run_here("compare", recipe, out, "--dry-run")
    assert shown.status == 0, shown.stderr
    assert "5 runs, 0 of them finished" in shown.stdout
    assert "are free" in shown.stdout
    assert not out.exists()

    # A text too short for one window fails while it runs: the row is recorded, the others go on.
    (tmp_path / "short.txt").write_text("the")
    recipe.write_text(
        text.replace(
            "  - dense",
            f"  - dense\n  - name: short\n    method: wanda\n    calibration: {{data: {tmp_path}/short.txt}}",
        )
    )
    done = run_here("compare", recipe, out, "--jobs", "0", "--json")
    assert done.status == 1, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    failed = rows.pop("tiny-short-0")
    assert failed["status"] == "failed"
    assert "window" in failed["error"]
    assert {row["status"] for row in rows.values()} == {"done"}
    for row in rows.values():
        assert row["figures"]["D words"] == pytest.approx(
            math.log(row["figures"]["perplexity words"] / rows["tiny-dense-0"]["figures"]["perplexity words"])
        )
        if row["kind"] != "dense":
            assert {result["kind"] for result in row["results"]} == {"perplexity", "divergence", "pair"}
        assert not (out / "runs" / row["name"] / "model").exists()
    quantised = rows["tiny-rtn-int4-group-16-0"]
    assert quantised["figures"]["bits per weight"] == pytest.approx(4 + 20 / 16)
    assert quantised["figures"]["bytes"] < 0.3 * rows["tiny-dense-0"]["figures"]["bytes"]
    assert rows["tiny-wrp-alpha-0.25-0"]["settings"] == {"alpha": 0.25}

    # The failing row goes, another comes: only that is carried out.
    before = times(out)
    recipe.write_text(text.replace("  - dense", '  - dense\n  - magnitude("4:8")'))
    done = run_here("compare", recipe, out, "--jobs", "0")
    assert done.status == 0, done.stderr
    after = times(out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in set(after) - set(before)} == {"tiny-magnitude-4-8-0"}
    with open(out / "results.csv", newline="") as lines:
        found = list(csv.DictReader(lines))
    assert list(found[0])[:2] == ["label", "alpha"]
    assert [line["alpha"] for line in found if line["row"] == "WRP"] == ["0.25", "0.5"]
    from pyarrow import parquet

    assert parquet.read_table(out / "results.parquet").num_rows == len(found) == 6
    assert "| WRP | 0.5 |" in (out / "results.md").read_text()

    # The same name with other settings is another run.
    recipe.write_text(text.replace("num_samples: 4", "num_samples: 3"))
    refused = run_here("compare", recipe, out)
    assert refused.status == 2
    assert "line 10: " in refused.stderr
    assert "holds another run: its num_samples is 4, asked for is 3" in refused.stderr


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("text.txt, num", "none.txt, num", 3, "no file, folder or data set"),
        ("/dense}", "/danse}", 2, "did you mean"),
        ("words: {data: ", "words: {data: no-such-", 13, "no file, folder or data set"),
        ("divergence: true", "tasks: {names: [piqa], data: nowhere}", 14, "there is no folder nowhere"),
        ('magnitude("2:4")', "reap(keep=0.5)", 8, "expert"),
        ('magnitude("2:4")', 'magnitude("2:64")', 8, "64"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_refused_before_anything_runs(
    tiny, tmp_path, run_here, old, new, line, reason
):
    text = (tiny / "recipe.yaml").read_text()
    assert old in text
    (tmp_path / "recipe.yaml").write_text(text.replace(old, new, 1))
    refused = run_here("compare", tmp_path / "recipe.yaml", tmp_path / "out", "--dry-run")
    assert refused.status == 2, refused.stderr
    assert f"recipe.yaml, line {line}: " in refused.stderr
    assert reason in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "data"], "NAME=VALUE"),
        (["--set", "a=1", "--set", "a=2"], "given twice"),
        (["--set", "data=x"], "no variable data"),
    ],
)
def test_variables_on_the_command_line(tiny, tmp_path, run_here, arguments, reason):
    refused = run_here("compare", tiny / "recipe.yaml", tmp_path / "out", *arguments)
    assert refused.status == 2
    assert reason in refused.stderr


def test_a_folder_that_holds_something_else(tiny, run_here):
    refused = run_here("compare", tiny / "recipe.yaml", tiny)
    assert refused.status == 2
    assert "holds no comparison" in refused.stderr
