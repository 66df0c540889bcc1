"""What needs no model imports no transformers; what needs no tensors imports no torch. Counted in modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("transformers", "accelerate", "safetensors", "huggingface_hub", "datasets")
PROGRAM = """
import json, sys
from budwood.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    status = 0
    try:
        main()
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    results.append({"status": status, "modules": [name for name in sys.modules if "." not in name]})
open("results.json", "w").write(json.dumps(results))
"""
WITHOUT_TORCH = [
    (["--help"], 0),
    (["--version"], 0),
    (["prune", "--help"], 0),
    (["methods", "--help"], 0),
    (["uproot"], 2),
    (["prune", "model", "out", "--methd", "wrp()"], 2),
    (["prune", "model", "out"], 2),
    (["prune", "model", "out", "--recipe", "no-such-recipe.json"], 2),
    (["prune", "model", "out", "--method", "wrp()", "--activation-memory", "much"], 2),
    (["bench", "model", "--rows", "0"], 2),
    (["report", "model"], 2),
    (["report", "no-such-folder"], 2),
    (["bench", "no-such-model"], 2),
    (["inspect", "no-such-model"], 2),
    (["evaluate", "no-such-model", "--data", "text.txt"], 2),
    (["evaluate", "model", "--tasks", "piqa", "--tasks-data", "no-such-folder"], 2),
    (["generate", "no-such-model", "--prompt", "a"], 2),
    (["export", "no-such-model", "out"], 2),
    (["retrain", "no-such-model", "out", "--data", "text.txt"], 2),
    (["convert", "no-such-file.gguf", "out"], 2),
    (["compare", "no-such-recipe.yaml", "out"], 2),
    (["compare", "recipe.yaml", "out", "--set", "data"], 2),
]
WITHOUT_TRANSFORMERS = [
    (["methods"], 0),
    (["methods", "wrp", "--json"], 0),
    (["methods", "wnda"], 2),
    (["env"], 0),
    (["prune", "model", "out", "--method", "wanda('2:5%')"], 2),
    (["prune", "model", "out", "--method", "wrp(alpha=1.5)"], 2),
    (["prune", "model", "out", "--method", "wrp()", "--format", "zip"], 2),
    (["prune", "no-such-model", "out", "--method", "wrp()"], 2),
    (["plan", "model", "--method", "nosuch()"], 2),
    (["plan", "no-such-model", "--method", "wrp()"], 2),
    (["export", "model", "out", "--format", "zip"], 2),
    (["compare", "recipe.yaml", "out"], 2),
]


@pytest.fixture(scope="module")
def run_all(tmp_path_factory):
    """Runs commands in one process, in a working directory with a folder `model` that must not be opened and a recipe
    with an unknown method.

    A command that imports too much spoils those after it as well; the first that fails is the cause.
    """

    def invoke(commands):
        folder = tmp_path_factory.mktemp("run")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "recipe.yaml").write_text("title: t\nsources: {a: model}\nmethods: [wnda]\n")
        subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps([arguments for arguments, _ in commands])],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            check=True,
        )
        assert not (folder / "out").exists()
        return json.loads((folder / "results.json").read_text())

    return invoke


def test_no_torch_is_imported(run_all):
    for (arguments, status), result in zip(WITHOUT_TORCH, run_all(WITHOUT_TORCH), strict=True):
        assert result["status"] == status, arguments
        assert not set(result["modules"]) & {"torch", "numpy", *HEAVY}, arguments


def test_no_transformers_is_imported(run_all):
    for (arguments, status), result in zip(WITHOUT_TRANSFORMERS, run_all(WITHOUT_TRANSFORMERS), strict=True):
        assert result["status"] == status, arguments
        assert "torch" in result["modules"], arguments
        assert not set(result["modules"]) & set(HEAVY), arguments


def test_the_plug_in_adds_no_package_to_torch():
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from budwood.autoload import install\n"
        "install()\n"
        "assert {name for name in set(sys.modules) - before if name.startswith('budwood')} <= "
        "{'budwood', 'budwood.autoload'}\n"
        f"assert not set({HEAVY}) & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_torch_with_the_plug_in_imports_no_transformers():
    program = f"import sys, torch\nassert not set({HEAVY}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
