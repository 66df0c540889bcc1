"""Writes small packed folders, as a finished run does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import build, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.checkpoints.checksums import INDEX_NAME, index_of, sha256
from budwood.formats import FORMATS, store
from budwood.models.experts import unfuse


def prune(weight: Tensor, recovered: float = 0.03) -> Tensor:
    """2:4 by magnitude, and a share of the others recovered: [out, in] -> [out, in]."""
    groups = weight.float().abs().reshape(weight.shape[0], -1, 4)
    keep = groups.argsort(dim=-1).argsort(dim=-1) >= 2
    keep |= torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)) < recovered
    return weight.masked_fill(~keep.view(weight.shape), 0)  # a product would leave -0.0, which is stored


def in_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linears of the blocks by name, without routers and the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }


def pack_model(
    model: PreTrainedModel, format: str = "auto", recovered: float = 0.03
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Prune the linears in place and pack them: tensors of the file, entries of the configuration."""
    entries, tensors = {}, {}
    with torch.no_grad():
        for name, module in in_blocks(model).items():
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # [out, in]
            pruned = prune(weight, recovered).contiguous()
            chosen, parts = store(pruned, format)
            weight.copy_(FORMATS[chosen].unpack(parts, tuple(pruned.shape)))
            entries[name] = {"format": chosen, "shape": list(pruned.shape)}
            tensors |= {f"{name}.{suffix}": part.clone() for suffix, part in parts.items()}
    tied = set(model.all_tied_weights_keys)
    packed = {f"{name}.weight" for name in entries}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in tied | packed}
    return rest | tensors, entries


def write(
    folder: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    entries: dict[str, Any],
    shards: int = 2,
    shapes: dict[str, list[int]] | None = None,
) -> Path:
    """A finished folder of `shards` files; `shapes` of the parameters that the model's configuration does not give."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map, digests = sorted(tensors), {}, {}
    for number in range(shards):
        file = folder / f"sparse-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
        digests[file.name] = sha256(file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX_NAME).write_text(json.dumps(index_of(weight_map, size, digests)))
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "budwood",
            "format_version": 1,
            "recipe": 'magnitude("2:4")',
            "linears": entries,
            **({"shapes": shapes} if shapes else {}),
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_packed(
    folder: Path, name: str = "llama", format: str = "auto", recovered: float = 0.03, shards: int = 2
) -> tuple[Path, PreTrainedModel]:
    """A packed folder of a family, experts one by one, and the same pruned model in memory, bfloat16."""
    model = build(name, dtype=torch.bfloat16)
    unfuse(model)
    return write(folder, model, *pack_model(model, format, recovered), shards), model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of the quantization config of a written folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change a tensor of a written folder, or drop it (None), with a digest that fits."""
    index = json.loads((folder / INDEX_NAME).read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
    else:
        tensors[name] = changed
    save_file(tensors, file, {"format": "pt"})
    index["metadata"]["sha256"][file.name] = sha256(file)
    (folder / INDEX_NAME).write_text(json.dumps(index))
