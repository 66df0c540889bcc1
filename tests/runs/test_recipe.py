"""A recipe survives its file, is read in older forms, refuses other types, and makes its folder again."""

import contextlib
import json

import pytest
import torch
from disk import CALIBRATION, contents
from families import save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.pruning import prune
from budwood.runs.recipe import INNER_TYPES, TYPES, Recipe, read_recipe, recipe_options

RECIPE = {
    "method": "wrp(alpha=0.5)",
    "source": {"name": "dense", "sha256": "ab"},
    "data": {"data": "text.txt", "num_samples": 4, "seq_length": 24, "sampling": "random", "seed": 1, "bos": "auto"},
    "dtype": "float32",
    "format": "auto",
    "skip": ["down_proj"],
    "verb": "prune",
    "asked": {"compute_dtype": "float32", "sparse_products": "auto", "attention": "auto"},
    "arithmetic": {"computed_in": "float32", "sparse_products": False, "blocked_attention": True, "device": "cpu"},
    "made_from": None,
    "budwood": "0.1.0",
}
FLAT = {
    "budwood": "0.1.0",
    "method": "wrp(alpha=0.5)",
    "source": {"name": "dense", "sha256": "ab"},
    "data": RECIPE["data"],
    "dtype": "float32",
    "compute_dtype": "float32",
    "format": "auto",
    "skip": ["down_proj"],
    "computed_in": "float32",
    "sparse_products": False,
    "blocked_attention": True,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "dense")
    (folder / "text.txt").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(600)))
    return folder


def model_files(folder):
    """All but what holds times or the options as they were given."""
    return {name: content for name, content in contents(folder).items() if not name.startswith(("re", "RE"))}


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name not in {**RECIPE, **FLAT, "repacked": 0}), JSON))
def test_unknown_fields_survive(unknown):
    content = {**RECIPE, **unknown}
    recipe = Recipe.from_json(json.loads(json.dumps(content)), "recipe.json")
    assert recipe.to_json() == content
    assert Recipe.from_json(recipe.to_json(), "recipe.json") == recipe


def test_the_flat_form_of_earlier_versions_is_read():
    recipe = Recipe.from_json(FLAT, "recipe.json")
    assert recipe.asked == {"compute_dtype": "float32"}
    assert recipe.arithmetic == {"computed_in": "float32", "sparse_products": False, "blocked_attention": True}
    assert recipe.unknown == {}
    assert recipe.difference(Recipe.from_json(RECIPE, "recipe.json")) is None
    exported = Recipe.from_json({**FLAT, "repacked": FLAT}, "recipe.json")
    assert exported.made_from == FLAT
    assert exported.verb == "export"
    without_arithmetic = {name: FLAT[name] for name in FLAT if name not in ("computed_in", "sparse_products")}
    assert Recipe.from_json(without_arithmetic, "recipe.json").asked == {"compute_dtype": "float32"}
    assert Recipe.from_json(without_arithmetic, "recipe.json").chosen is None
    assert recipe.chosen == recipe.arithmetic


@pytest.mark.parametrize("form", [RECIPE, FLAT])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_read_or_is_a_usage_error(tmp_path, form, data):
    """Of every field and inner field, through every reader."""
    inner = [(outer, name) for outer, types in INNER_TYPES.items() for name in types if outer in form]
    content = json.loads(json.dumps(form))
    place = data.draw(st.sampled_from([(name,) for name in content] + inner))
    value = data.draw(JSON)
    if len(place) == 1:
        content[place[0]] = value
    else:
        content[place[0]][place[1]] = value
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(content))
    with contextlib.suppress(UsageError):
        recipe = read_recipe(file)
        assert recipe is not None
        assert isinstance(recipe.id, str)
        recipe.difference(Recipe.from_json(RECIPE, file))
        recipe_options(file)


@pytest.mark.parametrize("name", list(TYPES))
def test_a_field_of_the_wrong_type_is_refused(name):
    for value in (3, 2.5, True, "word", [], {}, None):
        if type(value) not in TYPES[name]:
            with pytest.raises(UsageError, match=f"recipe.json: {name} is"):
                Recipe.from_json({**RECIPE, name: value}, "recipe.json")


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", "{}", '{"method": "wrp()"}', '{"flour": "500 g"}', "\x00", "[" * 50]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match="recipe"):
        recipe_options(tmp_path)


def test_a_recipe_that_is_not_there_or_not_of_prune_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no recipe"):
        recipe_options(tmp_path)
    for change in ({"verb": "export"}, {"method": None}, {"made_from": RECIPE}):
        (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, **change}))
        with pytest.raises(UsageError, match="not made by prune"):
            recipe_options(tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ('magnitude("2:4")', {}),
        ('magnitude("2:4")', {"dtype": "bfloat16", "format": "dense", "skip": ["down_proj"]}),
        ("wrp(alpha=0.5)", CALIBRATION),
        ("wrp(alpha=0.5)", {**CALIBRATION, "attention": "blocked"}),
        ("wrp(alpha=0.5)", {**CALIBRATION, "values": "int8", "seed": 3, "sampling": "consecutive", "bos": "every"}),
        ("wrp(alpha=0.5)", {**CALIBRATION, "compute_dtype": "bfloat16"}),
        ("wrp(alpha=0.5)", {"num_samples": 4, "seq_length": 24}),
    ],
)
def test_the_options_of_a_recipe_make_its_folder_again(models, tmp_path, method, options):
    prune(models / "dense", tmp_path / "first", method, str(models / "text.txt"), **options)
    report = prune(models / "dense", tmp_path / "again", **recipe_options(tmp_path / "first" / "recipe.json"))
    assert model_files(tmp_path / "again") == model_files(tmp_path / "first")
    first, again = (read_recipe(tmp_path / name / "recipe.json") for name in ("first", "again"))
    assert again.arithmetic == first.arithmetic
    assert again.id == first.id
    assert not [note for note in report["notes"] if "recipe" in note]


def test_blocked_attention_is_repeated(models, tmp_path):
    """Chosen explicitly it is recorded, and it changes what is computed."""
    options = {**CALIBRATION, "attention": "blocked"}
    prune(models / "dense", tmp_path / "first", "wrp(alpha=0.5)", str(models / "text.txt"), **options)
    assert read_recipe(tmp_path / "first" / "recipe.json").arithmetic["blocked_attention"] is True
    assert recipe_options(tmp_path / "first")["attention"] == "blocked"


def test_another_source_or_text_is_noted(models, tmp_path):
    save_model("llama", tmp_path / "other", seed=1)
    prune(models / "dense", tmp_path / "first", "wrp(alpha=0.5)", str(models / "text.txt"), **CALIBRATION)
    options = recipe_options(tmp_path / "first")
    report = prune(tmp_path / "other", tmp_path / "second", **options)
    assert [note for note in report["notes"] if "is not the model of the recipe" in note]
    assert not [note for note in report["notes"] if "calibration windows" in note]
    text = {"data": (torch.arange(400) % 90 + 3)[None]}
    report = prune(models / "dense", tmp_path / "third", **{**options, **text})
    assert [note for note in report["notes"] if "calibration windows are not those of the recipe" in note]
    assert not [note for note in report["notes"] if "is not the model" in note]
    kept = json.loads((tmp_path / "third" / "report.json").read_text())
    assert kept["notes"] == report["notes"]
