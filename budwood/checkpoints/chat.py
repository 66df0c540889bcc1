"""Conversations as text, by the chat template of a tokenizer."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from budwood.errors import UsageError

Message = Mapping[str, Any]  # role and content
STEPS = 2_000_000  # lines of Python that a template may run, some 100 times what a usual one does; a second or two


def as_text(tokenizer: Any, messages: Sequence[Message], where: str, answer_next: bool = False) -> str:
    """The conversation as the template writes it; answer_next: up to where the next answer begins.

    Raises UsageError where there is no template, where it refuses the messages, or where it gives no text. where: the
    place of the messages, for the message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{where} is a conversation, and the tokenizer of the model has no chat template to write it with; give "
            "plain text"
        )
    try:
        with at_most(STEPS + 1000 * len(messages)):
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_next
            )
    except Exception as error:  # templates are programs of the folder, and fail in every way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where}: the chat template of the model refuses it ({reason}); give plain text") from error
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the chat template of the model makes no text of it; give plain text")
    return text


@contextmanager
def at_most(steps: int) -> Iterator[None]:
    """In this context Python runs so many lines and then raises RuntimeError: a few loops in a template never end."""

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise RuntimeError("it does not end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
