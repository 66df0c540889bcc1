"""Reading recipes: what is refused, with line and reason; and every recipe of the repository."""

from pathlib import Path

import pytest

from budwood.comparison.document import read_document
from budwood.comparison.published import read_published
from budwood.comparison.recipe import read_recipe_file
from budwood.comparison.rounding import Rtn, parse_row
from budwood.comparison.runs import runs_of
from budwood.errors import UsageError

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
TABLES = sorted((RECIPES / "published").glob("*.yaml"))
PAPERS = ("wanda", "sparsegpt", "gblm", "flap", "perp", "sds", "tyr")

GOOD = """\
title: Test
variables: {text: words.txt, share: 0.25}
sources:
  tiny: ./tiny
calibration: {data: "${text}", num_samples: 4}
methods:
  - dense
  - name: WRP
    method: wrp(alpha={0.1,0.2})
  - wanda("2:4")
evaluate:
  texts:
    words: {data: "${text}", limit: 2}
"""


def read(folder, content, **variables):
    file = folder / "recipe.yaml"
    file.write_text(content)
    return read_recipe_file(file, variables)


def test_a_recipe_is_expanded(tmp_path):
    recipe = read(tmp_path, GOOD.replace("methods:", "draws: 2\nmethods:"), text="other.txt")
    runs = runs_of(recipe)
    assert [run.name for run in runs] == [
        "tiny-dense-0",
        *(f"tiny-wrp-alpha-{alpha}-{draw}" for alpha in (0.1, 0.2) for draw in (0, 1)),
        "tiny-wanda-2-4-0",
        "tiny-wanda-2-4-1",
    ]
    assert [run.settings for run in runs[1:4]] == [{"alpha": 0.1}, {"alpha": 0.1}, {"alpha": 0.2}]
    assert {run.row for run in runs} == {"dense", "WRP", 'wanda("2:4")'}
    assert runs[1].calibration.data == recipe.fields.evaluate.texts["words"].data == "other.txt"


def test_the_names_of_runs_do_not_depend_on_other_rows(tmp_path):
    before = {run.name for run in runs_of(read(tmp_path, GOOD))}
    more = GOOD.replace("sources:\n", "sources:\n  large: ./large\n").replace(
        "  - dense\n", "  - dense\n  - magnitude\n"
    )
    assert before < {run.name for run in runs_of(read(tmp_path, more))}


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("wanda(", "wnda(", 10, "did you mean wanda"),
        ("alpha=", "alpa=", 9, "no option alpa"),
        ("0.1,0.2}", "0.1,2}", 9, "alpha must be a number from 0 to 1"),
        ("{0.1,0.2}", "{0.1,}", 9, "empty alternative"),
        ("{0.1,0.2}", "{0.1,0.10}", 9, "two points of the grid are"),
        ("title: Test", "titel: Test", 1, "no field titel in a recipe; .* did you mean title"),
        ("num_samples: 4", "num_sample: 4", 5, "did you mean num_samples"),
        ("num_samples: 4", "num_samples: none", 5, "valid integer, got 'none'"),
        ("num_samples: 4", "num_samples: 0", 5, "greater than or equal to 1"),
        ("limit: 2", "limits: 2", 13, "no field limits in evaluate.texts.words"),
        ("limit: 2", "variant: gpt", 13, "got 'gpt'"),
        ("  - name: WRP\n", "  - naem: WRP\n", 8, "no field naem"),
        ("  - dense\n", "  - name: WRP\n    method: dense\n", 9, "the name WRP is that of the row in line 7 too"),
        ("  - dense\n", "  - dense\n  - dense\n", 8, "the name dense is that of the row in line 7"),
        ('"${text}", num', '"${txt}", num', 5, "no variable txt"),
        ("title: Test", "title: Test\ntitle: again", 2, "title is there twice, first in line 1"),
        ("methods:", "methods: &all", 6, "anchors and aliases"),
        ("title: Test", "title: !!python/object:os.system Test", 1, "cannot be used here"),
        ("title: Test", "title: a: b", 1, "no YAML"),
        ("evaluate:\n", "evaluate:\n  divergence: {texts: [c4]}\n", 12, "no text c4"),
        ("evaluate:\n", "evaluate:\n  stream: true\n  repetition: true\n", 13, "leave out stream"),
        ("    method: wrp", "    sources: [small]\n    method: wrp", 9, "no source small"),
        ("    method: wrp", "    calibration: {data: null}\n    method: wrp", 10, "needs text"),
        ("    method: wrp", "    prune: {format: zip}\n    method: wrp", 9, "no format 'zip'"),
        ("evaluate:\n", "draws: [1, 1]\nevaluate:\n", 11, "different seeds"),
        ("evaluate:\n", "published: [none.yaml]\nevaluate:\n", 11, "there is no file"),
        ('  - wanda("2:4")', '  - refit(rtn("int4"))', 10, "rtn stands alone"),
        ('  - wanda("2:4")', '  - rtn("int3")', 10, "values must be one of"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path, old, new, line, reason):
    assert old in GOOD
    with pytest.raises(UsageError, match=rf"recipe.yaml, line {line}: .*{reason}"):
        read(tmp_path, GOOD.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "- a\n", "title", "[" * 5000, "a: " + "{b: " * 3000, "\x00", "a: \x07"])
