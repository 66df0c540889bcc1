"""The linear layer whose weight stays packed: one class for all formats."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from budwood.formats import FORMATS, LOSSLESS, choose, named, pack_as
from budwood.formats.bits import stored
from budwood.formats.checks import check_layout, check_positions
from budwood.formats.two_four import covered
from budwood.kernels import dispatch, gpu, ops, tiles
from budwood.kernels.arena import Arena
from budwood.kernels.file_parameters import FileParameters, held_elsewhere
from budwood.kernels.native_matrix import CODINGS, REMEDY, NativeMatrix, native_matrix, refuse_unsound
from budwood.kernels.shared_input import InputObserver, SharedInput
from budwood.kernels.snapshot import Snapshot, key_of
from budwood.kernels.tiles import Tiles
from budwood.kernels.unpacked_weight import READ_ONLY, UnpackedWeight

_restoring = threading.RLock()  # of any layer: seldom, and short
_SPARSE = {name: format for name, format in LOSSLESS.items() if name != "dense"}


class SparseLinear(nn.Linear):
    """`x [..., in] -> [..., out]`, by a native kernel from the packed weight where there is one, else by unpacking it.

    It is an `nn.Linear` by type, but has no dense weight: its parameters are the tensors of the format, under the
    suffixes of the format, and perhaps `bias`. They are parameters and not buffers, because only parameters are
    offloaded to disk. Gradients flow to the input and the bias.

    On AVX2 a loaded layer holds its weight in tiles instead, from which the parameters are restored when they are
    read. The next product packs them again, unless someone else holds them.
    """

    format: str
    shape: tuple[int, int]
    shared_input: InputObserver | SharedInput | None = None  # layers that get the same input, multiplied in one call
    _native: NativeMatrix | None = None
    _native_for: list[int] | None = None  # the `key_of` the tensors it was made for, which it keeps alive
    _dtype: torch.dtype | None = None
    _gpu: gpu.GpuMatrix | None = None
    _gpu_for: Snapshot | None = None
    _sound: Snapshot | None = None  # of the tensors that were checked before they were unpacked
    _tiles: Tiles | None = None
    _prefers_tiles = False  # set by `to_native_format` with an arena

    def __init__(
        self,
        format: str,
        shape: Sequence[int],
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer for tensors of these shapes and dtypes, as the header of a file gives them."""
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
        """The layer that holds these tensors, without a copy.

        Raises `RunError` where they do not describe a matrix of this shape, as tensors from a foreign file may.
        """
        found = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
        check_layout("SparseLinear", format, (shape[0], shape[1]), found, REMEDY)
        if not any(tensor.is_meta for tensor in tensors.values()):
            check_positions("SparseLinear", format, (shape[0], shape[1]), tensors, REMEDY)
        return cls._of(format, shape, tensors, bias)

    @classmethod
    def _of(
        cls, format: str, shape: Sequence[int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> "SparseLinear":
        headers = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in tensors.items()}
        linear = cls(format, shape, headers, bias is not None, device="meta")
        for suffix, tensor in tensors.items():
            linear.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        return linear

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, format: str = "auto") -> "SparseLinear":
        """The layer of a pruned weight `[out, in]`, in the smallest sparse format or the one named.

        Raises `UsageError` where the format cannot store the weight.
        """
        weight = weight.detach()
        name, tensors = choose(weight, _SPARSE) if format == "auto" else (format, pack_as(format, weight))
        return cls._of(name, weight.shape, tensors, bias)

    def packed(self) -> dict[str, Tensor]:
        """The tensors of the format, by suffix; copies while the weight is in tiles."""
        if self._tiles is not None:
            return self._tiles.unpack()
        return {suffix: getattr(self, suffix).detach() for suffix in FORMATS[self.format].suffixes}

    def unpack(self) -> Tensor:
        """The dense weight `[out, in]`, unpacked at every call."""
        return FORMATS[self.format].unpack(self.packed(), self.shape)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight to read; writing to it is an error, since the change would be lost."""
        if self._tiles is None and self._values().is_meta:
            return torch.empty(self.shape, dtype=self._values().dtype, device="meta")
        return self.unpack().as_subclass(UnpackedWeight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(READ_ONLY)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return ops.linear(input, self.bias, list(self.packed().values()), self.format, *self.shape)
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            self._repack()
            held = [] if self._tiles is not None else list(self.packed().values())
            return _Product.apply(input, self.bias, self, self._tiles, *held)
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """The product without a gradient, by the fastest kernel on this machine."""
        if self._tiles is None and self._prefers_tiles:
            self._repack()
        matrix = self.native_matrix()
        if matrix is not None and input.dtype == self._dtype and not torch.is_autocast_enabled("cpu"):
            shared = self.shared_input
            result = None if shared is None else shared.product(self, matrix, input)
            if result is not None:
                return result
            result = dispatch.linear(matrix, input, self.bias)
            if result is not None:
                return result
        elif gpu.takes(input):
            return self._on_gpu().linear(input, self.bias)
        if matrix is None:
            self._refuse_unsound()
        return F.linear(input, self.unpack(), self.bias)

    def _on_gpu(self) -> gpu.GpuMatrix:
        """The weight in the layout of the GPU kernels, a second copy of it on the device."""
        tensors = self.packed()
        if self._gpu is None or self._gpu_for is None or not self._gpu_for.of(tensors.values()):
            self._refuse_unsound()
            base = covered(tensors["places"], self.in_features) if "places" in tensors else None
            self._gpu, self._gpu_for = gpu.gpu_matrix(self.unpack(), base), Snapshot(tensors.values())
        return self._gpu

    def _refuse_unsound(self) -> None:
        """RunError where the tensors no longer describe a matrix of this shape; looked at once after every change."""
        tensors = self.packed()
        if self._sound is None or not self._sound.of(tensors.values()):
            refuse_unsound(self.format, self.shape, tensors)
            self._sound = Snapshot(tensors.values())

    def native_matrix(self) -> NativeMatrix | None:
        """The weight for the native library, made once for as long as nobody replaces or changes the tensors.

        Raises `RunError` where they no longer describe a matrix of this shape.
        """
        if self._tiles is not None:
            return self._tiles.matrix
        parameters: dict[str, Any] = self._parameters
        key = key_of([parameters[suffix] for suffix in FORMATS[self.format].suffixes])
        if key is None or key != self._native_for:
            self._native = native_matrix(self.format, self.shape, self.packed())
            self._native_for = None if self._native is None else key
            self._dtype = self._values().dtype
        return self._native

    def to_native_format(self, arena: Arena | None = None) -> None:
        """Convert to a format that the native library reads, if it is not in one, and copy the tensors into `arena`.

        There they are in the layout that is fastest on this processor: tiles, or that of the file. No weight changes,
        and the parameters can still be saved, moved, cast and offloaded.
        """
        tensors = self.packed()
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            return
        if self.format not in CODINGS:
            tensors = FORMATS["bitmask"].pack(self.unpack())
            for suffix in FORMATS[self.format].suffixes:
                del self._parameters[suffix]
            self.format = "bitmask"
        if arena is not None and self._to_tiles(tensors, arena):
            self._prefers_tiles = True
            return
        for suffix, tensor in tensors.items():
            with torch.inference_mode(False):  # a change of an inference tensor could not be noticed
                placed = tensor if arena is None else arena.place(tensor)
            self.register_parameter(suffix, nn.Parameter(placed, requires_grad=False))

    def _to_tiles(self, tensors: Mapping[str, Tensor], arena: Arena | None = None) -> bool:
        """Hold the weight, given as the tensors of the format, in tiles; False where the file's layout is better."""
        packed = tiles.pack(self.format, self.shape, tensors, arena)
        if packed is None:
            return False
        bias = self._parameters.get("bias")
        self._tiles, self._dtype = packed, tensors[FORMATS[self.format].typed].dtype
        self._native = self._native_for = None
        self.__dict__["_parameters"] = FileParameters(FORMATS[self.format].suffixes, bias, self._to_file_layout)
        return True

    def _to_file_layout(self) -> dict[str, Any]:
        """The parameters, which are those of the file from now on."""
        with _restoring:
            packed, parameters = self._tiles, self.__dict__["_parameters"]
            if packed is not None:
                restored = {suffix: nn.Parameter(t, requires_grad=False) for suffix, t in packed.unpack().items()}
                self.__dict__["_parameters"] = parameters = {**restored, "bias": parameters["bias"]}
                self._tiles = None
            return parameters

    def _repack(self) -> None:
        """Hold the weight in tiles again after its parameters were read, if nobody else holds those."""
        if not self._prefers_tiles or self._tiles is not None:
            return
        known = self._native.held if self._native is not None else []
        suffixes = FORMATS[self.format].suffixes
        if self._values().device.type != "cpu" or held_elsewhere(self._parameters, suffixes, known):
            return
        with _restoring:
            self._prefers_tiles = self._tiles is not None or self._to_tiles(self.packed())

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses or other layers: a copy makes its own."""
        parameters = self.__dict__["_parameters"]
        if self._tiles is not None:
            restored = {suffix: nn.Parameter(t, requires_grad=False) for suffix, t in self._tiles.unpack().items()}
            parameters = {**restored, "bias": parameters["bias"]}
        return {
            **self.__dict__,
            "_parameters": parameters,
            "_tiles": None,
            "_native": None,
            "_native_for": None,
            "_gpu": None,
            "_gpu_for": None,
            "_sound": None,
            "shared_input": None,
        }

    def dequantize(self) -> nn.Linear:
        """The same layer as an `nn.Linear` with a dense weight."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.unpack())
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, format={self.format}"
        if self._tiles is None and self._values().is_meta:
            return text
        kept = sum(int(stored(part).sum()) for part in FORMATS[self.format].kept(self.packed(), self.shape))
        return f"{text}, density={kept / (self.in_features * self.out_features):.4f}"

    def _values(self) -> Tensor:
        return self.get_parameter(FORMATS[self.format].typed)


class _Product(torch.autograd.Function):
    """The product with a gradient for its input; saves the packed weight for it and not the dense one."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, linear: SparseLinear, in_tiles: Tiles | None, *packed: Tensor
    ) -> Tensor:
        ctx.format, ctx.shape, ctx.tiles = linear.format, linear.shape, in_tiles
        ctx.save_for_backward(*packed)
        return linear.product(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors  # read once: under gradient checkpointing a second read is an error
        format, shape, in_tiles = ctx.format, ctx.shape, ctx.tiles

        def weight() -> Tensor:
            if in_tiles is not None:
                return FORMATS[format].unpack(in_tiles.unpack(), shape)
            return ops.unpack(packed, format, shape)

        to_input, to_bias = ops.gradients(gradient, weight, ctx.needs_input_grad[:2])
        return to_input, to_bias, None, None, *(None for _ in packed)


def _suffixes(format: str) -> tuple[str, ...]:
    """The tensors of a sparse format. Raises `UsageError` if there is no such format."""
    if named(format).name == "dense":
        raise ValueError("a dense matrix needs no SparseLinear; use nn.Linear")
    return named(format).suffixes
