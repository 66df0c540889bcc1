"""`budwood generate`: let a model go on with a text."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from budwood.cli import options
from budwood.cli.terminal import answer, working
from budwood.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class Streamer:
    """Writes text as it comes. `generate` calls `put` with the prompt first and then with every new token."""

    def __init__(self, tokenizer: Any, prompt_length: int, write: bool) -> None:
        self.tokenizer, self.prompt_length, self.write = tokenizer, prompt_length, write
        self.tokens: list[int] = []
        self.shown = ""

    def put(self, tokens: "Tensor") -> None:
        self.tokens += tokens.flatten().tolist()
        self.show(whole=False)

    def end(self) -> None:
        self.show(whole=True)

    def text(self) -> str:
        return self.tokenizer.decode(self.tokens[self.prompt_length :], skip_special_tokens=True)

    def show(self, whole: bool) -> None:
        text = self.text()
        # A character of several bytes may lie across tokens; half of one is decoded as U+FFFD, so wait.
        if self.write and (whole or not text.endswith("�")):
            print(text[len(self.shown) :], end="", file=sys.stdout, flush=True)
            self.shown = text


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="What the model goes on with, or answers with --chat. Given several times: all of them at once.",
        ),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="At most so many tokens each.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.0,
    seed: options.Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")
    ] = "auto",
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Let MODEL go on with a text, or answer with --chat.

    \b
    Examples:
      budwood generate ./SmolLM2-wrp --prompt "The capital of France is" --max-new-tokens 20
      budwood generate ./SmolLM2-wrp --chat --prompt "Name three rivers." --prompt "And a lake?" --temperature 0.7
    """
    with working():
        import torch

        from budwood.checkpoints.loading import load
        from budwood.checkpoints.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)
        if chat and not tokenizer.chat_template:
            raise UsageError(f"{model}: its tokenizer has no chat template; leave --chat out")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if len(prompt) > 1 and tokenizer.pad_token_id is None:
            raise UsageError(f"{model}: its tokenizer has nothing to pad with; give one prompt at a time")
        loaded: Any = load(model, dtype=dtype, device=device)
        # A chat template writes its own special tokens. Texts of a batch end together, so that all go on from there.
        texts = [asked(tokenizer, text) for text in prompt] if chat else prompt
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            add_special_tokens=not chat,
            padding=len(texts) > 1,
            padding_side="left",
        ).to(loaded.device)
        torch.manual_seed(seed)
    length = inputs["input_ids"].shape[1]
    streamer = Streamer(tokenizer, length, write=not json) if len(texts) == 1 else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.monotonic()
    with working() if json else torch.no_grad():
        written = loaded.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    seconds = time.monotonic() - began
    ends = endings(loaded)
    answers = []
    for text, row in zip(prompt, written[:, length:].tolist(), strict=True):
        tokens = row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))]
        spoken = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append({"prompt": text, "text": spoken, "tokens": len(tokens)})
    said = {"model": model, **(answers[0] if streamer else {"answers": answers}), "seconds": seconds}
    answer(said, json, lambda _: print() if streamer else print("\n\n".join(a["prompt"] + a["text"] for a in answers)))


def asked(tokenizer: Any, text: str) -> str:
    """The text as a user's message, up to where the answer begins."""
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def endings(model: Any) -> set[int]:
    """The tokens after which a model says no more."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}
