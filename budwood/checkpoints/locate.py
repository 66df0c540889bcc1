"""The local folder of a model by its name. Imports neither torch nor transformers: the command line checks early."""

import difflib
import re
from pathlib import Path

from budwood.errors import UsageError


def local_folder(name: str | Path) -> Path | None:
    """The local folder of the model `name`; None where `name` is a repository of the hub, OWNER/NAME.

    Raises UsageError when it is neither, with the nearest local name.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        raise UsageError(f"{name} is a GGUF file; convert it first: budwood convert {name} FOLDER")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} has no config.json, so it is no (finished) model folder; {_nearest(path)}")
        refuse_adapter(path)
        return path
    if path.exists():
        raise UsageError(f"{name} is a file; give the folder that holds config.json and the safetensors shards")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.is_dir():
        return None
    raise UsageError(f"there is no model {name}: no such folder, and it is no hub name (OWNER/NAME); {_nearest(path)}")


def refuse_adapter(folder: Path) -> None:
    """Raises UsageError where a folder holds an adapter of peft: it can mean the model with the adapter, or without.

    transformers applies it where peft is installed, and may load the base model that it names instead of the folder.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder} holds an adapter (adapter_config.json), so it can mean the model with it or without it; "
            "merge it (peft: merge_and_unload, then save_pretrained to another folder), or move its files away"
        )


def _nearest(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    folders = [entry.name for entry in parent.iterdir() if (entry / "config.json").is_file()]
    close = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.5)
    return f"did you mean {parent / close[0]}?" if close else "check the spelling"
