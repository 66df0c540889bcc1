"""What is fuzzed: each target gives one mutated input to the functions that read it, and checks what they accept.

A target returns whether the input was accepted, and raises `BudwoodError` where it was refused. `Unsound`: accepted,
but not what it says. Any other exception is a crash: a user would see the name of a Python class.
"""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz_compare import COMPARE_TARGETS
from fuzz_folders import FOLDER_TARGETS, Unsound, placed
from fuzz_mutate import bytes_mutated, json_bytes, shard_mutated, text_mutated
from fuzz_packed import packed_tensors
from fuzz_seeds import EXPRESSIONS, SPEED, Seeds

from budwood.checkpoints.gguf import open_gguf, own_dtype
from budwood.checkpoints.reader import Shards
from budwood.cli.bench import parse_rows
from budwood.conversion import convert
from budwood.data.hub import HubRows
from budwood.data.mix import mix_of
from budwood.data.sources import read
from budwood.data.texts import Texts
from budwood.data.windows import calibration_windows
from budwood.humanize import parse_bytes
from budwood.methods import parse_method
from budwood.reports.card import render_card, with_speed
from budwood.reports.markdown import render_report
from budwood.reports.record import add_speed, read_report
from budwood.runs.recipe import FILE, Recipe, read_recipe, recipe_options
from budwood.training.move import parse_move

Run = Callable[[Random, Seeds, Path], object]


@dataclass(frozen=True)
class Target:
    """share: of the inputs, relative; small where one takes long."""

    name: str
    share: int
    run: Run


def shard(chance: Random, seeds: Seeds, folder: Path) -> None:
    """A safetensors file. Whatever is accepted the library of the format reads as the same tensors."""
    from safetensors import SafetensorError, safe_open

    origin = sorted(seeds.packed("two_four_compact").glob("*.safetensors"))[1]
    file = folder / "a.safetensors"
    file.write_bytes(shard_mutated(chance, origin.read_bytes()))
    shards = Shards([file])
    tensors = {name: shards.read(name) for name in shards.names()}
    try:
        with safe_open(file, "pt") as other:
            for name in tensors.keys() | set(other.keys()):
                same = tensors[name].dtype == other.get_tensor(name).dtype and bits(tensors[name]) == bits(
                    other.get_tensor(name)
                )
                if not same:
                    raise Unsound(f"{name} is read with other values than by safetensors")
    except (SafetensorError, KeyError) as error:
        raise Unsound(f"safetensors refuses it: {error}") from error


def bits(tensor: Any) -> tuple[tuple[int, ...], bytes]:
    import torch

    return tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def recipe(chance: Random, seeds: Seeds, folder: Path) -> None:
    file = folder / FILE
    content = seeds.json(seeds.packed("two_four") / FILE)
    content["data"] = {
        "data": "a.txt",
        "num_samples": 4,
        "seq_length": 24,
        "sampling": "random",
        "seed": 0,
        "bos": "auto",
    }
    file.write_bytes(json_bytes(chance, content))
    found = read_recipe(file)
    assert found is not None
    if found.difference(Recipe.from_json(json.loads(json.dumps(found.to_json())), file)) is not None:
        raise Unsound("written and read again it is another run")
    assert isinstance(found.id, str)
    recipe_options(file)


def report(chance: Random, seeds: Seeds, folder: Path) -> None:
    """What `bench` and the documents do with the report of a folder."""
    content = seeds.json(seeds.packed("two_four") / "report.json")
    content["training"] = [
        {"trained": 5, "trained_share": 0.5, "held_out": [[0, 1.5]], "best_step": 1, "loss": [2.0, 1.0]}
    ]
    content["training"][0] |= {"seconds": 1.0, "state_bytes": 10}
    (folder / "report.json").write_bytes(json_bytes(chance, content))
    (folder / "README.md").write_bytes(bytes_mutated(chance, b"# A\n\n## Speed\n\nold\n\n## License\n"))
    found = read_report(folder)
    assert found is not None
    render_report(found)
    render_card(found, None, "mit", "LlamaForCausalLM")
    add_speed(folder, SPEED)
    with_speed("# A\n", SPEED)


