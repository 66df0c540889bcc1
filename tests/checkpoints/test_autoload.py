"""Plain `from_pretrained` in fresh processes: with the plug-in it loads, without it says so."""

import os
import subprocess
import sys

import pytest
import torch
from families import token_ids
from folders import logits, write_packed
from transformers import AutoModelForCausalLM

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[3:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            torch.save(model(torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[1])
        print("loaded")
    except Exception as error:
        print(type(error).__name__)
"""
LIGHT = """
import sys, budwood
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "import budwood is not light"
import torch
assert "transformers" not in sys.modules
"""
FAILING = """
import budwood.autoload
def fail(*args): raise ValueError("broken on purpose")
budwood.autoload.register = budwood.autoload.RegistryFinder = fail
budwood.autoload.install()
import sys; sys.modules["transformers.quantizers.auto"] = sys
budwood.autoload.install()
import torch
"""


def start(code, *arguments, autoload):
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All processes at once: their cost is the import of transformers."""
    root = tmp_path_factory.mktemp("folders")
    finished, _ = write_packed(root / "finished")
    loaded = AutoModelForCausalLM.from_pretrained(finished, dtype="auto")
    loaded.save_pretrained(root / "again")
    torch.save(logits(loaded), root / "expected.pt")
    torch.save(token_ids(), ids := root / "ids.pt")
    started = {
        "import": start(LIGHT + LOAD, root / "import.pt", ids, finished, autoload=False),
        "entry": start(LOAD, root / "entry.pt", ids, finished, root / "again", autoload=True),
        "without": start(LOAD, root / "without.pt", ids, finished, root / "again", autoload=False),
        "broken": start(FAILING, autoload=True),
    }
    outputs = {name: process.communicate(timeout=120) for name, process in started.items()}
    return root, {name: (started[name].returncode, *outputs[name]) for name in started}


def test_an_import_is_enough(runs):
    root, results = runs
    assert results["import"][1].split() == ["loaded"], results["import"][2]
    assert torch.equal(torch.load(root / "import.pt"), torch.load(root / "expected.pt"))


def test_the_entry_point_needs_no_import(runs):
    root, results = runs
    assert results["entry"][1].split() == ["loaded", "loaded"], results["entry"][2]
    assert torch.equal(torch.load(root / "entry.pt"), torch.load(root / "expected.pt"))


def test_without_the_plug_in_loading_fails_loudly(runs):
    """Never random weights: neither for a finished folder nor for one that `save_pretrained` wrote."""
    root, results = runs
    assert results["without"][1].split() == ["OSError", "RuntimeError"], results["without"][2]
    assert not (root / "without.pt").exists()


def test_the_package_imports_neither_torch_nor_transformers(runs):
    assert runs[1]["import"][0] == 0, runs[1]["import"][2]


def test_a_failure_inside_never_reaches_torch(runs):
    assert runs[1]["broken"][0] == 0, runs[1]["broken"][2]
