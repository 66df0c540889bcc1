"""A Llama of any size with random weights and a tokenizer of made-up words, its file written shard by shard.

    python benchmarks/random_llama.py FOLDER [--hidden 2048] [--wide 8192] [--blocks 16] [--heads 32]

For time and memory, which do not depend on the values of the weights.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

WORDS = 400  # distinct words of the made-up text


def build(folder: Path, hidden: int, wide: int, blocks: int, heads: int, vocabulary: int = 32000) -> None:
    """A complete folder in bfloat16; `folder` must not exist."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
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
            "model.embed_tokens.weight": matrix(vocabulary, hidden),
            "lm_head.weight": matrix(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        },
    )
    for index in range(blocks):
        path = f"model.layers.{index}"
        norms = {
            f"{path}.{n}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        attention = {f"{path}.self_attn.{n}_proj.weight": matrix(hidden, hidden) for n in "qkvo"}
        mlp = {f"{path}.mlp.{n}_proj.weight": matrix(wide, hidden) for n in ("gate", "up")}
        down = {f"{path}.mlp.down_proj.weight": matrix(hidden, wide)}
        write(f"model-{index:05d}.safetensors", norms | attention | mlp | down)
        print(f"\rbuilding block {index + 1} of {blocks}", end="", file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    known = {f"w{i}": i for i in range(WORDS)} | {"<unk>": WORDS}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def write_text(file: Path, words: int) -> None:
    """So many random words that the tokenizer knows."""
    chance = torch.randint(WORDS, (words,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text(" ".join(f"w{i}" for i in chance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, usual in (("hidden", 2048), ("wide", 8192), ("blocks", 16), ("heads", 32), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    build(asked.folder, asked.hidden, asked.wide, asked.blocks, asked.heads, asked.vocabulary)
    write_text(asked.folder / "text.txt", 6000)


if __name__ == "__main__":
    main()
