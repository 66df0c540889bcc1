"""`budwood generate`: continue a prompt with a model."""

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from budwood.cli import options
from budwood.cli.checks import check_model
from budwood.cli.printable import printable
from budwood.cli.terminal import print_result, stdout_to_stderr
from budwood.errors import RunError, UsageError, panics_as_errors

if TYPE_CHECKING:
    from torch import Tensor


class Streamer:
    """Prints text token by token to `out`, where given.

    `generate` calls `put` with the prompt first and then with every new token.
    """

    def __init__(self, tokenizer: Any, prompt_length: int, out: TextIO | None) -> None:
        self.tokenizer, self.prompt_length, self.out = tokenizer, prompt_length, out
        self.tokens: list[int] = []
        self.printed = ""

    def put(self, tokens: "Tensor") -> None:
        self.tokens += tokens.flatten().tolist()
        self.print_new(final=False)

    def end(self) -> None:
        self.print_new(final=True)

    def print_new(self, final: bool) -> None:
        text = self.tokenizer.decode(self.tokens[self.prompt_length :], skip_special_tokens=True)
        # The bytes of one character may span tokens; an incomplete one is decoded as U+FFFD, so wait.
        if self.out is not None and (final or not text.endswith("\ufffd")):
            print(printable(text[len(self.printed) :]), end="", file=self.out, flush=True)
            self.printed = text


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="The prompt; with --chat, the user's message. May be repeated: the prompts are one batch.",
        ),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Most new tokens per prompt.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 decodes greedily; above 0 samples at this temperature.")
    ] = 0.0,
    seed: options.Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    dtype: options.ComputeDtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt with MODEL, or answer it with --chat.

    \b
    Examples:
      budwood generate ./SmolLM2-wrp --prompt "The capital of France is" --max-new-tokens 20
      budwood generate ./SmolLM2-wrp --chat --prompt "Name three rivers." --prompt "And a lake?" --temperature 0.7
    """
    place_of_answer = sys.stdout
    with stdout_to_stderr():
        check_model(model)
        check_temperature(temperature)
        import torch

        from budwood.checkpoints.decoding import decode_plainly
        from budwood.checkpoints.loading import load
        from budwood.checkpoints.tokenizer import load_tokenizer
        from budwood.data.tokens import check_vocabulary
        from budwood.stream.arithmetic import known_device

        place = known_device(device)
        tokenizer = load_tokenizer(model, trust_remote_code)
        check_tokenizer(tokenizer, model, chat, len(prompt))
        inputs = encode(tokenizer, prompt, chat)
        loaded: Any = load(model, dtype=dtype, device=str(place), trust_remote_code=trust_remote_code)
        check_vocabulary(inputs["input_ids"], loaded.get_input_embeddings().weight.shape[0], "the prompt")
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        decode_plainly(loaded, model, **sampling)
        inputs = inputs.to(loaded.device)
        torch.manual_seed(seed)
        length = inputs["input_ids"].shape[1]
        single = len(prompt) == 1
        streamer = Streamer(tokenizer, length, None if json else place_of_answer) if single else None
        started = time.monotonic()
        try:
            output = loaded.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
            )
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            context = getattr(loaded.config, "max_position_embeddings", "no number of")
            raise RunError(
                f"{model} cannot generate: {error}; the prompt has {length} tokens, up to {max_new_tokens} more were "
                f"asked for, and config.json gives {context} positions"
            ) from error
        seconds = time.monotonic() - started
    stop = stop_tokens(loaded)
    answers = []
    for text, row in zip(prompt, output[:, length:].tolist(), strict=True):
        tokens = up_to_stop(row, stop)
        answers.append(
            {"prompt": text, "text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": len(tokens)}
        )
    result = {"model": model, **(answers[0] if single else {"answers": answers}), "seconds": seconds}
    print_result(
        result,
        json,
        lambda _: print() if single else print(printable("\n\n".join(a["prompt"] + a["text"] for a in answers))),
    )


def check_temperature(temperature: float) -> None:
    if not math.isfinite(temperature):
        raise UsageError(f"--temperature takes a number such as 0.7, not {temperature}")


def check_tokenizer(tokenizer: Any, model: str, chat: bool, prompts: int) -> None:
    """UsageError where the tokenizer has no chat template or no padding token and needs one; sets the latter."""
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{model}: its tokenizer has no chat template; leave --chat out")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if prompts > 1 and tokenizer.pad_token_id is None:
        raise UsageError(f"{model}: its tokenizer has no padding token; give one prompt at a time")


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool) -> Any:
    """Token ids and attention mask [prompts, tokens], padded on the left so that all continue at the same place.

    Raises UsageError for a prompt that is no text, holds no token, or cannot be read by the tokenizer.
    """
    from budwood.checkpoints.chat import as_text
    from budwood.data.texts import check_text

    for text in prompts:
        check_text(text, "the prompt")
    texts = list(prompts)
    if chat:
        messages = [[{"role": "user", "content": text}] for text in prompts]
        texts = [as_text(tokenizer, message, "the prompt", answer_next=True) for message in messages]
    try:
        with panics_as_errors():
            encoded = tokenizer(
                texts,
                return_tensors="pt",
                return_attention_mask=True,
                add_special_tokens=not chat,  # a chat template writes its own
                padding=len(texts) > 1,
                padding_side="left",
            )
    except Exception as error:  # tokenizers fail in their own ways, as do the values of tokenizer_config.json
        raise UsageError(f"the tokenizer of the model cannot read the prompt: {error}; correct its files") from error
    for text, mask in zip(prompts, encoded["attention_mask"], strict=True):
        if not int(mask.sum()):
            raise UsageError(f"the prompt {text!r} holds no token, so there is nothing to continue; give some text")
    return encoded


def stop_tokens(model: Any) -> set[int]:
    """The tokens that end generation."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def up_to_stop(tokens: list[int], stop: set[int]) -> list[int]:
    """The tokens up to the first that ends generation, that one included."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))]
