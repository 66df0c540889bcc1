"""The linear layer whose weight stays packed: one class for all formats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from budwood.formats import FORMATS, LOSSLESS, choose, named, pack_as
from budwood.formats.bits import stored

_SPARSE = {name: format for name, format in LOSSLESS.items() if name != "dense"}


class SparseLinear(nn.Linear):
    """`x [..., in] -> [..., out]`; the weight is unpacked for the product and forgotten again.

    It is an `nn.Linear` for everyone who asks, but owns no dense weight: its parameters are the tensors of
    the format, under the suffixes of the format, and perhaps `bias`. Parameters and not buffers, because only
    those are offloaded to disk. Gradients flow to the input and the bias.
    """

    format: str
    shape: tuple[int, int]

    def __init__(
        self,
        format: str,
        shape: Sequence[int],
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer for tensors of these shapes and dtypes, as the header of a file names them."""
        nn.Module.__init__(self)
        if set(tensors) != set(_suffixes(format)):
            raise ValueError(f"{format} has the tensors {', '.join(_suffixes(format))}; got {', '.join(tensors)}")
        self.format = format
        self.shape = (shape[0], shape[1])
        self.out_features, self.in_features = self.shape
        for suffix, (size, dtype) in tensors.items():
            empty = torch.empty(tuple(size), dtype=dtype, device=device)
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        empty_bias = torch.empty(self.out_features, dtype=self._values().dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty_bias) if bias else None)

    @classmethod
    def from_packed(
        cls, format: str, shape: Sequence[int], tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> "SparseLinear":
        """The layer that holds these very tensors."""
        headers = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in tensors.items()}
        linear = cls(format, shape, headers, bias is not None, device="meta")
        for suffix, tensor in tensors.items():
            linear.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        return linear

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, format: str = "auto") -> "SparseLinear":
        """The layer of a pruned weight `[out, in]`, in the smallest sparse format or the one named.

        Raises `UsageError` where the format cannot hold the weight.
        """
        weight = weight.detach()
        name, tensors = choose(weight, _SPARSE) if format == "auto" else (format, pack_as(format, weight))
        return cls.from_packed(name, weight.shape, tensors, bias)

    def packed(self) -> dict[str, Tensor]:
        """The tensors of the format, by suffix."""
        return {suffix: getattr(self, suffix).detach() for suffix in FORMATS[self.format].suffixes}

    def unpack(self) -> Tensor:
        """The dense weight `[out, in]`, made anew at every call."""
        return FORMATS[self.format].unpack(self.packed(), self.shape)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight to look at; writing to it is an error, since it would be forgotten."""
        values = self._values()
        if values.is_meta:
            return torch.empty(self.shape, dtype=values.dtype, device="meta")
        return self.unpack().as_subclass(UnpackedWeight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(_READ_ONLY)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.bias, self.format, self.shape, *self.packed().values())

    def dequantize(self) -> nn.Linear:
        """The same layer with its weight dense again, free to be changed."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.unpack())
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, format={self.format}"
        if self._values().is_meta:
            return text
        kept = sum(int(stored(part).sum()) for suffix, part in self.packed().items() if suffix.endswith("values"))
        return f"{text}, density={kept / (self.in_features * self.out_features):.4f}"

    def _values(self) -> Tensor:
        return self.get_parameter(FORMATS[self.format].typed)


class _Product(torch.autograd.Function):
    """The product with an unpacked weight, which remembers the packed one for the way back."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, format: str, shape: tuple[int, int], *packed: Tensor
    ) -> Tensor:
        ctx.format, ctx.shape = format, shape
        ctx.save_for_backward(*packed)
        return F.linear(input, _unpack(format, shape, packed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors  # read once: under gradient checkpointing a second time is an error
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            # Under autocast the product ran in a lower precision than the weight is kept in.
            weight = _unpack(ctx.format, ctx.shape, packed).to(gradient.dtype)
            to_input = gradient @ weight  # [..., out] @ [out, in]
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return to_input, to_bias, None, None, *(None for _ in packed)


def _unpack(format: str, shape: tuple[int, int], packed: Sequence[Tensor]) -> Tensor:
    """The dense weight `[out, in]` of a format's tensors, which come in the order of its suffixes."""
    return FORMATS[format].unpack(dict(zip(FORMATS[format].suffixes, packed, strict=True)), shape)


class UnpackedWeight(Tensor):
    """The weight of a `SparseLinear`, unpacked: an ordinary tensor to read, that refuses to be written to.

    A change would only reach this copy: merging an adapter by `linear.weight.data += delta` would do nothing,
    and say nothing.
    """

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError(_READ_ONLY)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _WRITING or (name.endswith("_") and not name.startswith("__"))
        target = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init passes it by name
        if writes and isinstance(target, cls):
            raise RuntimeError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__"}
_READ_ONLY = (
    "the weight of a SparseLinear is unpacked when asked for and a change to it would be lost; "
    "call dequantize() on the layer first and change the weight of the nn.Linear it returns"
)


def _suffixes(format: str) -> tuple[str, ...]:
    """The tensors of a sparse format. Raises `UsageError` if there is no such format."""
    if named(format).name == "dense":
        raise ValueError("a dense matrix needs no SparseLinear; use nn.Linear")
    return named(format).suffixes
