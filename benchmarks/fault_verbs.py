"""What `faults.py` runs: tiny random models, and a table of the verbs that write. A verb is one line of `VERBS`.

Every verb runs through the command line, as a user gives it, on the same two paths, since recipes hold them: `source`,
a fresh copy of a prepared model, and `target`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import TEMPORARY

BLOCKS, HIDDEN, VOCABULARY, TOKENS = 3, 32, 128, 192
CHANGED = ".changed"  # ends the name of a prepared source that differs in one value, far behind the start of a tensor
TIMED = ("report.json", "report.md", "README.md", "report.html")  # hold times, so that they are never the same twice
FORMER = 'magnitude("4:8")'  # the method of the folder that is overwritten
EXACT = ("--compute-dtype", "float32", "--sparse-products", "off", "--attention", "fused")
TEXT = ("--data", "{world}/text.txt", "--num-samples", "4", "--seq-length", "24")
SCRATCH = ("--activation-memory", "1KB")  # hidden states are kept in a file
COMPARED = """\
title: Faults
sources: {tiny: "${here}/source"}
calibration: {data: "${here}/text.txt", num_samples: 4, seq_length: 24}
prune: {compute_dtype: float32, sparse_products: "off", attention: fused}
methods: [dense, 'wanda("2:4")']
evaluate:
  texts:
    words: {data: "${here}/text.txt", seq_length: 24, limit: 2}
