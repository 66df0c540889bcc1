"""Layers that are called with the same input tensor (query, key and value; gate and up), multiplied in one native call.

Which layers those are is learned from the calls, not from names. The first layer of a group computes the products of
all; the others, called with the very same tensor, return theirs. One native call starts the threads once.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from budwood.kernels import dispatch
from budwood.kernels.file_parameters import FileParameters
from budwood.kernels.native import FEW_ROWS, MAX_FEW_ROWS
from budwood.kernels.native_matrix import MatrixGroup, NativeMatrix

LONE_CALLS = 3  # calls with a tensor that no other layer gets, after which a layer is no longer observed
CHANCES = 4  # groups of one observer that may turn out wrong, after which their layers are no longer observed


class Layer(Protocol):
    """A linear layer whose product may be computed together with others: a `SparseLinear`."""

    in_features: int
    shared_input: "InputObserver | SharedInput | None"

    @property
    def _parameters(self) -> Mapping[str, Tensor | None]: ...

    def native_matrix(self) -> NativeMatrix | None:
        """The weight for the native library."""


class _Calls(threading.local):
    """The last input tensor of this thread, and the layers that were called with it."""

    input: weakref.ref[Tensor] | None = None
    version = -1

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def same(self, input: Tensor) -> bool:
        """Whether `input` is the noted tensor and was not changed in place since."""
        return self.input is not None and self.input() is input and self.version == input._version

    def note(self, input: Tensor, layer: Layer) -> None:
        self.input, self.version, self.layers = weakref.ref(input), input._version, [layer]


class _Waiting(threading.local):
    """The products of this thread that were computed and not yet asked for, and their input tensor."""

    input: weakref.ref[Tensor] | None = None
    version = -1

    def __init__(self) -> None:
        # layer -> product, the matrix and the parameter versions it was computed with
        self.products: dict[Layer, tuple[Tensor, NativeMatrix, list[int]]] = {}


class InputObserver:
    """Layers of one parent module and one width, observed until it is known which of them share their input.

    Layers that were called one after another with the very same tensor become a `SharedInput`.
    """

    def __init__(self, layers: Iterable[Layer]):
        self.layers = list(layers)
        self.calls, self.lock = _Calls(), threading.Lock()
        self.lone_calls = dict.fromkeys(self.layers, 0)
        self.chances = CHANCES

    def product(self, layer: Layer, matrix: NativeMatrix, input: Tensor) -> Tensor | None:
        """The product by a group that this call completes; else None, and the call is noted."""
        if not shareable(layer, input):
            return None
        calls = self.calls
        if calls.same(input) and layer not in calls.layers:
            calls.layers.append(layer)
            return None
        self._conclude(calls.layers)
        calls.note(input, layer)
        shared = layer.shared_input
        if shared is None or shared is self:
            return None
        return shared.product(layer, matrix, input)

    def _conclude(self, called: list[Layer]) -> None:
        """Group the layers that were called with one tensor; a layer that is often alone is no longer observed."""
        with self.lock:
            observed = [layer for layer in called if layer.shared_input is self]
            if len(observed) > 1:
                shared = SharedInput(observed, self)
                for layer in observed:
                    layer.shared_input = shared
            for layer in observed if len(observed) == 1 else ():
                self.lone_calls[layer] += 1
                if self.lone_calls[layer] >= LONE_CALLS:
                    layer.shared_input = None
            left = [layer for layer in self.layers if layer.shared_input is self]
            if len(left) == 1:
                left[0].shared_input = None

    def dissolve(self, shared: "SharedInput") -> None:
        """Observe the layers of a group again, or let each compute alone where groups were wrong too often."""
        with self.lock:
            members = [layer for layer in shared.layers if layer.shared_input is shared]
            self.chances -= bool(members)
            for layer in members:
                layer.shared_input = self if self.chances > 0 else None


class SharedInput:
    """Layers that share their input, in the order of their calls, and the products that wait for the later ones."""

    def __init__(self, layers: list[Layer], observer: InputObserver):
        self.layers, self.observer = layers, observer
        self.waiting = _Waiting()
        self.group: MatrixGroup | None = None

    def product(self, layer: Layer, matrix: NativeMatrix, input: Tensor) -> Tensor | None:
        """The product of one layer, whose weight is `matrix`; None where the layer has to compute it alone.

        A layer that is called with another tensor than the first one dissolves the group.
        """
        if not shareable(layer, input):
            return None
        waiting = self.waiting
        if waiting.products:
            if waiting.input is not None and waiting.input() is input and waiting.version == input._version:
                found = waiting.products.pop(layer, None)
                if found is not None:
                    product, used, versions = found
                    # A weight that was replaced or changed in place since has another product.
                    return product if used is matrix and versions == parameter_versions(layer) else None
        elif layer is self.layers[0]:
            return self._first(matrix, input)
        elif waiting.input is None:  # this thread was between the layers when another one formed the group
            return None
        waiting.products.clear()
        self.observer.dissolve(self)
        return None

    def _first(self, matrix: NativeMatrix, input: Tensor) -> Tensor | None:
        """The product of the first layer; those of the others are kept until they are asked for."""
        matrices, biases, versions = [matrix], [bias_of(self.layers[0])], []
        for layer in self.layers[1:]:
            other, version = layer.native_matrix(), parameter_versions(layer)
            if other is None or version is None:
                return None
            matrices.append(other)
            biases.append(bias_of(layer))
            versions.append(version)
        group = self.group
        if group is None or group.matrices != matrices:  # compared by identity
            group = self.group = MatrixGroup(matrices)
        products = group.linear(input, biases, FEW_ROWS)
        if products is None:
            return None
        waiting = self.waiting
        waiting.input, waiting.version = weakref.ref(input), input._version
        others = zip(products[1:], matrices[1:], versions, strict=True)
        waiting.products = dict(zip(self.layers[1:], others, strict=True))
        return products[0]


def shareable(layer: Layer, input: Tensor) -> bool:
    """Whether a product may be computed for several layers: of few rows, by a native kernel.

    An inference tensor has no version, so that a change in place would not be noticed.
    """
    return input.numel() <= MAX_FEW_ROWS * layer.in_features and not dispatch.is_exact() and not input.is_inference()


def parameter_versions(layer: Layer) -> list[int] | None:
    """Grow with every change in place; None where a parameter is an inference tensor, which has no version."""
    parameters = layer._parameters
    held = parameters.at_hand if isinstance(parameters, FileParameters) else parameters.values()
    try:
        return [parameter._version for parameter in held if parameter is not None]
    except RuntimeError:
        return None


def bias_of(layer: Layer) -> Tensor | None:
    """The bias of a layer, in less time than its attribute takes."""
    parameters = layer._parameters
    return parameters.bias if isinstance(parameters, FileParameters) else parameters["bias"]


def observe_inputs(layers: Iterable[tuple[str, Layer]]) -> None:
    """Let layers of the same parent module (by full name) and width learn from their calls which share an input."""
    candidates: defaultdict[tuple[str, int], list[Layer]] = defaultdict(list)
    for name, layer in layers:
        candidates[name.rpartition(".")[0], layer.in_features].append(layer)
    for group in candidates.values():
        if len(group) > 1:
            observer = InputObserver(group)
            for layer in group:
                layer.shared_input = observer
