"""The verbs end to end on a tiny model, through the real entry point."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from families import save_model
from safetensors.torch import load_file, save_file

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 40
CALIBRATION = ("--num-samples", 4, "--seq-length", 16, "--compute-dtype", "float32", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    save_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def pruned(source, text, run, tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "pruned"
    result = run("prune", source, target, "--method", "wrp(alpha=0.25)", "--data", text, *CALIBRATION)
    assert result.status == 0, result.stderr
    return target


def test_prune_writes_a_complete_folder(pruned):
    names = {file.name for file in pruned.iterdir()}
    assert {"config.json", "README.md", "recipe.json", "report.json", "report.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    report = json.loads((pruned / "report.json").read_text())
    assert report["totals"]["recovered"] > 0


def test_prune_prints_the_figures(source, text, run_here, tmp_path):
    result = run_here("prune", source, tmp_path / "out", "--method", 'wanda("2:4")', "--data", text, *CALIBRATION)
    assert result.status == 0, result.stderr
    assert "50.00 %" in result.stdout
    assert result.stderr == ""


def test_prune_json_is_the_report(source, text, run_here, tmp_path):
    arguments = ("--method", 'magnitude("2:4")', "--json", *CALIBRATION)
    result = run_here("prune", source, tmp_path / "out", *arguments)
    assert result.status == 0, result.stderr
    assert result.json["totals"] == json.loads((tmp_path / "out" / "report.json").read_text())["totals"]


def test_underscores_and_repeated_skips_reach_the_library(source, run_here, tmp_path):
    skips = ("--skip", r"layers\.0\.", "--skip", "down_proj")
    result = run_here(
        "prune",
        source,
        tmp_path / "out",
        "--method",
        "magnitude('50%')",
        "--compute_dtype",
        "float32",
        *skips,
    )
    assert result.status == 0, result.stderr
    linears = json.loads((tmp_path / "out" / "report.json").read_text())["linears"]
    assert linears
    assert not [name for name in linears if "layers.0." in name or "down_proj" in name]


def test_plan_predicts_the_bytes_that_prune_writes(source, run_here, tmp_path):
    planned = run_here("plan", source, "--method", 'magnitude("2:4")', "--format", "two_four", "--json")
    assert planned.status == 0, planned.stderr
    result = run_here(
        "prune",
        source,
        tmp_path / "out",
        "--method",
        'magnitude("2:4")',
        "--format",
        "two_four",
        "--json",
        "--quiet",
    )
    assert result.status == 0, result.stderr
    assert planned.json["bytes_after"] == pytest.approx(result.json["totals"]["bytes"], rel=0.005)


def test_plan_reads_a_single_config(source, run_here, tmp_path):
    shutil.copy(source / "config.json", tmp_path / "config.json")
    result = run_here("plan", tmp_path / "config.json", "--method", "wrp(alpha=0.25)")
    assert result.status == 0, result.stderr
    assert "two_four_compact" in result.stdout


def test_evaluate_resident_and_streamed_agree(pruned, text, run_here):
    arguments = ("evaluate", pruned, "--data", text, "--seq-length", 32, "--limit", 2, "--json", "--quiet")
    resident, streamed = run_here(*arguments), run_here(*arguments, "--stream")
    assert resident.status == streamed.status == 0, resident.stderr + streamed.stderr
    (one,), (other,) = resident.json["results"], streamed.json["results"]
    assert one["kind"] == "perplexity"
    assert one["losses"] == other["losses"]
    assert one["perplexity"] == other["perplexity"]
    assert one["text"]["windows"] == 2


def test_evaluate_measures_the_distance_from_dense_on_several_texts(pruned, source, text, run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("--data", f"a={text}", "--data", f"b={text}", "--against", source, "--seq-length", 32, "--limit", 2)
    result = run_here("evaluate", pruned, *arguments, "--continuations", 1, "--quiet")
    assert result.status == 0, result.stderr
    for words in ("perplexity", "KL divergence", "same top token", "continuations", "mean loss on b", "threads"):
        assert words in result.stdout


def test_inspect_agrees_with_the_report(pruned, run_here):
    result = run_here("inspect", pruned, "--json")
    assert result.status == 0, result.stderr
    report = json.loads((pruned / "report.json").read_text())
    for name, matrix in report["linears"].items():
        found = result.json["linears"][name]
        for key in ("shape", "format", "nonzeros", "density", "recovered", "bytes"):
            assert found[key] == pytest.approx(matrix[key]) if isinstance(matrix[key], float) else matrix[key], key
        assert found["pattern"].startswith("2:4")
    assert result.json["totals"]["bytes"] == report["totals"]["bytes"]
    assert result.json["checksums"] == "checksums match"


def test_inspect_detects_a_violated_pattern(source, run_here, tmp_path):
    target = tmp_path / "out"
    arguments = ("--method", 'magnitude("2:4")', "--format", "dense", "--quiet")
    assert run_here("prune", source, target, *arguments).status == 0
    assert run_here("inspect", target).status == 0
    name = "model.layers.1.mlp.up_proj"
    shard = next(file for file in target.glob("model-*.safetensors") if f"{name}.weight" in load_file(file))
    tensors = load_file(shard)
    tensors[f"{name}.weight"][0, :4] = 1.0
    save_file(tensors, shard)
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"].pop("sha256", None)
    index.write_text(json.dumps(content))
    result = run_here("inspect", target, "--json")
    assert result.status == 1
    assert result.json["totals"]["broken"] == [name]


def test_inspect_names_an_altered_shard(pruned, run_here, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    shard = sorted(copy.glob("sparse-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run_here("inspect", copy)
    assert result.status == 1
    assert shard.name in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_x4_of_a_dense_model(source, run_here):
    result = run_here("inspect", source, "--x4", "--json")
    assert result.status == 0, result.stderr
    for matrix in result.json["linears"].values():
        assert sum(matrix["x4"]) == pytest.approx(1)
        kept = sum(count * part for count, part in enumerate(matrix["x4"]))
        assert kept == pytest.approx(2)  # half of four


def test_inspect_of_a_method_that_is_no_longer_known(pruned, run_here, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(recipe | {"method": "forgotten(alpha=0.25)"}))
    result = run_here("inspect", copy, "--json")
    assert result.status == 0, result.stderr
    assert result.json["method"] == "forgotten(alpha=0.25)"
    assert "forgotten" in result.json["notes"][0]
    assert "not checked" in run_here("inspect", copy).stdout
    assert run_here("inspect", pruned, "--json").json["notes"] == []


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_inspect_reads_transposed_and_fused_matrices(family, run_here, tmp_path):
    save_model(family, tmp_path / "source")
    arguments = ("--method", 'magnitude("2:4")', "--quiet", "--json")
    result = run_here("prune", tmp_path / "source", tmp_path / "out", *arguments)
    assert result.status == 0, result.stderr
    for folder, pattern in ((tmp_path / "source", "dense"), (tmp_path / "out", "2:4")):
        found = run_here("inspect", folder, "--json")
        assert found.status == 0, found.stderr
        assert {name: matrix["shape"] for name, matrix in found.json["linears"].items()} == {
            name: matrix["shape"] for name, matrix in result.json["linears"].items()
        }
        assert {matrix["pattern"] for matrix in found.json["linears"].values()} == {pattern}


def test_export_writes_a_dense_folder(pruned, source, run_here, tmp_path):
    result = run_here("export", pruned, tmp_path / "dense", "--json")
    assert result.status == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense, packed = run_here("inspect", tmp_path / "dense", "--json"), run_here("inspect", pruned, "--json")
    for name, matrix in packed.json["linears"].items():
        assert dense.json["linears"][name]["nonzeros"] == matrix["nonzeros"]


def test_export_rounds_to_int8(pruned, run_here, tmp_path, monkeypatch):
    result = run_here("export", pruned, tmp_path / "int8", "--values", "int8", "--json", "--quiet")
    assert result.status == 0, result.stderr
    assert result.json["format"] == "auto_int8"
    found = run_here("inspect", tmp_path / "int8", "--json")
    assert found.status == 0, found.stderr
    assert {matrix["format"] for matrix in found.json["linears"].values()} == {"two_four_compact_int8"}
    assert found.json["totals"]["bits_per_weight"] == result.json["totals"]["bits_per_weight"]
    monkeypatch.setenv("COLUMNS", "200")
    assert "two_four_compact_int8" in run_here("inspect", tmp_path / "int8").stdout
    again = run_here("export", tmp_path / "int8", tmp_path / "twice", "--values", "int8")
    assert again.status == 2
    assert "int8 already" in again.stderr


def test_int8_values_reach_plan_and_prune(source, run_here, tmp_path):
    arguments = ("--method", "wrp(density=0.02, metric='magnitude')", "--values", "int8")
    planned = run_here("plan", source, *arguments)
    assert planned.status == 0, planned.stderr
    assert "two_four_compact_int8 (chosen)" in planned.stdout
    result = run_here("prune", source, tmp_path / "out", *arguments, "--quiet")
    assert result.status == 0, result.stderr
    assert "rounding error of a matrix" in result.stdout
    refused = run_here("prune", source, tmp_path / "other", *arguments, "--format", "two_four_csr")
    assert refused.status == 2
    assert "two_four_csr holds no int8 values" in refused.stderr
    assert run_here("prune", source, tmp_path / "other", *arguments[:-1], "int3").status == 2


def test_generate_streams_the_text_it_returns(pruned, run, run_here):
    arguments = ("generate", pruned, "--prompt", "The quick", "--max-new-tokens", 8)
    shown, returned = run(*arguments), run_here(*arguments, "--json")
    assert shown.status == returned.status == 0, shown.stderr
    assert shown.stdout == returned.json["text"] + "\n"
    assert 1 <= returned.json["tokens"] <= 8
    assert shown.stderr == ""


def test_a_batch_of_prompts_equals_each_alone(pruned, run_here):
    short, long = "The quick", "A much longer one, so that the first is padded"
    prompts, tokens = [short, long, short], ("--max-new-tokens", 4)
    each = {text: run_here("generate", pruned, "--prompt", text, *tokens, "--json").json for text in (short, long)}
    alone = [each[text] for text in prompts]
    options = [word for text in prompts for word in ("--prompt", text)]
    shown, together = (run_here("generate", pruned, *options, *tokens, *more) for more in ((), ("--json",)))
    assert shown.status == together.status == 0, shown.stderr + together.stderr
    answers = json.loads(together.stdout)["answers"]
    assert answers == [{key: one[key] for key in ("prompt", "text", "tokens")} for one in alone]
    assert shown.stdout == "\n\n".join(one["prompt"] + one["text"] for one in alone) + "\n"


def test_a_batch_needs_a_padding_token(pruned, run_here, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(pruned, bare)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (bare / name).exists():
            config = json.loads((bare / name).read_text())
            kept = {key: value for key, value in config.items() if not key.endswith("_token")}
            (bare / name).write_text(json.dumps(kept))
    alone, both = (run_here("generate", bare, *("--prompt", "a") * n, "--max-new-tokens", 2) for n in (1, 2))
    assert alone.status == 0, alone.stderr
    assert both.status == 2
    assert "pad" in both.stderr


def test_generate_without_a_chat_template(pruned, run_here):
    result = run_here("generate", pruned, "--prompt", "a", "--chat")
    assert result.status == 2
    assert "chat template" in result.stderr


def test_methods_list_and_options(run_here):
    from budwood.methods import METHODS

    listed = run_here("methods", "--json")
    assert set(listed.json) == set(METHODS)
    for name in METHODS:
        shown = run_here("methods", name, "--json")
        assert shown.json["name"] == name
        assert all(option["name"].isidentifier() for option in shown.json["options"])
        assert run_here("methods", name).status == 0


def test_methods_offers_the_nearest_name(run_here):
    result = run_here("methods", "wnda")
    assert result.status == 2
    assert "wanda" in result.stderr


def test_env_names_versions_and_kernels(run_here):
    result = run_here("env", "--json")
    assert result.status == 0
    assert result.json["versions"]["torch"] == torch.__version__
    assert result.json["kernels"]
    assert run_here("env", "--measure").status == 0


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"--method": "wnda('2:4')"}, "wanda"),
        ({"--method": "wrp(alpha=1.5)"}, "alpha"),
        ({"--method": "__import__('os').system('true')"}, ""),
        ({"--method": 'wanda("2:5")'}, "--skip"),
        ({"--data": "no-such-text.txt"}, "no-such-text.txt"),
        ({"--data": None}, "--data"),
        ({"--format": "zip"}, "zip"),
        ({"source": "no-such-model"}, "no-such-model"),
    ],
)
def test_invalid_requests_are_one_sentence_and_write_nothing(source, text, run_here, tmp_path, changed, word):
    options = {"source": source, "--method": "wrp()", "--data": text} | changed
    model = options.pop("source")
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    result = run_here("prune", model, tmp_path / "out", *given, *CALIBRATION)
    assert result.status == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("budwood: ")
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_makes_the_folder_again_and_given_options_override_it(source, text, run_here, tmp_path):
    given = ("--method", "wrp(alpha=0.25)", "--data", text, "--seed", 3, "--skip", r"layers\.0\.", *CALIBRATION)
    assert run_here("prune", source, tmp_path / "first", *given).status == 0
    recipe = ("--recipe", tmp_path / "first" / "recipe.json", "--quiet")
    result = run_here("prune", source, tmp_path / "again", *recipe)
    assert result.status == 0, result.stderr
    assert shards(tmp_path / "again") == shards(tmp_path / "first")
    assert run_here("prune", source, tmp_path / "other", *recipe, "--format", "two_four_csr").status == 0
    first, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "other"))
    assert {matrix["format"] for matrix in other["linears"].values()} == {"two_four_csr"}
    assert {name: m["nonzeros"] for name, m in other["linears"].items()} == {
        name: m["nonzeros"] for name, m in first["linears"].items()
    }


def test_a_recipe_repeats_the_arithmetic(source, text, run_here, tmp_path):
    given = ("--method", "wrp(alpha=0.25)", "--data", text, "--attention", "blocked", *CALIBRATION)
    assert run_here("prune", source, tmp_path / "first", *given).status == 0
    result = run_here("prune", source, tmp_path / "again", "--recipe", tmp_path / "first" / "recipe.json", "--quiet")
    assert result.status == 0, result.stderr
    first, again = (json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("first", "again"))
    assert first["arithmetic"]["blocked_attention"] is True
    assert again["arithmetic"] == first["arithmetic"]
    assert shards(tmp_path / "again") == shards(tmp_path / "first")


@pytest.mark.parametrize("content", ["{", "[]", '{"method": 3}', '{"method": "wrp()", "source": 1}'])
def test_a_damaged_recipe_is_one_sentence(source, run_here, tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    result = run_here("prune", source, tmp_path / "out", "--recipe", tmp_path / "recipe.json")
    assert result.status == 2
    assert "recipe.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [("--activation-memory", "much"), ("--method", "wnda()"), ("--data", "no-such-text.txt"), ("--format", "zip")],
)
def test_a_refused_overwrite_leaves_the_former_run_whole(pruned, source, text, run_here, changed):
    before = everything(pruned)
    given = ("--method", 'wanda("2:4")', "--data", text, *CALIBRATION, *changed, "--overwrite")
    assert run_here("prune", source, pruned, *given).status == 2
    assert run_here("prune", "no-such-model", pruned, *given[:-3], "--overwrite").status == 2
    assert everything(pruned) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_folder_of_others_is_refused_by_every_verb(source, pruned, run_here, tmp_path, options):
    folder = tmp_path / "foreign"
    shutil.copytree(source, folder)
    (folder / "x.gguf").write_bytes(b"GGUF")
    before = everything(folder)
    for verb in (
        ("prune", source, folder, "--method", 'magnitude("2:4")'),
        ("export", pruned, folder),
        ("export", pruned, folder, "--values", "int8"),
    ):
        result = run_here(*verb, *options)
        assert result.status == 2, result.stderr
        assert everything(folder) == before


def test_two_runs_in_one_folder(source, pruned, run_here, tmp_path):
    from budwood.runs.target import Target

    shutil.copytree(pruned, tmp_path / "out")
    before = everything(tmp_path / "out")
    held = Target.claim(tmp_path / "out")
    for verb in (
        ("prune", source, tmp_path / "out", "--method", 'magnitude("2:4")'),
        ("export", pruned, tmp_path / "out"),
    ):
        result = run_here(*verb, "--overwrite")
        assert result.status == 2
        assert "another budwood process writes to" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    held.release()
    assert everything(tmp_path / "out") == before


def everything(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def shards(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("verb", [("evaluate", "--data", "sotu"), ("generate", "--prompt", "a")])
def test_an_unknown_device_is_refused(source, run_here, verb):
    name, *options = verb
    result = run_here(name, source, *options, "--device", "abacus")
    assert result.status == 2
    assert "abacus" in result.stderr


def test_a_folder_with_another_run_is_refused(pruned, source, text, run_here):
    before = {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()}
    result = run_here("prune", source, pruned, "--method", 'wanda("2:4")', "--data", text, *CALIBRATION)
    assert result.status == 2
    assert "--overwrite" in result.stderr
    assert {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()} == before


def test_ctrl_c_says_how_to_continue(source, run_here, tmp_path, monkeypatch):
    import budwood

    arguments = ("prune", source, tmp_path / "out", "--method", 'magnitude("2:4")', "--quiet", "--json")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(budwood, "prune", interrupted, raising=False)
    result = run_here(*arguments)
    assert result.status == 130
    assert result.stdout == ""
    assert "same command" in result.stderr


def test_a_finished_run_is_not_repeated(pruned, source, text, run_here):
    arguments = ("--method", "wrp(alpha=0.25)", "--data", text, "--json", *CALIBRATION)
    before = {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()}
    result = run_here("prune", source, pruned, *arguments)
    assert result.status == 0, result.stderr
    assert result.json == json.loads((pruned / "report.json").read_text())
    assert {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()} == before


def test_a_closed_pipe_is_no_error():
    """`true` ends long before the verb writes; this verb imports less than others."""
    command = f"{sys.executable} -m budwood methods | true"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_bench_adds_its_figures_to_the_folder(source, pruned, run_here, tmp_path):
    folder = tmp_path / "pruned"
    shutil.copytree(pruned, folder)
    found = run_here("bench", folder, "--against", source, "--rows", "1,3", "--quiet", "--json")
    assert found.status == 0, found.stderr
    report = json.loads(found.stdout)
    assert {one["rows"] for one in report["matrices"]} == {1, 3}
    for one in report["matrices"]:
        seconds = one["seconds"]["pruned"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
    assert report["model"]["decode_times_dense"] > 0
    assert report["model"]["pruned"]["bytes"] < report["model"]["dense"]["bytes"]
    kept = json.loads((folder / "report.json").read_text())
    assert kept["speed"]["matrices"] == report["matrices"]
    assert kept["totals"] == json.loads((pruned / "report.json").read_text())["totals"]
    card = (folder / "README.md").read_text()
    assert card.count("## Speed") == 1
    assert run_here("bench", folder, "--rows", "1", "--quiet").status == 0
    again = (folder / "README.md").read_text()
    assert again.count("## Speed") == 1
    assert again.partition("## Speed")[0] == card.partition("## Speed")[0]


@pytest.mark.parametrize("rows", ["0", "a,b", "-1,2"])
def test_bench_refuses_invalid_rows(pruned, run_here, rows):
    result = run_here("bench", pruned, "--rows", rows)
    assert result.status == 2
    assert "such as 1,8,64,512" in result.stderr


def test_bench_needs_something_to_compare(source, run_here):
    result = run_here("bench", source, "--rows", "1")
    assert result.status == 2
    assert "holds no packed matrix" in result.stderr
