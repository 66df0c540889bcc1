"""Models whose parameters differ in shape from their configuration, and folders of them."""

from pathlib import Path
from typing import Any

import torch
from families import MOE, build
from folders import prune, write
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.formats import FORMATS, store
from budwood.models.blocks import find_blocks
from budwood.models.experts import ExpertLinears, unfuse, unfuse_module
from budwood.models.linears import read

KEPT = 40  # neurons


def narrow(linear: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keeps these outputs and inputs of a linear."""
    weight = read(linear).detach()  # [out, in]
    if rows is not None:
        weight = weight[rows]
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[rows])
    if columns is not None:
        weight = weight[:, columns]
    linear.weight = nn.Parameter(read(linear, weight).contiguous())
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape


def add_bias(linear: nn.Module, seed: int) -> None:
    size = read(linear).shape[0]
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    linear.bias = nn.Parameter(noise.to(linear.weight.dtype))


def remove_neurons(block: nn.Module) -> None:
    """Llama: 24 of 64 neurons removed."""
    kept = torch.arange(64)[-KEPT:]
    narrow(block.mlp.gate_proj, rows=kept)
    narrow(block.mlp.up_proj, rows=kept)
    narrow(block.mlp.down_proj, columns=kept)


def narrow_expert(experts: ExpertLinears, number: int) -> None:
    """8 neurons of one gated expert removed; the gate is the first half of the rows."""
    first, down = experts.gate_up[number], experts.down[number]
    width = read(down).shape[1]
    kept = torch.arange(width - 8)
    narrow(first, rows=torch.cat([kept, kept + width]))
    narrow(down, columns=kept)


def change(name: str, model: PreTrainedModel, neurons: bool = True) -> list[str]:
    """Changes shapes of block 1, whose experts are plain linears, in place; returns the names of the linears to pack.

    Except in gpt2, one of these and one other linear get a bias that the configuration does not give.
    """
    path, blocks = find_blocks(model)
    block = blocks[1]
    with torch.no_grad():
        if name == "gpt2":
            kept = torch.arange(128)[-KEPT:]
            narrow(block.mlp.c_fc, rows=kept)
            narrow(block.mlp.c_proj, columns=kept)
            block.ln_2.weight.mul_(1.5)
            return [f"{path}.1.mlp.c_fc", f"{path}.0.attn.c_attn"]
        block.input_layernorm.weight.mul_(1.5)
        add_bias(block.self_attn.o_proj, 1)
        add_bias(block.self_attn.q_proj, 2)
        packed = [f"{path}.1.self_attn.q_proj", f"{path}.2.self_attn.k_proj"]
        if not neurons:
            return packed
        if hasattr(block.mlp, "experts"):
            narrow_expert(block.mlp.experts, 3)
            return [*packed, f"{path}.1.mlp.experts.down.3"]
        remove_neurons(block)
        add_bias(block.mlp.down_proj, 3)
        return [*packed, f"{path}.1.mlp.down_proj"]


def pack(model: PreTrainedModel, linears: list[str], format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Prunes these linears in place; the tensors of the file and the entries of the configuration."""
    tensors, entries = model.state_dict(), {}
    for name in linears:
        module = model.get_submodule(name)
        pruned = prune(read(module).detach(), recovered=0.0).contiguous()  # [out, in]
        chosen, parts = store(pruned, format)
        with torch.no_grad():
            module.weight.copy_(read(module, FORMATS[chosen].unpack(parts, tuple(pruned.shape))))
        entries[name] = {"format": chosen, "shape": list(pruned.shape)}
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors, entries


def shapes_of(name: str, model: PreTrainedModel) -> dict[str, list[int]]:
    """What the configuration does not give, full name -> shape."""
    described = build(name)
    known = described.state_dict()
    unfuse(described)
    known |= described.state_dict()
    return {
        full: list(tensor.shape)
        for full, tensor in model.state_dict().items()
        if full not in known or known[full].shape != tensor.shape
    }


def write_reshaped(
    folder: Path,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    format: str | None = "two_four",
    neurons: bool = True,
) -> tuple[Path, PreTrainedModel]:
    """A folder, and the same model in memory.

    format: of the packed linears; None packs nothing. neurons: whether some are removed, else only biases are added.
    """
    model = build(name, dtype=dtype)
    if neurons and name in MOE:  # the other blocks keep their experts fused, as in the folder
        path = f"{find_blocks(model)[0]}.1.mlp.experts"
        model.set_submodule(path, unfuse_module(model.get_submodule(path)))
    linears = change(name, model, neurons)
    tensors, entries = pack(model, linears, format) if format else (model.state_dict(), {})
    tied = set(model.all_tied_weights_keys)
    tensors = {full: tensor for full, tensor in tensors.items() if full not in tied}
    return write(folder, model, tensors, entries, shapes=shapes_of(name, model)), model
