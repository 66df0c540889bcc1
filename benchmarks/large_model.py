"""Peak memory of pruning a model much larger than it: a random Llama, its file written shard by shard.

    python benchmarks/large_model.py FOLDER [--gigabytes 8]

Builds FOLDER/dense once (bfloat16), prunes it in a process of its own and prints the peak resident size.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, WIDE, VOCABULARY = 2560, 6912, 32000
WORDS = 400  # distinct words of the made-up calibration text


def build(folder: Path, gigabytes: float) -> None:
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE
    blocks = int((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / block) + 1
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=blocks,
        num_attention_heads=20,
        num_key_value_heads=20,
        max_position_embeddings=2048,
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    write(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
    )
    for index in range(blocks):
        path = f"model.layers.{index}"
        norms = {
            f"{path}.{n}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        attention = {f"{path}.self_attn.{n}_proj.weight": matrix(HIDDEN, HIDDEN) for n in "qkvo"}
        mlp = {f"{path}.mlp.{n}_proj.weight": matrix(WIDE, HIDDEN) for n in ("gate", "up")}
        down = {f"{path}.mlp.down_proj.weight": matrix(HIDDEN, WIDE)}
        write(f"model-{index:05d}.safetensors", norms | attention | mlp | down)
        print(f"\rbuilding block {index + 1} of {blocks}", end="", file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<unk>": WORDS}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--method", default="wrp(alpha=0.25)")
    parser.add_argument("--compute-dtype", default="auto")
    asked = parser.parse_args()
    dense, text, out = asked.folder / "dense", asked.folder / "text.txt", asked.folder / "pruned"
    if not (dense / "config.json").is_file():
        build(dense, asked.gigabytes)
    chance = torch.randint(WORDS, (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    text.write_text(" ".join(f"w{i}" for i in chance))
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
