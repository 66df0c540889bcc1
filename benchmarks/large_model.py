"""Peak memory of pruning a model much larger than it: a random Llama of a given size.

    python benchmarks/large_model.py FOLDER [--gigabytes 8] [--method "wrp(alpha=0.25)"]

Builds FOLDER/dense once (bfloat16), prunes it in a separate process and prints the peak resident size.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from random_llama import build, write_text

HIDDEN, WIDE, HEADS, VOCABULARY = 2560, 6912, 20, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--method", default="wrp(alpha=0.25)")
    parser.add_argument("--compute-dtype", default="auto")
    asked = parser.parse_args()
    dense, text, out = asked.folder / "dense", asked.folder / "text.txt", asked.folder / "pruned"
    if not (dense / "config.json").is_file():
        block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE
        blocks = int((asked.gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / block) + 1
        build(dense, HIDDEN, WIDE, blocks, HEADS, VOCABULARY)
    write_text(text, 6000)
    command = [
        sys.executable,
        "-m",
        "budwood",
        "prune",
        str(dense),
        str(out),
        "--method",
        asked.method,
        "--data",
        str(text),
        "--num-samples",
        "8",
        "--seq-length",
        "256",
        "--overwrite",
        "--json",
        "--compute-dtype",
        asked.compute_dtype,
    ]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    peak = report["peak_memory"]
    print(
        f"file {size / 1e9:.2f} GB, peak resident {peak / 1e9:.2f} GB: {peak / size:.3f} of the file; "
        f"{report['compute_dtype']}, {report['seconds']['total']:.0f} s, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
