"""JSON files of a folder are read in one way: a wrong value of any type at any place is a sentence, never a crash."""

import contextlib
import json
import random
from pathlib import Path

import malformed
import pytest
from families import save_model

from budwood.checkpoints.checksums import INDEX_NAME, read_index
from budwood.checkpoints.schema import COUNT, FILE_NAME, MATRIX, NUMBER, SHAPE, Each, fault
from budwood.checkpoints.sidecars import LAYERS, read_config_json, read_object
from budwood.checkpoints.source import open_source
from budwood.checkpoints.writer import Writer
from budwood.cli.prune import show
from budwood.errors import BudwoodError, RunError, UsageError
from budwood.pruning import prune
from budwood.reports.record import read_report
from budwood.runs.recipe import read_recipe, recipe_options
from budwood.runs.target import STAGING, SWAP, Target, read_manifest


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "dense")
    prune(folder / "dense", folder / "pruned", 'magnitude("2:4")')
    return folder / "pruned"


def report(folder: Path) -> None:
    found = read_report(folder)
    if found is not None:
        show(found, "target")


READERS = {
    INDEX_NAME: lambda folder: read_index(folder / INDEX_NAME),
    "report.json": report,
    "recipe.json": lambda folder: (read_recipe(folder / "recipe.json"), recipe_options(folder)),
    ".budwood.json": read_manifest,
    "config.json": lambda folder: (read_config_json(folder / "config.json"), open_source(folder).shapes),
}


@pytest.mark.parametrize("name", READERS)
def test_any_value_anywhere_is_read_or_is_a_sentence(pruned, tmp_path, name, capsys):
    content = json.loads((pruned / name).read_text())
    found = malformed.mutations(content)
    refused: list[str] = []
    for place, value in random.Random(0).sample(found, min(len(found), 250)):
        malformed.write(tmp_path / name, malformed.changed(content, place, value))
        try:
            READERS[name](tmp_path)
        except BudwoodError as error:
            refused.append(str(error))
    assert refused
    assert [sentence for sentence in refused if str(tmp_path) not in sentence] == []
    capsys.readouterr()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", malformed.WHOLE, ids=lambda text: text[:6])
def test_a_file_that_is_no_object_is_a_sentence(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BudwoodError, match=name.replace(".", r"\.")):
        READERS[name](tmp_path)


def test_a_file_that_is_no_text_or_too_large_is_a_sentence(tmp_path):
    file = tmp_path / "report.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RunError, match="is damaged"):
        read_object(file, {}, "write it again")
    file.write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(RunError, match="more than 64 bytes; write it again"):
        read_object(file, {}, "write it again", most=64)
    assert read_object(tmp_path / "none", {}, "") is None


def test_the_notes_of_a_shard_are_read_or_are_a_sentence(pruned, monkeypatch):
    writer = Writer(pruned, "x", 4, "auto")
    content = json.loads(json.dumps({"run": "x", "packed": writer.about(0).packed, "shapes": {"a": [2]}}))
    content["notes"] = writer.notes(0)
    found = malformed.mutations(content)
    for place, value in random.Random(0).sample(found, 200):
        text = json.dumps(malformed.changed(content, place, value))
        monkeypatch.setattr("budwood.checkpoints.writer.read_header", lambda _, said=text: ({}, {"budwood": said}))
        with contextlib.suppress(RunError):
            writer.about(0)
            notes = writer.notes(0)
            assert all(len(entry["shape"]) == 2 for entry in notes["linears"].values())


HALF = {"move": [], "remove": ["\ud800"]}  # which is no name of a file


def test_a_swap_that_names_other_folders_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    for listed in ({"move": [], "remove": ["../mine.txt"]}, {"move": ["/etc/x"], "remove": []}, {"move": 3}, [], HALF):
        malformed.write(out / STAGING / SWAP, listed)
        with pytest.raises(RunError, match=rf"{SWAP} is damaged.*delete"):
            Target.claim(out)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "max_window_layers"])