def test_text_that_is_no_recipe(tmp_path, text):
    with pytest.raises(UsageError):
        read(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"title: \xff\xfe")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_recipe_file(tmp_path / "recipe.yaml")


def test_a_variable_that_the_recipe_does_not_have(tmp_path):
    with pytest.raises(UsageError, match="no variable data; it has text, share"):
        read(tmp_path, GOOD, data="x")


def test_values_keep_their_types_and_a_pattern_is_no_number(tmp_path):
    file = tmp_path / "values.yaml"
    file.write_text(
        "variables: {n: 8}\npattern: 2:4\nnumber: ${n}\ntext: a ${n} b\nfile: ${here}/x\nwhen: 2026-01-01\n"
    )
    found = read_document(file, {"n": "12"}).content
    assert found["pattern"] == "2:4"
    assert found["number"] == 12
    assert found["text"] == "a 12 b"
    assert found["file"] == f"{tmp_path}/x"
    assert found["when"] == "2026-01-01"


def test_rows_of_a_recipe():
    assert parse_row("dense") is None
    assert parse_row('rtn("int4", group=64)') == Rtn("int4", 64)
    assert str(parse_row("rtn")) == 'rtn("int8")'


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_of_the_repository(file):
    recipe = read_recipe_file(file)
    runs = runs_of(recipe)
    assert len(runs) > 0
    assert recipe.fields.keep_models is False
    rows = {row.name or row.text for row in recipe.rows}
    for table in recipe.published if not file.stem.endswith("smollm2") else ():
        assert {figure["model"] for figure in table.figures} & set(recipe.fields.sources) or "table-5" in file.stem
        methods = {figure["method"] for figure in table.figures if figure["model"] in recipe.fields.sources}
        assert methods <= rows, f"{table.table} has figures of methods that the recipe has no row for"


def test_the_recipe_of_the_documents(tmp_path):
    page = (RECIPES.parent / "docs" / "compare.md").read_text("utf-8")
    found = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "published").symlink_to(RECIPES / "published")
    recipe = read(tmp_path, found)
    assert len(runs_of(recipe)) > 10
    for name in type(recipe.fields).model_fields:
        assert f"| `{name}` |" in page
        assert f"\n{name}:" in f"\n{found}"


def test_every_published_table_has_a_recipe_and_a_small_twin():
    names = [*(f"wrp-table-{number}" for number in range(1, 10)), "wrp-figure-3", *PAPERS]
    stems = {file.stem for file in FILES}
    assert stems == {f"{name}{end}" for name in names for end in ("", "-smollm2")} | {"wrp-smollm2", "all-smollm2"}
    assert {file.stem for file in TABLES} == {*names, "flap-tasks"}


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_published_figures_are_numbers_of_their_kind(file):
    table = read_published(file)
    assert len(table.figures) > 3
    for figure in table.figures:
        share = figure["figure"].startswith(("accuracy", "groups", "recovered"))
        assert 0 <= figure["value"] <= 1 if share else figure["value"] > 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("columns: [model, method,", "columns: [method, model,", "begins with model, method"),
        ("perplexity text]", "ppl]", "no column is a figure"),
        ("[A, dense, 5.5]", "[A, dense]", "line 6: a row has 3 values"),
        ("5.5", "many", "perplexity text is a number, got 'many'"),
        ("paper: P\n", "", "the field paper is missing"),
        ("paper: P", "paper: P\nyear: 2024", "no field year"),
    ],
)
def test_a_published_table_that_is_none(tmp_path, old, new, reason):
    good = "table: T\npaper: P\nconditions: C\ncolumns: [model, method, perplexity text]\nrows:\n  - [A, dense, 5.5]\n"
    assert len(TABLES) > 0
    file = tmp_path / "table.yaml"
    file.write_text(good)
    assert read_published(file).figures[0]["value"] == 5.5
    file.write_text(good.replace(old, new, 1))
    with pytest.raises(UsageError, match=reason):
        read_published(file)
