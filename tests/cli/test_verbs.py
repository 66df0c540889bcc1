"""The verbs from end to end on a tiny model, through the real entry point."""

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
    ended = run("prune", source, target, "--method", "wrp(alpha=0.25)", "--data", text, *CALIBRATION)
    assert ended.status == 0, ended.stderr
    return target


def test_prune_writes_a_whole_folder(pruned):
    names = {file.name for file in pruned.iterdir()}
    assert {"config.json", "README.md", "recipe.json", "report.json", "report.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    report = json.loads((pruned / "report.json").read_text())
    assert report["totals"]["recovered"] > 0


def test_prune_tells_people_the_figures(source, text, told, tmp_path):
    ended = told("prune", source, tmp_path / "out", "--method", 'wanda("2:4")', "--data", text, *CALIBRATION)
    assert ended.status == 0, ended.stderr
    assert "50.00 %" in ended.stdout
    assert ended.stderr == ""


def test_prune_json_is_the_report(source, text, told, tmp_path):
    arguments = ("--method", 'magnitude("2:4")', "--json", *CALIBRATION)
    ended = told("prune", source, tmp_path / "out", *arguments)
    assert ended.status == 0, ended.stderr
    assert ended.json["totals"] == json.loads((tmp_path / "out" / "report.json").read_text())["totals"]


def test_underscores_and_repeated_skips_reach_the_library(source, told, tmp_path):
    skips = ("--skip", r"layers\.0\.", "--skip", "down_proj")
    ended = told(
        "prune",
        source,
        tmp_path / "out",
        "--method",
        "magnitude('50%')",
        "--compute_dtype",
        "float32",
        *skips,
    )
    assert ended.status == 0, ended.stderr
    linears = json.loads((tmp_path / "out" / "report.json").read_text())["linears"]
    assert linears
    assert not [name for name in linears if "layers.0." in name or "down_proj" in name]


def test_plan_says_what_prune_then_writes(source, told, tmp_path):
    planned = told("plan", source, "--method", 'magnitude("2:4")', "--format", "two_four", "--json")
    assert planned.status == 0, planned.stderr
    ended = told(
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
    assert ended.status == 0, ended.stderr
    assert planned.json["bytes_after"] == pytest.approx(ended.json["totals"]["bytes"], rel=0.005)


def test_plan_reads_a_lone_config(source, told, tmp_path):
    shutil.copy(source / "config.json", tmp_path / "config.json")
    ended = told("plan", tmp_path / "config.json", "--method", "wrp(alpha=0.25)")
    assert ended.status == 0, ended.stderr
    assert "two_four_compact" in ended.stdout


def test_evaluate_resident_and_streamed_agree(pruned, text, told):
    arguments = ("evaluate", pruned, "--data", text, "--seq-length", 32, "--limit", 2, "--json", "--quiet")
    resident, streamed = told(*arguments), told(*arguments, "--stream")
    assert resident.status == streamed.status == 0, resident.stderr + streamed.stderr
    assert resident.json["perplexity"] == streamed.json["perplexity"]
    assert resident.json["windows"] == 2


def test_inspect_finds_what_the_report_says(pruned, told):
    ended = told("inspect", pruned, "--json")
    assert ended.status == 0, ended.stderr
    report = json.loads((pruned / "report.json").read_text())
    for name, matrix in report["linears"].items():
        found = ended.json["linears"][name]
        for key in ("shape", "format", "nonzeros", "density", "recovered", "bytes"):
            assert found[key] == pytest.approx(matrix[key]) if isinstance(matrix[key], float) else matrix[key], key
        assert found["pattern"].startswith("2:4")
    assert ended.json["totals"]["bytes"] == report["totals"]["bytes"]
    assert ended.json["checksums"] == "checksums match"


def test_inspect_sees_a_broken_pattern(source, told, tmp_path):
    target = tmp_path / "out"
    arguments = ("--method", 'magnitude("2:4")', "--format", "dense", "--quiet")
    assert told("prune", source, target, *arguments).status == 0
    assert told("inspect", target).status == 0
    name = "model.layers.1.mlp.up_proj"
    shard = next(file for file in target.glob("model-*.safetensors") if f"{name}.weight" in load_file(file))
    tensors = load_file(shard)
    tensors[f"{name}.weight"][0, :4] = 1.0
    save_file(tensors, shard)
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"].pop("sha256", None)
    index.write_text(json.dumps(content))
    ended = told("inspect", target, "--json")
    assert ended.status == 1
    assert ended.json["totals"]["broken"] == [name]


def test_inspect_names_an_altered_shard(pruned, told, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    shard = sorted(copy.glob("sparse-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = told("inspect", copy)
    assert ended.status == 1
    assert shard.name in ended.stderr
    assert "Traceback" not in ended.stderr


def test_inspect_x4_of_a_dense_model(source, told):
    ended = told("inspect", source, "--x4", "--json")
    assert ended.status == 0, ended.stderr
    for matrix in ended.json["linears"].values():
        assert sum(matrix["x4"]) == pytest.approx(1)
        kept = sum(count * part for count, part in enumerate(matrix["x4"]))
        assert kept == pytest.approx(2)  # half of four


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_inspect_reads_turned_and_fused_matrices(family, told, tmp_path):
    save_model(family, tmp_path / "source")
    arguments = ("--method", 'magnitude("2:4")', "--quiet", "--json")
    ended = told("prune", tmp_path / "source", tmp_path / "out", *arguments)
    assert ended.status == 0, ended.stderr
    for folder, pattern in ((tmp_path / "source", "dense"), (tmp_path / "out", "2:4")):
        found = told("inspect", folder, "--json")
        assert found.status == 0, found.stderr
        assert {name: matrix["shape"] for name, matrix in found.json["linears"].items()} == {
            name: matrix["shape"] for name, matrix in ended.json["linears"].items()
        }
        assert {matrix["pattern"] for matrix in found.json["linears"].values()} == {pattern}


def test_export_gives_a_folder_that_needs_no_budwood(pruned, source, told, tmp_path):
    ended = told("export", pruned, tmp_path / "dense", "--json")
    assert ended.status == 0, ended.stderr
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense, packed = told("inspect", tmp_path / "dense", "--json"), told("inspect", pruned, "--json")
    for name, matrix in packed.json["linears"].items():
        assert dense.json["linears"][name]["nonzeros"] == matrix["nonzeros"]


def test_export_rounds_what_prune_left(pruned, told, tmp_path, monkeypatch):
    ended = told("export", pruned, tmp_path / "int8", "--values", "int8", "--json", "--quiet")
    assert ended.status == 0, ended.stderr
    assert ended.json["format"] == "auto_int8"
    found = told("inspect", tmp_path / "int8", "--json")
    assert found.status == 0, found.stderr
    assert {matrix["format"] for matrix in found.json["linears"].values()} == {"two_four_compact_int8"}
    assert found.json["totals"]["bits_per_weight"] == ended.json["totals"]["bits_per_weight"]
    monkeypatch.setenv("COLUMNS", "200")
    assert "two_four_compact_int8" in told("inspect", tmp_path / "int8").stdout
    again = told("export", tmp_path / "int8", tmp_path / "twice", "--values", "int8")
    assert again.status == 2
    assert "int8 already" in again.stderr


def test_int8_values_reach_plan_and_prune(source, told, tmp_path):
    arguments = ("--method", "wrp(density=0.02, metric='magnitude')", "--values", "int8")
    planned = told("plan", source, *arguments)
    assert planned.status == 0, planned.stderr
    assert "two_four_compact_int8 (chosen)" in planned.stdout
    ended = told("prune", source, tmp_path / "out", *arguments, "--quiet")
    assert ended.status == 0, ended.stderr
    assert "rounding error of a matrix" in ended.stdout
    refused = told("prune", source, tmp_path / "other", *arguments, "--format", "two_four_csr")
    assert refused.status == 2
    assert "two_four_csr holds no int8 values" in refused.stderr
    assert told("prune", source, tmp_path / "other", *arguments[:-1], "int4").status == 2


def test_generate_streams_what_it_returns(pruned, run, told):
    arguments = ("generate", pruned, "--prompt", "The quick", "--max-new-tokens", 8)
    shown, returned = run(*arguments), told(*arguments, "--json")
    assert shown.status == returned.status == 0, shown.stderr
    assert shown.stdout == returned.json["text"] + "\n"
    assert 1 <= returned.json["tokens"] <= 8
    assert shown.stderr == ""


def test_several_prompts_are_answered_as_each_alone(pruned, run, told):
    prompts = ["The quick", "A much longer one, so that the first is padded", "The quick"]
    alone = [told("generate", pruned, "--prompt", text, "--max-new-tokens", 6, "--json").json for text in prompts]
    options = [word for text in prompts for word in ("--prompt", text)]
    shown, together = (run(*("generate", pruned, *options, "--max-new-tokens", 6, *more)) for more in ((), ("--json",)))
    assert shown.status == together.status == 0, shown.stderr + together.stderr
    answers = json.loads(together.stdout)["answers"]
    assert answers == [{key: one[key] for key in ("prompt", "text", "tokens")} for one in alone]
    assert shown.stdout == "\n\n".join(one["prompt"] + one["text"] for one in alone) + "\n"


def test_a_batch_wants_something_to_pad_with(pruned, told, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(pruned, bare)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (bare / name).exists():
            config = json.loads((bare / name).read_text())
            kept = {key: value for key, value in config.items() if not key.endswith("_token")}
            (bare / name).write_text(json.dumps(kept))
    alone, both = (told("generate", bare, *("--prompt", "a") * n, "--max-new-tokens", 2) for n in (1, 2))
    assert alone.status == 0, alone.stderr
    assert both.status == 2
    assert "pad" in both.stderr


def test_generate_without_a_chat_template(pruned, told):
    ended = told("generate", pruned, "--prompt", "a", "--chat")
    assert ended.status == 2
    assert "chat template" in ended.stderr


def test_methods_list_and_options(told):
    from budwood.methods import METHODS

    listed = told("methods", "--json")
    assert set(listed.json) == set(METHODS)
    for name in METHODS:
        shown = told("methods", name, "--json")
        assert shown.json["name"] == name
        assert all(option["name"].isidentifier() for option in shown.json["options"])
        assert told("methods", name).status == 0


def test_methods_offers_the_nearest_name(told):
    ended = told("methods", "wnda")
    assert ended.status == 2
    assert "wanda" in ended.stderr


def test_env_names_versions_and_kernels(told):
    ended = told("env", "--json")
    assert ended.status == 0
    assert ended.json["versions"]["torch"] == torch.__version__
    assert ended.json["kernels"]
    assert told("env").status == 0


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
def test_requests_that_cannot_be_are_one_sentence_and_write_nothing(source, text, told, tmp_path, changed, word):
    options = {"source": source, "--method": "wrp()", "--data": text} | changed
    model = options.pop("source")
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    ended = told("prune", model, tmp_path / "out", *given, *CALIBRATION)
    assert ended.status == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("budwood: ")
    assert word in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_refused(pruned, source, text, told):
    before = {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()}
    ended = told("prune", source, pruned, "--method", 'wanda("2:4")', "--data", text, *CALIBRATION)
    assert ended.status == 2
    assert "--overwrite" in ended.stderr
    assert {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()} == before


def test_ctrl_c_says_that_the_same_command_goes_on(source, told, tmp_path, monkeypatch):
    import budwood

    arguments = ("prune", source, tmp_path / "out", "--method", 'magnitude("2:4")', "--quiet", "--json")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(budwood, "prune", interrupted, raising=False)
    ended = told(*arguments)
    assert ended.status == 130
    assert ended.stdout == ""
    assert "same command" in ended.stderr


def test_a_finished_run_is_not_done_twice(pruned, source, text, told):
    arguments = ("--method", "wrp(alpha=0.25)", "--data", text, "--json", *CALIBRATION)
    before = {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()}
    ended = told("prune", source, pruned, *arguments)
    assert ended.status == 0, ended.stderr
    assert ended.json == json.loads((pruned / "report.json").read_text())
    assert {file.name: file.stat().st_mtime_ns for file in pruned.iterdir()} == before


def test_python_m_and_a_closed_pipe_end_quietly(source):

    command = f"{sys.executable} -m budwood inspect {source} --x4 | head -n 1"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


def test_bench_times_and_keeps_the_figures(source, pruned, told, run, tmp_path):
    folder = tmp_path / "pruned"
    shutil.copytree(pruned, folder)
    found = told("bench", folder, "--against", source, "--rows", "1,3", "--quiet", "--json")
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
    assert run("bench", folder, "--rows", "1", "--quiet").status == 0
    again = (folder / "README.md").read_text()
    assert again.count("## Speed") == 1
    assert again.partition("## Speed")[0] == card.partition("## Speed")[0]


@pytest.mark.parametrize("rows", ["0", "a,b", "-1,2"])
def test_bench_refuses_rows_that_are_none(pruned, run, rows):
    ended = run("bench", pruned, "--rows", rows)
    assert ended.status == 2
    assert "such as 1,8,64,512" in ended.stderr


def test_bench_refuses_a_dense_model(source, run):
    ended = run("bench", source, "--rows", "1")
    assert ended.status == 2
    assert "holds no packed matrix" in ended.stderr
