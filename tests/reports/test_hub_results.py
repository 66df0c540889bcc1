"""Results in the forms of the hub: huggingface_hub reads both, conditions are with them, users' entries stay."""

import json
import math

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_markdown import report

from budwood.checkpoints.files import write_json
from budwood.reports.card import render_card, with_section
from budwood.reports.conditions import Conditions, Text
from budwood.reports.hub_results import FILE, data_of, entries, with_index, write_entries
from budwood.reports.result_files import add_results
from budwood.reports.results import Perplexity, TaskMetric, TaskScore
from budwood.runs.target import MANIFEST, Target

hub = pytest.importorskip("huggingface_hub._eval_results", reason="an older huggingface_hub")
MACHINE = {"processor": "a processor", "instructions": "AVX2", "threads": 2}
UNDER = Conditions("float32", "cpu", MACHINE, {"torch": "2.13.0"}, "2026-01-02T03:04:05+00:00")


def perplexity(data="wikitext2", name="wikitext2", loss=3.0):
    text = Text(name, data, "plain", "auto", None, 2, 2048, "ab" * 32)
    return Perplexity("out", text, (loss, loss + 0.5), UNDER)


def task(name="piqa", value=0.6, limit=None):
    metric = TaskMetric("acc_norm", "none", value, 0.02, True, (1.0, 0.0))
    return TaskScore("out", name, "1.0", 0, "acc_norm", (metric,), 2, limit, "a folder", "cd" * 32, UNDER)


def card(**changes):
    report = {
        "budwood": "0.1.0",
        "source": "base",
        "method": "wrp()",
        "created": "2026-01-02",
        "machine": MACHINE,
        "data": None,
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "format": "auto",
        "totals": dict.fromkeys(("parameters", "in_scope", "bytes", "bytes_dense"), 10)
        | {"coverage": 1.0, "density": 0.5, "recovered": None, "bits_per_weight": 9.0},
        "blocks": [],
        "linears": {},
        "seconds": {},
        "peak_memory": 1,
        "notes": [],
    }
    return render_card(report | changes, "owner/base", "apache-2.0", "LlamaForCausalLM")


def test_the_hub_reads_the_entries():
    found = entries([perplexity(), task(limit=100)])
    parsed = hub.parse_eval_result_entries(yaml.safe_load(yaml.safe_dump(found)))
    assert [(entry.dataset_id, entry.task_id) for entry in parsed] == [
        ("Salesforce/wikitext", "perplexity"),
        ("ybisk/piqa", "piqa"),
    ]
    assert parsed[0].value == pytest.approx(math.exp(3.25))
    assert parsed[1].value == 0.6
    assert parsed[0].date == UNDER.created
    for condition in ("plain", "windows 2", "window_tokens 2048", "float32", "a processor", "threads 2", "2.13.0"):
        assert condition in parsed[0].notes
    assert "all_items False" in parsed[1].notes


def test_texts_of_the_users_own_are_no_data_set_of_the_hub(tmp_path):
    own = perplexity(data="/home/someone/secret.txt", name="mine")
    assert data_of(own) is None
    assert entries([own]) == []
    write_entries(tmp_path, [perplexity()])
    assert yaml.safe_load((tmp_path / FILE).read_text())[0]["dataset"]["id"] == "Salesforce/wikitext"
    write_entries(tmp_path, [own])
    assert not (tmp_path / FILE).exists()
    assert "secret" not in with_index(card(), [own], "out")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:owner/data:test", ("owner/data", None, "test")),
        ("hf:owner/data:small:test", ("owner/data", "small", "test")),
        ("hf:owner/data:small:test:body", ("owner/data", "small", "test")),
        ("hf:owner/data::test:body", ("owner/data", None, "test")),
        ("c4", ("allenai/c4", "en", "validation")),
    ],
)
def test_names_of_the_hub_lead_to_their_data_set(name, expected):
    found = data_of(perplexity(data=name))
    assert (found.id, found.config, found.split) == expected


def test_evaluate_adds_to_report_card_and_entries_and_a_new_model_starts_without(tmp_path):
    (tmp_path / "README.md").write_text(card())
    (tmp_path / "report.json").write_text(json.dumps(report()))
    for _ in range(2):
        assert add_results(tmp_path, [perplexity(), task()])
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Evaluation") == 1
    assert len(ModelCard(text).data.eval_results) == 2
    assert len(yaml.safe_load((tmp_path / FILE).read_text())) == 2
    target = Target.claim(tmp_path)
    try:
        write_json(tmp_path / MANIFEST, {"files": ["README.md", "report.json"]})
        target.stage(["report.json"])
        target.note(["report.json"])
        (target.folder / "report.json").write_text("{}")
        target.complete()
    finally:
        target.release()
    assert not (tmp_path / FILE).parent.exists()
    assert (tmp_path / "report.json").read_text() == "{}"


def test_the_model_index_has_every_result_with_its_conditions():
    read = ModelCard(with_index(card(), [perplexity(), perplexity("mine.txt", "mine"), task()], "out")).data
    assert [(found.dataset_type, found.metric_type) for found in read.eval_results] == [
        ("Salesforce/wikitext", "perplexity"),
        ("text", "perplexity"),
        ("ybisk/piqa", "acc_norm"),
    ]
    assert read.eval_results[0].metric_args["window_tokens"] == 2048
    assert read.base_model == "owner/base"
    assert read.license == "apache-2.0"


def test_a_later_result_takes_the_place_of_an_earlier_one_and_others_stay():
    first = with_index(card(), [perplexity(), task()], "out")
    again = with_index(first, [perplexity(loss=2.0)], "out")
    name, found = model_index_to_eval_results(yaml.safe_load(again.split("---")[1])["model-index"])
    assert name == "out"
    assert sorted((each.metric_type, round(each.metric_value, 3)) for each in found) == [
        ("acc_norm", 0.6),
        ("perplexity", round(math.exp(2.25), 3)),
    ]
    assert again.split("---", 2)[2] == card().split("---", 2)[2]


@pytest.mark.parametrize("text", ["no metadata", "---\n[1, 2\n---\nbroken", "---\n- a list\n---\nx"])
def test_a_card_without_readable_metadata_is_left_alone(text):
    assert with_index(text, [perplexity()], "out") == text


def test_hostile_names_are_text():
    hostile = "x: [\n---\n<script>\u202e"
    made = with_index(card(), [perplexity("mine.txt", hostile)], hostile)
    (found,) = ModelCard(made).data.eval_results
    assert found.dataset_name == "x: [\n---\n<script>\\u202e"
    assert made.count("\n---\n") == card().count("\n---\n")


def test_a_section_takes_the_place_of_what_the_card_said_of_it():
    made = card()
    assert made.count("not measured when this card was written") == 2
    made = with_section(made, "## Evaluation", "| figures |")
    made = with_section(made, "## Speed", "| times |")
    assert "not measured when this card was written" not in made
    assert "- Perplexity: see [Evaluation](#evaluation)." in made
    assert "- Speed: see [Speed](#speed)." in made
