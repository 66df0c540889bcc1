"""Runs the decoder blocks of a model one by one, exactly as the model itself calls them.

Blocks are called with different arguments (masks of sliding and full attention, rotary tables, some of them
positional). So the model's own forward runs once with every block replaced by a stub that records its arguments
and returns its input. Embeddings, final norm and head are never called by name: the model's forward calls them, and
the stubs return the hidden states that they need.

Whether blocks return a tensor or a tuple is found by trying each form in the stubs, so no block needs weights: the
form is right when the next block receives the same tensor object.
(Running a block on the meta device fails where the routing of experts depends on values.)
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from budwood.errors import UsageError

Form = Callable[[Tensor], Any]  # hidden states -> what a block returns
FORMS: tuple[Form, ...] = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None))


class _Stop(Exception):
    """Ends a forward pass that is not needed any further."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block: the hidden states come first, or by the name of the first parameter."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: str

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs[self.first]

    def to(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """The output of `block` for this call with other hidden states."""
        if self.args:
            return block(hidden, *self.args[1:], **self.kwargs)
        return block(**{**self.kwargs, self.first: hidden})

    def without_hidden(self) -> "Call":
        """The call without hidden states and caches, which need not be kept."""
        args, kwargs = tree_map(lambda leaf: None if isinstance(leaf, Cache) else leaf, (self.args, self.kwargs))
        if args:
            return Call((None, *args[1:]), kwargs, self.first)
        return Call((), {**kwargs, self.first: None}, self.first)


class BlockCalls:
    """How the blocks of a model are called for inputs of one shape (batch, tokens), without padding."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor, form: Form, calls: list[Call]):
        self.model, self.blocks, self.input_ids = model, blocks, input_ids
        self.form, self.calls = form, calls

    def embed(self, input_ids: Tensor) -> Tensor:
        """[batch, tokens] -> the hidden states [batch, tokens, hidden] that enter the first block."""
        self._check(input_ids)
        return _calls(self.model, self.blocks, input_ids, self.form, until=0)[0].hidden

    def run(self, index: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """One block, called as the model calls it: [batch, tokens, hidden] -> the same."""
        self._check(hidden)
        answer = self.calls[index].to(block, hidden)
        return answer[0] if isinstance(answer, tuple) else answer

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own final norm and head: [batch, tokens, hidden] -> [batch, tokens, vocabulary]."""
        self._check(hidden)
        with _stubs(self.blocks, lambda index, call: self.form(hidden)):
            return self.model(input_ids=self.input_ids, use_cache=False).logits

    def _check(self, given: Tensor) -> None:
        shape = tuple(self.input_ids.shape)
        if tuple(given.shape[:2]) != shape:
            raise ValueError(f"calls were recorded for [batch, tokens] = {list(shape)}, got {list(given.shape[:2])}")


@torch.no_grad()
def record_calls(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> BlockCalls:
    """Records how the blocks are called for input_ids [batch, tokens]; blocks may be on meta, the rest may not.

    Raises UsageError for models whose blocks cannot be run one by one: where something happens between
    them, or where their arguments depend on the tokens and not on the shape alone.
    """
    _calls(model, blocks, input_ids, FORMS[0], until=0)  # an error before the first block does not depend on the form
    form = next((form for form in FORMS if _fits(model, blocks, input_ids, form)), None)
    if form is None:
        raise UsageError(
            f"{type(model).__name__} does not pass the output of each block to the next unchanged; "
            "budwood prunes models whose blocks form a plain chain"
        )
    calls = [call.without_hidden() for call in _calls(model, blocks, input_ids, form)]
    others = [call.without_hidden() for call in _calls(model, blocks, input_ids.flip(1), form)]
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        if not _equal(call, other):
            raise UsageError(
                f"{type(model).__name__} gives block {index} other arguments for other tokens of the same shape; "
                "budwood prunes models whose blocks see only the block before them"
            )
    return BlockCalls(model, blocks, input_ids, form, calls)


def _fits(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor, form: Form) -> bool:
    """Whether the model, when blocks return this form, calls each once and in order with the same hidden states."""
    try:
        if len(blocks) == 1:  # there is no next block: the shape of the logits decides
            with _stubs(blocks, lambda index, call: form(call.hidden)):
                return model(input_ids=input_ids, use_cache=False).logits.shape[:-1] == input_ids.shape
        calls = _calls(model, blocks, input_ids, form)
    except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
        return False  # the model does not accept this form
    first = calls[0].hidden
    return all(torch.is_tensor(call.hidden) and call.hidden is first for call in calls)


def _calls(
    model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor, form: Form, until: int | None = None
) -> list[Call]:
    """The calls of all blocks, or of those up to `until`; the head never runs."""
    calls: list[Call] = []
    last = len(blocks) - 1 if until is None else until

    def note(index: int, call: Call) -> Any:
        if index != len(calls):
            raise ValueError(f"block {index} was called in place of block {len(calls)}")
        calls.append(call)
        if index == last:
            raise _Stop
        return form(call.hidden)

    with torch.no_grad(), _stubs(blocks, note):
        try:
            model(input_ids=input_ids, use_cache=False)
        except _Stop:
            return calls
    raise ValueError(f"the model called {len(calls)} of {len(blocks)} blocks")


@contextmanager
def _stubs(blocks: nn.ModuleList, answer: Callable[[int, Call], Any]) -> Iterator[None]:
    """In this context each block returns `answer(index, call)` and computes nothing."""
    before = [block.__dict__.get("forward") for block in blocks]

    def stub(index: int, first: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(index, Call(args, kwargs, first))

    try:
        for index, block in enumerate(blocks):
            first = next(iter(inspect.signature(block.forward).parameters))
            block.__dict__["forward"] = stub(index, first)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _equal(call: Call, other: Call) -> bool:
    """Whether two calls have the same arguments, tensors compared by value."""
    ours, theirs = (tree_leaves((some.args, some.kwargs)) for some in (call, other))
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else type(a) is type(b)
        for a, b in zip(ours, theirs, strict=True)
    )
