"""The output head, which is not pruned: a dense bfloat16 matrix that torch reads slower than memory allows."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.kernels import native
from budwood.kernels.native import MAX_FEW_ROWS, TYPES, pack_output
from budwood.kernels.native_matrix import check_input, rounded_bias


class DenseLinear(nn.Linear):
    """An `nn.Linear` that multiplies few rows of bfloat16 with the native kernel, and everything else with torch.

    A layer is converted by setting its class, so that its weight may stay tied to the embeddings.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, rows = self.weight, input.numel() // max(self.in_features, 1)
        supported = (
            input.shape[-1:] == weight.shape[1:]
            and weight.dtype == input.dtype == torch.bfloat16
            and weight.device.type == input.device.type == "cpu"
            and 0 < rows <= MAX_FEW_ROWS
            and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
            and weight.is_contiguous()
        )
        if not supported:
            return F.linear(input, weight, self.bias)
        if torch.compiler.is_compiling():
            return dense(input, weight, self.bias)
        result = multiply(weight, input, self.bias) if type(weight.data) is Tensor else None
        return F.linear(input, weight, self.bias) if result is None else result


def multiply(weight: Tensor, input: Tensor, bias: Tensor | None) -> Tensor | None:
    """`input [..., in] -> [..., out]` for bfloat16 `weight [out, in]` and few rows; None where there is no kernel.

    Raises RuntimeError, as torch does, where their widths differ.
    """
    check_input(input, weight.shape[1])
    library = native.library()
    in_memory = (
        all(tensor is None or tensor.is_cpu for tensor in (weight, input, bias))
        and weight.is_contiguous()
        and weight.numel() > 0
    )
    if library is None or not in_memory or not weight.dtype == input.dtype == torch.bfloat16:
        return None
    x = input.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    bias = None if bias is None else rounded_bias(bias, weight.shape[0], x.dtype)
    output = pack_output(y.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.shape[0], TYPES[y.dtype])
    rows, threads = x.numel() // weight.shape[1], torch.get_num_threads()
    done = library.budwood_dense(weight.data_ptr(), *weight.shape, x.data_ptr(), rows, output, threads)
    return y if done else None


@torch.library.custom_op("budwood::dense", mutates_args=())
def dense(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`multiply`, or torch's product where there is no kernel, as an operator: `[..., in] -> [..., out]`."""
    result = multiply(weight, input, bias)
    return F.linear(input, weight, bias) if result is None else result


@dense.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_input(input, weight.shape[1])
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def accelerate_head(model: nn.Module) -> None:
    """Let the output head of a model multiply with the native kernel, if it is a plain `nn.Linear`."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if native.has_dense() and type(head) is nn.Linear:
        cast(nn.Module, head).__class__ = DenseLinear
