"""Opens a finished folder, packed or dense, as an ordinary transformers model."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from budwood.checkpoints import quantizer
from budwood.checkpoints.checksums import INDEX_NAME, verify
from budwood.checkpoints.locate import refuse_adapter
from budwood.checkpoints.meta_model import IMPLEMENTATIONS, needs_code, read_config, reason_of, refused_code
from budwood.checkpoints.model_files import model_files
from budwood.checkpoints.reader import Shards
from budwood.checkpoints.sidecars import check_blocks, read_config_json
from budwood.errors import BudwoodError, RunError, UsageError


def load(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of a folder, or of a hub name, ready for inference; `kwargs` go to `from_pretrained`.

    Stricter than `from_pretrained`: UsageError when there is no model, RunError when a file is damaged or a
    weight is missing (transformers would initialise it at random). Code of the folder is run with
    `trust_remote_code=True` only.
    """
    quantizer.register()
    path = Path(folder).expanduser()
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None would ask on standard input
    kwargs = {**dict.fromkeys(IMPLEMENTATIONS), **kwargs}  # in place of those that the configuration names
    content: dict[str, Any] = {"auto_map": True}  # of a repository of the hub
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} holds no config.json; give the folder of a model or a hub name")
        content = read_config_json(path / "config.json")
        if any(content.get(f"_{name}") for name in IMPLEMENTATIONS):  # which the options do not replace
            kwargs.setdefault("config", read_config(path, kwargs["trust_remote_code"]))
        refuse_adapter(path)
        files = model_files(path)
        check_blocks(content, len(Shards(files.shards).locations), path / "config.json")
        if files.index is not None and files.index.name != INDEX_NAME:  # the plug-in compares those of packed folders
            verify(files.index)
    elif path.exists() or path.is_absolute() or str(folder).startswith((".", "~")) or len(path.parts) > 2:
        raise UsageError(f"there is no folder {path}; give the folder of a model or a hub name")
    if device is not None:
        if "device_map" in kwargs:
            raise UsageError("give either device or device_map, not both")
        kwargs["device_map"] = {"": torch.device(device)}
    source = str(path) if path.is_dir() else str(folder)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
    except BudwoodError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a dozen kinds, for every file of the folder
        if not kwargs["trust_remote_code"] and needs_code(content, error):
            raise refused_code(folder) from error
        raise UsageError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    model, report = opened
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(f"{folder} holds an adapter beside its model; merge it (peft: merge_and_unload) and give that")
    missing = sorted(report["missing_keys"])
    if missing:
        raise RunError(f"{folder} lacks {len(missing)} weights of its model, {missing[0]} among them; fetch it again")
    return cast(PreTrainedModel, model)
