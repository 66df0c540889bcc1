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
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model goes on with, or answers with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="At most so many tokens.")] = 64,
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
      budwood generate ./SmolLM2-wrp --chat --prompt "Name three rivers." --temperature 0.7
    """
    with working():
        import torch

        from budwood.checkpoints.loading import load
        from budwood.checkpoints.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)
        if chat and not tokenizer.chat_template:
            raise UsageError(f"{model}: its tokenizer has no chat template; leave --chat out")
        loaded: Any = load(model, dtype=dtype, device=device)
        text = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            if chat
            else prompt
        )
        # A chat template writes its own special tokens.
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(loaded.device)
        torch.manual_seed(seed)
    streamer = Streamer(tokenizer, inputs["input_ids"].shape[1], write=not json)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.monotonic()
    with working() if json else torch.no_grad():
        loaded.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    said = {
        "model": model,
        "prompt": prompt,
        "text": streamer.text(),
        "tokens": len(streamer.tokens) - streamer.prompt_length,
        "seconds": time.monotonic() - began,
    }
    answer(said, json, lambda _: print())
