"""Normalization by the root mean square (RMSNorm) of few rows: torch takes eight operators for it, one after the other.

Families differ in how they round, and in whether the weight counts from one. Which of these a module does is found by
comparing what it computes, so that a module of any name and origin is accelerated, and none that does something else.
"""

from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor, nn

from budwood.kernels import dispatch, native
from budwood.kernels.native import MAX_FEW_ROWS, TYPES

EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what modules call it
ROWS = 16  # that are compared
MOSTLY = 0.9  # of results of 16 bits, which are the very same where the formula is


class Form(IntEnum):
    """What is done with v = x / sqrt(mean(x²) + epsilon), as `native/kernels.h` numbers it."""

    ROUNDED_FIRST = 0  # weight * round(v)
    ROUNDED_LAST = 1  # round(weight * v)
    FROM_ONE = 2  # round((1 + weight) * v)


def normalized(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> Tensor | None:
    """The norm of `x [..., width]` in its dtype, by the native kernel; None where there is none for this.

    weight: `[width]`, in the dtype of x.
    """
    library = native.library()
    if (
        library is None
        or x.dtype != weight.dtype
        or not x.is_floating_point()
        or x.dtype not in TYPES
        or x.shape[-1:] != weight.shape
        or not x.is_cpu
        or not weight.is_cpu
        or not weight.is_contiguous()
        or not x.numel()
    ):
        return None
    x = x.contiguous()
    y, width = torch.empty_like(x), weight.shape[0]
    rows, type = x.numel() // width, TYPES[x.dtype]
    done = library.budwood_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, epsilon, type, form)
    return y if done else None


class NativeNorm(nn.Module):
    """What `accelerate_norms` puts before the class of a norm: few rows without a gradient are the native kernel's."""

    form: Form
    epsilon: str  # the attribute that holds it

    def forward(self, *given: Any, **named: Any) -> Any:
        found = None if named or len(given) != 1 or torch.compiler.is_compiling() else self.few(given[0])
        return super().forward(*given, **named) if found is None else found

    def few(self, x: Tensor) -> Tensor | None:
        """The norm by the native kernel; None where the class that was there first computes it."""
        weight = self._parameters.get("weight")
        if weight is None or type(x) is not Tensor or not is_few(x) or dispatch.is_exact():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
        return normalized(x, weight, getattr(self, self.epsilon), self.form)

    def __reduce__(self) -> tuple[Any, ...]:
        """The class was made here, so a copy makes it again."""
        return _empty, (type(self).__mro__[2],), self.__dict__


def is_few(x: Tensor) -> bool:
    """Whether a model decodes, as products and attention see it: of a prompt everything but these is torch's.

    x: [rows, width], [batch, tokens, width], or heads of one token: [batch, 1, heads, width], [batch, heads, 1, width].
    """
    return 1 in x.shape[1:3] if x.dim() == 4 else x.numel() <= MAX_FEW_ROWS * x.shape[-1]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def accelerated(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a norm with `NativeNorm` before it, under its own name; always the same."""
    return _classes.setdefault(kind, type(kind.__name__, (NativeNorm, kind), {"__doc__": kind.__doc__}))


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = accelerated(kind)
    return made.__new__(made)


def accelerate_norms(model: nn.Module) -> None:
    """Let the norms of a model use the native kernel, where there is one that computes the same."""
    if not native.has_norm():
        return
    for module in list(model.modules()):
        found = None if isinstance(module, NativeNorm) else form_of(module)
        if found is not None:
            module.__class__ = accelerated(type(module))
            cast(NativeNorm, module).form, cast(NativeNorm, module).epsilon = found


def form_of(module: nn.Module) -> tuple[Form, str] | None:
    """What a module computes, and its attribute of epsilon; None where it is no norm that the kernel can compute.

    Found by comparing results for random rows, whose mean is not zero.
    """
    name = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if name is None or any(True for _ in module.children()):
        return None
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.pop("weight", None)
    if weight is None or tensors:
        return None
    if weight.dim() != 1 or not weight.is_cpu or not weight.is_floating_point():
        return None
    epsilon: float = getattr(module, name)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(ROWS, len(weight), generator=generator) + 0.5).to(weight.dtype)
    with torch.no_grad():
        try:
            expected = type(module).forward(module, x)
        except Exception:  # it may want anything else
            return None
        found = {form: normalized(x, weight, epsilon, form) for form in Form}
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return None
    errors = {form: (y - expected).abs().double() for form, y in found.items() if y is not None}
    best = min(errors, key=lambda form: float(errors[form].sum()), default=None)
    if best is None or not (errors[best] <= tolerance(x.dtype) * expected.abs()).all():
        return None
    return (best, name) if x.dtype == torch.float32 or (errors[best] == 0).double().mean() > MOSTLY else None


def tolerance(dtype: torch.dtype) -> float:
    """Relative; sums in another order differ by some 1e-6, which may round the other way."""
    return max(2 * torch.finfo(dtype).eps, 2e-6)