def gguf_bytes(chance: Random, data: bytes) -> bytes:
    """Counts, types and values behind the keys of the header."""
    changed = bytearray(data)
    keys = [found.end() for found in re.finditer(rb"[a-z]+(?:\.[a-z0-9_]+)+", data[: 1 << 14])]
    for _ in range(chance.randint(1, 3)):
        at = chance.choice((8, 16, chance.choice(keys), chance.choice(keys) + 4, chance.choice(keys) + 8))
        if chance.random() < 0.3:
            name = chance.choice(keys)
            changed[name - 1] = chance.choice(b"xyz_")
        form = chance.choice("IQf")
        number = chance.choice((0, 1, 2, 3, 7, 8, 9, 12, 13, 255, 2**16, 2**24, 2**31, 2**32 - 1))
        struct.pack_into(f"<{form}", changed, at, float(number) if form == "f" else number)
    return bytes(changed) if chance.random() < 0.8 else bytes_mutated(chance, data)


def gguf_header(chance: Random, seeds: Seeds, folder: Path) -> None:
    file = folder / "m.gguf"
    file.write_bytes(gguf_bytes(chance, seeds.gguf))
    own_dtype(open_gguf(file))


def gguf_model(chance: Random, seeds: Seeds, folder: Path) -> None:
    """Whatever is converted loads."""
    from budwood.checkpoints.loading import load

    file = folder / "m.gguf"
    file.write_bytes(gguf_bytes(chance, seeds.gguf))
    convert(file, folder / "out")
    load(folder / "out")


def data(chance: Random, seeds: Seeds, folder: Path) -> None:
    """Texts and token ids. What is accepted is cut into windows."""
    from families import tokenizer

    name = chance.choice(sorted(seeds.data))
    origin = seeds.data[name]
    file = folder / name
    file.write_bytes(shard_mutated(chance, origin) if name.endswith(".safetensors") else bytes_mutated(chance, origin))
    if name == "d.jsonl":
        lines = origin.split(b"\n")
        lines[chance.randrange(len(lines))] = json_bytes(chance, json.loads(lines[0]))
        file.write_bytes(b"\n".join(lines))
    found = read(str(file), "calibration")
    if isinstance(found, Texts) and not any(document.strip() for document in found.documents):
        raise Unsound("it holds no text")
    windows = calibration_windows(str(file), tokenizer(), num_samples=2, seq_length=16)
    if int(windows.ids.min()) < 0 or int(windows.ids.max()) >= len(tokenizer()):
        raise Unsound("a token id outside the vocabulary")


def expression(chance: Random, seeds: Seeds, folder: Path) -> None:
    """A method. What is accepted is written as it is read."""
    text = chance.choice(EXPRESSIONS)
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.3:
            start, inner = re.sub(r"\(.*", "", text), chance.choice(EXPRESSIONS)
            text = f"{start}({inner})"
        text = text_mutated(chance, text)
    method = parse_method(text)
    if parse_method(str(method)) != method:
        raise Unsound(f"{text!r} becomes {str(method)!r}, which is another method")


def option(chance: Random, seeds: Seeds, folder: Path) -> None:
    """The small texts of the command line."""
    forms: list[tuple[Callable[[str], object], str]] = [
        (mix_of, "wikitext2:3,[sotu:1950-]:1.5"),
        (parse_bytes, "4.5GB"),
        (HubRows.parse, "hf:a/b:c:train:text"),
        (parse_move, "biases+norms+masklora"),
        (parse_rows, "1,8,64"),
    ]
    parse, text = chance.choice(forms)
    for _ in range(chance.randint(1, 4)):
        text = text_mutated(chance, text)
    parse(text)


def tokenizer_file(chance: Random, seeds: Seeds, folder: Path) -> None:
    from budwood.checkpoints.tokenizer import load_tokenizer
    from budwood.data.tokens import tokenise

    name = chance.choice(("tokenizer.json", "tokenizer_config.json"))
    inner = placed(seeds.family("llama"), folder / "model", name, chance)
    found = load_tokenizer(inner)
    tokenise("some text", found, "auto")


TARGETS = (
    Target("shard", 200, shard),
    Target("packed tensors", 300, packed_tensors),
    Target("recipe", 120, recipe),
    Target("report", 80, report),
    Target("expression", 200, expression),
    Target("option", 60, option),
    Target("data", 100, data),
    Target("gguf header", 20, gguf_header),
    Target("gguf model", 2, gguf_model),
    Target("tokenizer", 10, tokenizer_file),
    *(Target(name, share, run) for name, share, run in (*FOLDER_TARGETS, *COMPARE_TARGETS)),
)
