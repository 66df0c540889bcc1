"""Loads a folder in a process that cannot import this package."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

PROGRAM = """
import sys
sys.modules["budwood"] = None  # an import of it raises
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
assert not any(report.values()), report
assert type(model).__module__.startswith("transformers."), type(model)
ids = torch.tensor(eval(sys.argv[2]))
with torch.no_grad():
    save_file({"logits": model.eval()(ids, use_cache=False).logits.contiguous()}, sys.argv[3])
"""


def logits_without_budwood(folder, ids, output) -> torch.Tensor:
    """[batch, tokens, vocabulary] for ids [batch, tokens]; nothing may be missing, unexpected or of another size.

    output: a file that may be written.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), repr(ids.tolist()), str(output)],
        check=True,
        cwd=output.parent,
        env={**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    return load_file(output)["logits"]