keep_models: false
"""
STEPS = ("--steps", "4", "--batch", "2", "--rank", "2", "--save-every", "2")
TRAINING = "rank=2, steps=4, batch=2"


@dataclass(frozen=True)
class Verb:
    """One command. source: which prepared model it reads, None where it works on the target.

    arguments: with {source}, {target} and {world}. former: which prepared folder the target holds before; it then
    also holds a file of the user. prints: its result is what it prints, and it has no target.
    """

    name: str
    source: str | None
    arguments: tuple[str, ...]
    former: str | None = None
    prints: bool = False

    def command(self, world: Path) -> list[str]:
        paths = {"world": world, "source": world / "source", "target": world / "target"}
        return [argument.format(**paths) if argument.startswith("{") else argument for argument in self.arguments]


VERBS: tuple[Verb, ...] = (
    Verb("prune", "dense", ("prune", "{source}", "{target}", "--method", 'magnitude("2:4")', "--quiet")),
    Verb(
        "prune, calibrated",
        "dense",
        ("prune", "{source}", "{target}", "--method", "wrp(alpha=0.25)", *TEXT, *EXACT, *SCRATCH, "--quiet"),
    ),
    Verb(
        "prune, rewritten",
        "dense",
        ("prune", "{source}", "{target}", "--method", f'perp(wanda("2:4"), {TRAINING})', *TEXT, *EXACT, "--quiet"),
    ),
    Verb(
        "prune, fewer units",
        "dense",
        ("prune", "{source}", "{target}", "--method", "flap(drop=0.25)", *TEXT, *EXACT, "--quiet"),
    ),
    Verb(
        "prune --overwrite",
        "dense",
        ("prune", "{source}", "{target}", "--method", 'magnitude("2:4")', "--overwrite", "--quiet"),
        former="former",
    ),
    Verb("export", "pruned", ("export", "{source}", "{target}", "--quiet")),
    Verb(
        "export --overwrite",
        "pruned",
        ("export", "{source}", "{target}", "--values", "int8", "--overwrite", "--quiet"),
        former="former",
    ),
    Verb(
        "retrain",
        "pruned",
        ("retrain", "{source}", "{target}", *TEXT, *STEPS, "--compute-dtype", "float32", "--quiet"),
    ),
    Verb("convert", "gguf", ("convert", "{source}/model.gguf", "{target}")),
    Verb("convert --overwrite", "gguf", ("convert", "{source}/model.gguf", "{target}", "--overwrite"), "converted"),
    Verb("bench", None, ("bench", "{target}", "--rows", "1", "--quiet"), former="pruned"),
    Verb("compare", "dense", ("compare", "{world}/recipe.yaml", "{target}", "--jobs", "0", "--quiet")),
    Verb("report", None, ("report", "{target}"), former="pruned"),
    Verb(
        "evaluate",
        "pruned",
        ("evaluate", "{source}", *TEXT[:2], "--seq-length", "24", "--limit", "2", "--stream", "--quiet", "--json"),
        prints=True,
    ),
)


def put(world: Path, prepared: str, place: str) -> Path:
    """A fresh copy of a prepared folder at a place of the world."""
    copy = world / place
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world / "prepared" / prepared, copy)
    return copy


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def left_alone(verb: Verb, folder: Path) -> dict[str, bytes]:
    """The files of a source that the verb must not change: `evaluate` adds its figures to the report and the card.

    What an interrupted write left is no file of the source; the next write replaces it.
    """
    figures = (*TIMED, "budwood.yaml") if verb.prints else ()
    files = {name: data for name, data in content(folder).items() if Path(name).name not in figures}
    return {name: data for name, data in files.items() if not (verb.prints and name.endswith(TEMPORARY))}


def result(verb: Verb, world: Path, printed: str) -> Any:
    """What a finished command must leave again in the same bytes; of files that hold times, what must be in them."""
    if verb.prints:
        return json.loads(printed)["results"][0]["losses"] if printed.strip() else None
    if (world / "target" / "results.json").is_file():
        return figures(json.loads((world / "target" / "results.json").read_bytes()))
    found: dict[str, Any] = dict(content(world / "target"))
    for name in TIMED:
        if name in found:
            found[name] = shape_of(json.loads(found[name])) if name.endswith(".json") else len(found[name]) > 0
    return found


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """What a comparison measured, by run, without times and memory."""
    timed = ("seconds", "peak memory")
    return {
        row["name"]: {name: value for name, value in row["figures"].items() if name not in timed}
        for row in results["rows"]
    }


def shape_of(report: dict[str, Any]) -> list[str]:
    """The sections of a report, its matrices and its blocks, without figures."""
    return sorted(report) + sorted(report["linears"]) + [block["name"] for block in report["blocks"]]


def prepare(world: Path) -> None:
    """Makes the sources and former folders in `world`/prepared. For a process of its own."""
    from budwood.cli import app

    folder = world / "prepared"
    folder.mkdir(parents=True)
    (world / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away. " * 12)
    (world / "recipe.yaml").write_text(COMPARED)
    for ending in ("", CHANGED):
        save_dense(folder / f"dense{ending}", changed=bool(ending))
        save_gguf(folder / f"gguf{ending}", changed=bool(ending))
        put(world, f"dense{ending}", "source")
        prune = ["prune", str(world / "source"), str(world / "target"), "--quiet", "--method"]
        for name, method in (("pruned", "wrp(alpha=0.25)"), ("former", FORMER)):
            calibration = [*TEXT, *EXACT] if name == "pruned" else []
            given = [argument.format(world=world) for argument in calibration]
            app([*prune, method, *given], standalone_mode=False)
            shutil.move(world / "target", folder / f"{name}{ending}")
    app(["convert", str(folder / "gguf" / "model.gguf"), str(folder / "converted")], standalone_mode=False)


def random_llama(changed: bool, **sizes: Any) -> Any:
    """A model with random weights; `changed`: the last value of one matrix in the last block is another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
        if changed:
            for layer in model.model.layers[1:]:
                layer.mlp.up_proj.weight[-1] += 1.5
    return model


def save_dense(folder: Path, changed: bool) -> None:
    """A folder of several shards with a tokenizer of one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    random_llama(changed, vocab_size=VOCABULARY).save_pretrained(folder, max_shard_size="40KB")
    letters = {chr(letter): letter for letter in range(32, 127)} | {"<s>": 1, "</s>": 2, "<unk>": 0}
    fast = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=TOKENS, **special).save_pretrained(folder)


def save_gguf(folder: Path, changed: bool) -> None:
    """The same kind of model as a GGUF file, with a byte-level vocabulary."""
    import gguf
    from tokenizers import pre_tokenizers

    letters = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "19"]
    model = random_llama(changed, vocab_size=len(letters), tie_word_embeddings=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(TOKENS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([3, 3] + [1] * (len(letters) - 2))
    writer.add_token_merges(["1 9"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
