"""Time of pruning in plain passes: forward passes of the blocks over the same tokens through transformers.

    python benchmarks/prune_speed.py MODEL DATA [--rounds 3] [--compute-dtype float32 bfloat16]

Plain passes and runs alternate, so that a change of the machine's speed affects both; medians and ratios are printed.
Time is that of the whole call: opening, dense loss, statistics, choice, packing, writing, report.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.windows import calibration_windows
from budwood.environment import machine

METHODS = ('wanda("50%")', 'wanda("2:4")', "wrp(alpha=0.25)", 'sparsegpt("2:4")', 'sparsegpt("50%")')


def plain_pass(model: torch.nn.Module, ids: torch.Tensor, batch: int) -> float:
    """Seconds for all windows through the decoder, without the vocabulary head."""
    start = time.perf_counter()
    with torch.no_grad():
        for part in ids.split(batch):
            model.base_model(input_ids=part, use_cache=False)
    return time.perf_counter() - start


def pruning(model: str, data: str, method: str, samples: int, length: int, compute: str) -> tuple[float, float]:
    """Seconds of the whole call in a process of its own, as a user runs it, and of the loop over blocks."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        target = Path(folder) / "out"
        options = {
            "--method": method,
            "--data": data,
            "--num-samples": samples,
            "--seq-length": length,
            "--sampling": "consecutive",
            "--compute-dtype": compute,
        }
        command = [sys.executable, "-m", "budwood", "prune", model, str(target), "--quiet"]
        command += [str(word) for option in options.items() for word in option]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = json.loads((target / "report.json").read_text())["seconds"]
        return seconds["total"], seconds["blocks"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--compute-dtype", nargs="+", default=["float32"], help="several are run in alternation")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    asked = parser.parse_args()

    ids = calibration_windows(
        asked.data,
        load_tokenizer(asked.model),
        num_samples=asked.num_samples,
        seq_length=asked.seq_length,
        sampling="consecutive",
    ).ids
    few = ids[:16]
    models, batches = {}, {}
    print(f"{machine()}\n{ids.numel()} tokens")
    for name in asked.compute_dtype:
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, name)).eval()
        batches[name] = min((1, 2, 4, 8, 16), key=lambda size, model=model: plain_pass(model, few, size))
        models[name] = model
        print(f"plain pass in {name}: batch {batches[name]}")

    passes: dict[str, list[float]] = {name: [] for name in models}
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(asked.rounds):
        for method in asked.methods:
            for name, model in models.items():
                passes[name].append(plain_pass(model, ids, batches[name]))
                whole, loop = pruning(asked.model, asked.data, method, asked.num_samples, asked.seq_length, name)
                runs.setdefault((method, name), []).append((whole, loop))
                print(
                    f"  {name}: pass {passes[name][-1]:.1f} s, {method} {whole:.1f} s (blocks {loop:.1f} s)", flush=True
                )
    plain = {name: statistics.median(times) for name, times in passes.items()}
    print("\n| | type | seconds | plain passes | blocks alone, plain passes |\n| --- | --- | ---: | ---: | ---: |")
    for name, seconds in plain.items():
        print(f"| plain pass | {name} | {seconds:.1f} | 1 | |")
    for (method, name), times in runs.items():
        whole, loop = (statistics.median(part) for part in zip(*times, strict=True))
        print(f"| {method} | {name} | {whole:.1f} | {whole / plain[name]:.2f} | {loop / plain[name]:.2f} |")


if __name__ == "__main__":
    main()
