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
sys.argv[1:] = json.loads(sys.argv[1])
from budwood.cli import main
status = 0
try:
    main()
except SystemExit as exit_:
    status = int(exit_.code or 0)
print(json.dumps({"status": status, "modules": [name for name in sys.modules if "." not in name]}), file=sys.stderr)
"""


def imported(arguments: list[str], folder: Path) -> tuple[int, set[str]]:
    """Exit status and imported packages of `budwood ARGUMENTS`, run in `folder` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    result = json.loads(done.stderr.splitlines()[-1])
    return result["status"], set(result["modules"])


@pytest.fixture
def folder(tmp_path):
    """A working directory with a folder `model` that must not be opened, and a recipe with an unknown method."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("title: t\nsources: {a: model}\nmethods: [wnda]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
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
    ],
)
def test_no_torch_is_imported(arguments, status, folder):
    found, modules = imported(arguments, folder)
    assert found == status
    assert not modules & {"torch", "numpy", *HEAVY}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
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
    ],
)
def test_no_transformers_is_imported(arguments, status, folder):
    found, modules = imported(arguments, folder)
    assert found == status
    assert "torch" in modules
    assert not modules & set(HEAVY)
    assert not (folder / "out").exists()


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
