"""No verb runs the code of a folder unless asked to, and none asks; what is printed holds no control characters."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from families import save_model

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import open_source
from budwood.cli.printable import UNSAFE, Escaping, one_line, printable, printable_json
from budwood.cli.progress import LineProgress
from budwood.cli.terminal import console, print_notes, print_result, stdout_to_stderr, table
from budwood.pruning import prune

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
EVIL = "a\x1b[2J\x1b]0;title\x07\r\x9b1m\u202eb\ud800"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and a pruned folder, and copies of them with code of their own that leaves a mark when it runs."""
    here = tmp_path_factory.mktemp("models")
    save_model("llama", here / "dense")
    prune(here / "dense", here / "pruned", 'magnitude("2:4")')
    (here / "text.txt").write_text("Some words of text for the model to read.\n" * 20)
    for name in ("dense", "pruned"):
        own = shutil.copytree(here / name, here / f"own-{name}")
        (own / "own.py").write_text(CODE.format(marker=str(here / "marker")))
        content = json.loads((own / "config.json").read_text())
        content |= {"model_type": "own", "architectures": ["OwnModel"]}
        content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (own / "config.json").write_text(json.dumps(content))
    return here


VERBS = {
    "plan": ("plan", "own-dense", "--method", 'magnitude("2:4")'),
    "prune": ("prune", "own-dense", "out-prune", "--method", 'magnitude("2:4")'),
    "retrain": ("retrain", "own-pruned", "out-retrain", "--data", "text.txt"),
    "evaluate": ("evaluate", "own-dense", "--data", "text.txt", "--seq-length", 16, "--limit", 1),
    "stream": ("evaluate", "own-dense", "--data", "text.txt", "--seq-length", 16, "--limit", 1, "--stream"),
    "inspect": ("inspect", "own-dense"),
    "bench": ("bench", "own-pruned", "--rows", 1),
    "against": ("bench", "pruned", "--against", "own-dense", "--rows", 1),
    "generate": ("generate", "own-dense", "--prompt", "a", "--max-new-tokens", 2),
    "export": ("export", "own-pruned", "out-export"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_a_folder_is_not_run_and_not_asked_for(folders, run_here, monkeypatch, verb):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    result = run_here(*VERBS[verb])
    assert result.status == 2, result.stderr
    assert "comes with code of its own" in result.stderr
    assert "--trust-remote-code" in result.stderr
    assert sys.stdin.tell() == 0
    assert not (folders / "marker").exists()
    assert result.stdout == ""


@pytest.fixture
def own_tokenizer(folders, tmp_path):
    """Folders whose tokenizer alone comes with code, which leaves the same mark."""
    for name in ("dense", "pruned"):
        own = Path(shutil.copytree(folders / name, tmp_path / f"own-{name}"))
        (own / "own.py").write_text(CODE.format(marker=str(folders / "marker")) + "OwnTokenizer = None\n")
        content = json.loads((own / "tokenizer_config.json").read_text())
        content |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (own / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("Some words of text for the model to read.\n" * 20)
    return tmp_path


WITH_TEXT = {name: VERBS[name] for name in ("generate", "evaluate", "stream", "retrain")}
WITH_TEXT["prune"] = ("prune", "own-dense", "out-prune", "--method", "wanda", "--data", "text.txt")


@pytest.mark.parametrize("verb", WITH_TEXT)
def test_code_of_a_tokenizer_is_not_run_and_not_asked_for(folders, own_tokenizer, run_here, monkeypatch, verb):
    monkeypatch.chdir(own_tokenizer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    result = run_here(*WITH_TEXT[verb])
    assert result.status == 2, result.stderr
    assert "--trust-remote-code" in result.stderr
    assert sys.stdin.tell() == 0
    assert not (folders / "marker").exists()


RECIPE = """title: T
sources: {{own: {{model: {model}, trust_remote_code: {asked}}}}}
calibration: {{data: text.txt, num_samples: 4, seq_length: 24}}
methods: [magnitude("2:4")]
"""


@pytest.mark.parametrize(
    ("asked", "given", "runs"), [("true", [], False), ("false", [], False), ("true", ["--trust-remote-code"], True)]
)
def test_a_recipe_alone_cannot_run_the_code_of_a_model(folders, run_here, monkeypatch, tmp_path, asked, given, runs):
    """Anyone may have written it; the command has to say so too."""
    monkeypatch.chdir(folders)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model="own-dense", asked=asked))
    result = run_here("compare", tmp_path / "recipe.yaml", tmp_path / "out", "--dry-run", *given)
    assert result.status == (0 if runs else 2), result.stderr
    assert ("--trust-remote-code" in result.stderr) is not runs
    assert (folders / "marker").exists() is runs
    (folders / "marker").unlink(missing_ok=True)


@pytest.mark.parametrize("verb", ["plan", "generate", "inspect"])
def test_code_of_a_folder_is_run_where_asked_for(folders, run_here, monkeypatch, tmp_path, verb):
    monkeypatch.chdir(folders)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    result = run_here(*VERBS[verb], "--trust-remote-code")
    assert result.status == 0, result.stderr
    assert (folders / "marker").exists()
    (folders / "marker").unlink()


def test_unsafe_characters_are_shown_as_escapes():
    assert printable(EVIL) == "a\\x1b[2J\\x1b]0;title\\x07\\x0d\\x9b1m\\u202eb\\ud800"
    assert printable("a\tb\nc \u00e9 \u6625 \U0001f600") == "a\tb\nc \u00e9 \u6625 \U0001f600"
    assert one_line("a\n b\tc\x00") == "a b c\\x00"
    text = json.dumps({"a": EVIL, "\u2028": "\x7f"}, ensure_ascii=False)
    assert json.loads(printable_json(text)) == {"a": EVIL, "\u2028": "\x7f"}
    assert not UNSAFE.search(printable_json(text))


def test_every_way_to_print_escapes(capsys):
    out = console()
    out.print(table(("name",), [(EVIL,)]))
    out.print(EVIL)
    print_notes(out, [EVIL, "two\nlines"])
    print_result({"name": EVIL}, True, lambda _: None)
    LineProgress().note(EVIL)
    with stdout_to_stderr():
        print(EVIL)
        sys.stderr.write(EVIL)
        sys.stderr.writelines([EVIL])
    found = capsys.readouterr()
    for text in found:
        assert not UNSAFE.search(text.replace("\n", ""))
    assert "note: two lines\n" in found.out
    assert found.out.count("\\x1b[2J") == 3
    assert found.err.count("\\x1b[2J") == 4


def test_an_escaping_stream_is_the_stream_otherwise():
    inner = io.StringIO()
    stream = Escaping(inner)
    assert stream.write("\x1b") == 1
    assert stream.getvalue() == "\\x1b"
    assert stream.isatty() is False


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("recipe.json", {"method": f"magnitude({EVIL})"}),
        ("config.json", {"model_type": EVIL}),
        ("config.json", {"quantization_config": {"quant_method": EVIL}}),
        ("report.json", {"notes": [EVIL], "method": EVIL}),
    ],
)
def test_text_of_a_folder_reaches_the_terminal_escaped(folders, run_here, tmp_path, name, change):
    own = shutil.copytree(folders / "pruned", tmp_path / "own")
    content = json.loads((own / name).read_text())
    (own / name).write_text(json.dumps({**content, **change}))
    calls = [("inspect", own), ("export", own, tmp_path / "out"), ("bench", own, "--rows", "x")]
    if name == "report.json":
        calls = [("prune", folders / "dense", own, "--method", 'magnitude("2:4")')]
    said = ""
    for call in calls:
        result = run_here(*call)
        said += result.stdout + result.stderr
    assert not UNSAFE.search(said.replace("\n", ""))
    assert "\\x1b" in said


def test_the_answer_of_a_model_is_escaped(folders, run_here, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: EVIL)
    for extra in ((), ("--json",), ("--prompt", "b")):
        result = run_here("generate", folders / "dense", "--prompt", "a", "--max-new-tokens", 1, *extra)
        assert result.status == 0, result.stderr
        assert not UNSAFE.search(result.stdout.replace("\n", ""))


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "flash_attention_2", "none", 3, {"": "other/code"}])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_code_of_the_hub_that_a_configuration_names_is_not_fetched(folders, tmp_path, name, field):
    """transformers would load a kernel of that name, as it would run a package that is not installed."""
    own = shutil.copytree(folders / "dense", tmp_path / "own")
    content = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**content, field: name}))
    assert load(own).config._attn_implementation == load(folders / "dense").config._attn_implementation
    assert open_source(own).config._attn_implementation is None