@pytest.mark.parametrize("inside", [None, "text_config"])
def test_layers_are_counted_before_any_are_made(tmp_path, name, inside):
    content = {"model_type": "llama", name: 10**6}
    malformed.write(tmp_path / "config.json", {"text_config": content} if inside else content)
    with pytest.raises(UsageError, match=f"gives {name} as 1000000, which is more than {LAYERS}"):
        read_config_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "hidden_size"])
def test_heads_and_widths_are_not_negative(tmp_path, name):
    for value in (4, None, -4, -4.0):
        malformed.write(tmp_path / "config.json", {"model_type": "llama", name: value})
        if value in (4, None):
            read_config_json(tmp_path / "config.json")
        else:
            with pytest.raises(UsageError, match=f"gives {name} as {value}; correct it"):
                read_config_json(tmp_path / "config.json")


@pytest.mark.parametrize("asked", [-2, 5])
@pytest.mark.parametrize(
    ("count", "chosen"), [("num_local_experts", "num_experts_per_tok"), ("moe_num_experts", "moe_k")]
)
@pytest.mark.parametrize("inside", [None, "text_config"])
def test_a_token_chooses_among_the_experts_that_are_there(tmp_path, count, chosen, asked, inside):
    for number in (4, asked):
        content = {"model_type": "mixtral", count: 4, chosen: number}
        malformed.write(tmp_path / "config.json", {"text_config": content} if inside else content)
        if number == 4:
            read_config_json(tmp_path / "config.json")
    with pytest.raises(UsageError, match=f"gives {chosen} as {asked}, of 4 experts; correct it"):
        read_config_json(tmp_path / "config.json")


@pytest.mark.parametrize("inside", [None, "text_config"])
@pytest.mark.parametrize(
    ("kind", "name"), [("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")]
)
def test_layers_with_a_window_need_its_size(tmp_path, kind, name, inside):
    def read(content: dict) -> None:
        malformed.write(tmp_path / "config.json", {"text_config": content} if inside else content)
        read_config_json(tmp_path / "config.json")

    windowed = {"model_type": "gemma2", "layer_types": [kind, "full_attention"]}
    read(windowed)  # the default of its class
    read(windowed | {name: 4096})
    read({"layer_types": ["full_attention"], name: None})
    read({"layer_types": None, name: None})
    for size in (None, 0, -4, "2:4", [4]):
        with pytest.raises(UsageError, match=f"gives {name} as .*, and {kind} layers that need it; correct it"):
            read(windowed | {name: size})


def test_more_layers_than_the_files_have_tensors_are_refused(pruned, tmp_path):
    for file in pruned.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((pruned / "config.json").read_text())
    tensors = len(open_source(pruned).shards.locations)
    malformed.write(tmp_path / "config.json", {**content, "num_hidden_layers": tensors + 1})
    with pytest.raises(UsageError, match=f"which is more than {tensors}"):
        open_source(tmp_path).structure()


@pytest.mark.parametrize(
    ("value", "schema", "found"),
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": True}, {"a": int}, "a is True where a whole number should be"),
        ({}, {"a": int}, "a is missing"),
        ({}, {"a?": int}, None),
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, "a.b.1 is 'x' where a whole number should be"),
        ({"a": None}, {"a": (str, type(None))}, None),
        ({"a": 3}, {"a": (str, type(None))}, "a is 3 where text or null should be"),
        ({"x": {"y": 3}}, Each({"y": str}), "x.y is 3 where text should be"),
        ({"a": [4, 0]}, {"a": SHAPE}, "a is [4, 0] where a list of whole numbers above 0 should be"),
        ({"a": [4, 2, 2]}, {"a": MATRIX}, "a is [4, 2, 2] where a shape [out, in] should be"),
        ({"a": 10**30}, {"a": COUNT}, "a is a very large number where a whole number from 0 should be"),
        ({"a": float("inf")}, {"a": NUMBER}, None),
        ({"a": 1e300}, {"a": NUMBER}, "a is 1e+300 where a number should be"),
        ({"a": ".."}, {"a": FILE_NAME}, "a is '..' where the name of a file in the same folder should be"),
        ([], {"a": int}, "its content is [] where an object should be"),
    ],
)
def test_the_first_fault_is_named(value, schema, found):
    assert fault(value, schema) == found
