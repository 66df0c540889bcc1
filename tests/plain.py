"""Loads folders in a process that cannot import this package; one process for all tests of a session."""

import json
import os
import subprocess
import sys
from functools import cache

import torch
from safetensors.torch import load_file

PROGRAM = """
import json, sys
sys.modules["budwood"] = None  # an import of it raises
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

def answer(folder, ids, output):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        save_file({"logits": model.eval()(torch.tensor(ids), use_cache=False).logits.contiguous()}, output)

for line in sys.stdin:
    try:
        answer(*json.loads(line))
        print("done", flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
"""


@cache
def process() -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
        env={**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )


def logits_without_budwood(folder, ids, output) -> torch.Tensor:
    """[batch, tokens, vocabulary] for ids [batch, tokens]; nothing may be missing, unexpected or of another size.

    output: a file that may be written.
    """
    running = process()
    running.stdin.write(json.dumps([str(folder), ids.tolist(), str(output)]) + "\n")
    running.stdin.flush()
    assert running.stdout.readline().strip() == "done"
    return load_file(output)["logits"]
