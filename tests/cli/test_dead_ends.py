"""What used to end in a traceback, a killed process or a sentence of another library ends in one of budwood's."""

import json
import random
import shutil

import malformed
import pytest
import torch
from families import TOKENS, VOCABULARY, save_model
from full_disk import files_up_to
from safetensors.torch import load_file, save_file

from budwood.checkpoints.checksums import INDEX_NAME
from budwood.errors import RunError, UsageError
from budwood.planning import plan
from budwood.pruning import prune
from budwood.repacking import repack

METHOD = 'magnitude("2:4")'
TEXT = "Some words of text for the model to read, and some more of them.\n" * 20
CALIBRATION = {"num_samples": 4, "seq_length": 24, "compute_dtype": "float32", "attention": "fused"}
CALIBRATION |= {"sparse_products": "off"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    here = tmp_path_factory.mktemp("models")
    save_model("llama", here / "dense")
    prune(here / "dense", here / "pruned", METHOD)
    (here / "text.txt").write_text(TEXT)
    return here


@pytest.fixture
def own(models, tmp_path):
    """A copy of the dense folder to spoil."""
    return shutil.copytree(models / "dense", tmp_path / "own")


def change(file, **fields):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **fields}))


def one_sentence(result, status, *words):
    assert result.status == status, result.stderr
    # Bars of transformers are turned off before it is imported, which other tests in this process may have done.
    said = [line for line in result.stderr.splitlines() if "Loading weights" not in line]
    assert len(said) == 1
    assert said[0].startswith("budwood: ")
    assert "BUDWOOD_DEBUG" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "none"}},
        {"num_return_sequences": 3, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 2},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"max_length": 1, "min_length": 50},
        {"use_cache": False},
    ],
)
def test_settings_of_other_ways_to_generate_are_left_out(models, own, run_here, settings):
    arguments = ("--prompt", "abc", "--max-new-tokens", 4, "--json")
    plain = run_here("generate", models / "dense", *arguments)
    change(own / "generation_config.json", **settings)
    found = run_here("generate", own, *arguments)
    assert found.status == plain.status == 0, found.stderr
    assert found.json["text"] == plain.json["text"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), ("no token",)),
        (("--prompt", "abc", "--prompt", ""), ("no token",)),
        (("--prompt", "a\udcffb"), ("character 2", "surrogate")),
        (("--prompt", "a", "--chat"), ("chat template", "roles must alternate")),
        (("--prompt", "a", "--temperature", "inf"), ("--temperature",)),
    ],
)
def test_prompts_that_cannot_be_continued(own, run_here, arguments, words):
    content = json.loads((own / "tokenizer.json").read_text())
    content["post_processor"] = None  # no start token
    (own / "tokenizer.json").write_text(json.dumps(content))
    (own / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    one_sentence(run_here("generate", own, *arguments), 2, *words)


def test_tokens_beyond_the_embedding(models, own, run_here, tmp_path):
    """Of a tokenizer that knows more tokens than the model, and of ids made elsewhere."""
    content = json.loads((own / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = VOCABULARY + 7
    (own / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("banana " * 200)
    words = (f"the token id {VOCABULARY + 7}", f"{VOCABULARY} rows")
    data = ("--data", tmp_path / "a.txt", "--seq-length", 16)
    one_sentence(run_here("generate", own, "--prompt", "a"), 2, *words)
    one_sentence(run_here("evaluate", own, *data), 2, *words)
    one_sentence(run_here("evaluate", own, *data, "--stream"), 2, *words)
    one_sentence(run_here("prune", own, tmp_path / "out", "--method", "wanda", *data), 2, *words)
    assert not (tmp_path / "out").exists()
    ids = torch.full((1, 400), VOCABULARY)
    (models / "dense" / "tokenizer.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(UsageError, match=f"token id {VOCABULARY}"):
            prune(models / "dense", tmp_path / "out", "wanda", ids, **CALIBRATION)
    finally:
        (tmp_path / "kept.json").rename(models / "dense" / "tokenizer.json")


@pytest.mark.parametrize("value", [["x"], {"a": 1}, []])
@pytest.mark.parametrize("field", ["model_max_length", "model_input_names"])
def test_settings_of_a_tokenizer_that_are_none(own, run_here, field, value):
    change(own / "tokenizer_config.json", **{field: value})
    found = run_here("generate", own, "--prompt", "ab", "--max-new-tokens", 1)
    if field == "model_max_length":
        one_sentence(found, 2, "the tokenizer of the model cannot read the prompt")
    else:  # the mask is asked for in any case
        assert found.status == 0, found.stderr


def test_a_tokenizer_without_a_token_for_what_it_does_not_know(own, run_here):
    content = json.loads((own / "tokenizer.json").read_text())
    del content["model"]["vocab"]["b"]
    content["model"]["unk_token"] = "nothing"
    (own / "tokenizer.json").write_text(json.dumps(content))
    one_sentence(run_here("generate", own, "--prompt", "ab"), 2, "the tokenizer of the model cannot read the prompt")


def in_dtype(folder, dtype):
    for file in folder.glob("*.safetensors"):
        save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file, {"format": "pt"})


def test_weights_in_a_dtype_that_is_not_written(own, run_here, models, tmp_path):
    in_dtype(own, torch.float64)
    arguments = ("--method", METHOD)
    one_sentence(run_here("prune", own, tmp_path / "out", *arguments), 2, "float64", "--dtype")
    one_sentence(run_here("plan", own, *arguments), 2, "float64", "--dtype")
    assert run_here("prune", own, tmp_path / "out", *arguments, "--dtype", "float32").status == 0
    data = ("--data", models / "text.txt", "--seq-length", 16, "--limit", 2, "--json")
    figures = [run_here("evaluate", own, *data, *way).json["results"][0]["losses"] for way in ((), ("--stream",))]
    assert figures[0] == figures[1]


def test_weights_that_need_scales(own, run_here, tmp_path):
    in_dtype(own, torch.float8_e5m2)
    one_sentence(run_here("prune", own, tmp_path / "out", "--method", METHOD), 2, "float8_e5m2", "dequantize")
    one_sentence(run_here("plan", own, "--method", METHOD), 2, "float8_e5m2", "dequantize")


@pytest.mark.parametrize("skip", [[""], ["."], ["proj", "mlp"]])
def test_skips_that_leave_nothing(models, tmp_path, skip):
    for call in (
        lambda: prune(models / "dense", tmp_path / "out", METHOD, skip=skip),
        lambda: plan(models / "dense", METHOD, skip=skip),
    ):
        with pytest.raises(UsageError, match="--skip names every matrix"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_plan_refuses_a_quantised_model_as_prune_does(own, run_here, tmp_path):
    change(own / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    for source in (own, own / "config.json"):
        one_sentence(run_here("plan", source, "--method", METHOD), 2, "stored with 'gptq'")
    one_sentence(run_here("prune", own, tmp_path / "out", "--method", METHOD), 2, "stored with 'gptq'")


def test_a_recipe_whose_skips_never_end(models, run_here, tmp_path):
    change(tmp_path / "recipe.json", **json.loads((models / "pruned" / "recipe.json").read_text()))
    for skip, status in (("(a|a)*(o|o)*$x", 0), (r"(.)\1", 2), ("(", 2)):
        change(tmp_path / "recipe.json", skip=[skip])
        found = run_here("prune", models / "dense", tmp_path / f"out{status}", "--recipe", tmp_path / "recipe.json")
        assert found.status == status, found.stderr


def test_activations_that_find_no_room(models, tmp_path):
    with (
        files_up_to(4096),
        pytest.raises(RunError, match=r"bytes of activations cannot be kept in .*--activation-memory"),
    ):
        prune(models / "dense", tmp_path / "out", "wanda", TEXT.split("\n"), **CALIBRATION, activation_memory=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_an_export_that_finds_no_room_and_goes_on(models, tmp_path, format):
    largest = max(file.stat().st_size for file in (models / "pruned").glob("*.safetensors"))
    with files_up_to(largest // 4), pytest.raises(RunError, match="make room or give another folder"):
        repack(models / "pruned", tmp_path / "out", format)
    repack(models / "pruned", tmp_path / "out", format)
    repack(models / "pruned", tmp_path / "whole", format)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("value", [0, -3, "many", [64], {"a": 1}, None, 1.5])
@pytest.mark.parametrize("field", ["max_position_embeddings", "vocab_size"])
def test_sizes_that_are_none(models, own, run_here, value, field):
    change(own / "config.json", **{field: value})
    found = run_here("evaluate", own, "--data", models / "text.txt", "--seq-length", 16, "--limit", 1)
    assert found.status in (0, 1, 2)
    assert "BUDWOOD_DEBUG" not in found.stderr
    assert TOKENS == 64


SIDECARS = {
    "config.json": [("plan", "--method", METHOD), ("inspect",), ("generate", "--prompt", "a", "--max-new-tokens", 1)],
    "recipe.json": [("inspect",), ("export", "OUT")],
    "report.json": [("bench", "--rows", "1,1"), ("again",)],
    INDEX_NAME: [("inspect",), ("export", "OUT")],
    "generation_config.json": [("generate", "--prompt", "a", "--max-new-tokens", 1)],
    "tokenizer_config.json": [("generate", "--prompt", "a", "--max-new-tokens", 1)],
    ".budwood.json": [("again", "--overwrite")],
}


@pytest.mark.parametrize("name", SIDECARS)
def test_malformed_files_are_a_sentence_in_every_verb(models, run_here, tmp_path, name):
    """A sample; the reading functions are tested with more of them."""
    folder = shutil.copytree(models / "pruned", tmp_path / "own")
    content = json.loads((folder / name).read_text())
    chosen = random.Random(1)
    for place, value in chosen.sample(malformed.mutations(content), 5):
        malformed.write(folder / name, malformed.changed(content, place, value))
        verb, *rest = chosen.choice(SIDECARS[name])
        call = (verb, folder, *(tmp_path / "out" if each == "OUT" else each for each in rest))
        if verb == "again":
            call = ("prune", models / "dense", folder, "--method", METHOD, *rest)
        found = run_here(*call)
        assert found.status in (0, 1, 2), found.stderr
        assert "BUDWOOD_DEBUG" not in found.stderr, (place, value, found.stderr)
        assert "Traceback" not in found.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
