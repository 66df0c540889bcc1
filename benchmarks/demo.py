"""The demo: a real model pruned by three methods on a real text; quality and size of each. Run by `make demo`.

It uses the library as a user would. Everything is written to one folder; the converted model is kept there for the next
time, the pruned models are made again.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from budwood import humanize
from budwood.cli.progress import LineProgress
from budwood.cli.terminal import console, stdout_to_stderr, table
from budwood.errors import BudwoodError

METHODS = {
    "Wanda 2:4": 'wanda("2:4")',
    "WRP 2:4": "wrp(alpha=0.25)",
    "graft 2:4": "graft(bits=9.75)",
}
YARDSTICK = "Wanda 2:4"
SHOWN = "graft 2:4"  # the model that generates a sentence
DATA = "sotu"  # calibrates on 1947-1999 and evaluates on 2000 and later
SAMPLES, SAMPLE_LENGTH = 6, 512
WINDOWS, WINDOW_LENGTH = 2, 1024
PROMPT = "My fellow Americans, the state of our union is"


class Quieter(LineProgress):
    """No notes of the steps inside: the demo prints one line per step."""

    def note(self, sentence: str) -> None: ...


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def converted(folder: Path) -> Path:
    """The small model as a folder of safetensors in bfloat16, made on the first run."""
    from budwood.conversion import convert
    from budwood.demo_assets import SMALL_MODEL

    if not (folder / "config.json").is_file():
        say("converting SmolLM2-135M from GGUF, once")
        convert(SMALL_MODEL.locate(), folder, dtype="bfloat16", overwrite=True)
    return folder


def measured(folder: Path) -> float:
    """Perplexity, computed in float32 whatever the stored dtype, so that machines agree."""
    import budwood

    found = budwood.evaluate(folder, DATA, seq_length=WINDOW_LENGTH, limit=WINDOWS, dtype="float32", progress=Quieter())
    return found[0].perplexity


def pruned(source: Path, target: Path, expression: str) -> dict[str, Any]:
    import budwood

    shutil.rmtree(target, ignore_errors=True)
    return budwood.prune(
        source,
        target,
        expression,
        DATA,
        num_samples=SAMPLES,
        seq_length=SAMPLE_LENGTH,
        sampling="consecutive",
        dtype="bfloat16",
        progress=Quieter(),
    )


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def sentence(folder: Path) -> str:
    """What the pruned model says, loaded with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def gap_closed(perplexity: float, dense: float, yardstick: float) -> float:
    """1 where the loss is dense's, 0 where it is the yardstick's, negative where it is worse."""
    return 1 - math.log(perplexity / dense) / math.log(yardstick / dense)


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    dense, yardstick = rows["dense"], rows[YARDSTICK]["perplexity"]
    out = console()
    out.print(
        table(
            (
                "method",
                "perplexity",
                "gap closed",
                "recovered",
                "bits/weight",
                "on disk",
                "of dense",
                "pruned in",
            ),
            [
                (
                    name,
                    f"{row['perplexity']:.2f}",
                    humanize.share(gap_closed(row["perplexity"], dense["perplexity"], yardstick), 0),
                    humanize.share(row["recovered"]),
                    humanize.figure(row["bits_per_weight"], 3),
                    humanize.size(row["bytes"]),
                    humanize.share(row["bytes"] / dense["bytes"], 1),
                    humanize.seconds(row["seconds"]),
                )
                for name, row in rows.items()
            ],
        )
    )
    out.print(
        f"gap closed: the share of the loss between dense (100 %) and {YARDSTICK} (0 %) that is not lost.\n"
        "bits/weight: of the pruned matrices, index and all; on disk: the whole model, embeddings dense.\n"
        f"Calibrated on {SAMPLES} x {SAMPLE_LENGTH} tokens of sotu 1947-1999.\n"
        f"Perplexity on sotu from 2000 on (plain), first {WINDOWS} windows of {WINDOW_LENGTH} tokens.\n"
        "Weights stored in bfloat16, perplexity computed in float32. SmolLM2-135M-Instruct from 4 bits."
    )


def main(folder: Path) -> None:
    """Convert, prune, measure, and leave the models and `demo.json` in `folder`."""
    began = time.monotonic()
    with stdout_to_stderr():
        source = converted(folder / "SmolLM2-135M")
        say("dense: measuring")
        rows: dict[str, dict[str, Any]] = {
            "dense": {
                "perplexity": measured(source),
                "recovered": None,
                "bits_per_weight": 16.0,
                "bytes": weight_bytes(source),
                "seconds": None,
            }
        }
        for name, expression in METHODS.items():
            target = folder / name.lower().replace(" %", "").replace(" ", "-").replace(":", "of")
            say(f"{name}: pruning, then measuring")
            report = pruned(source, target, expression)
            rows[name] = {
                "perplexity": measured(target),
                "recovered": report["totals"]["recovered"] or None,
                "bits_per_weight": report["totals"]["bits_per_weight"],
                "bytes": weight_bytes(target),
                "seconds": report["seconds"]["total"],
                "folder": str(target),
            }
        said = sentence(Path(rows[SHOWN]["folder"]))
    (folder / "demo.json").write_text(json.dumps({"rows": rows, "sentence": said}, indent=2) + "\n")
    show(rows)
    print(f"\n{SHOWN}, loaded with transformers alone, writes:\n  {' '.join(said.split())}\n")
    print(f"Its folder: {rows[SHOWN]['folder']}, with report.md.")
    print(f"In all {humanize.seconds(time.monotonic() - began)}.")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except BudwoodError as error:
        sys.exit(f"demo: {error}")
