"""How text is generated: token by token with one answer, whatever else `generation_config.json` asks for."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from budwood.errors import UsageError

# What a folder may say of how tokens are chosen. Everything else (beams, several answers, static or quantised caches,
# assistants, code of its own, stop strings, other forms of output) is another way to generate, which these verbs do not
# offer.
KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def decode_plainly(model: PreTrainedModel, where: object, **options: Any) -> None:
    """Of the settings of the model's folder leaves those that choose tokens, and puts `options` over them.

    Settings that are not given to `generate` are taken from the model, so the model's own are replaced. Raises
    UsageError where transformers refuses one of them. where: the model's name, for the message.
    """
    own = model.generation_config
    found = {name: getattr(own, name, None) for name in KEPT}
    kept = {name: value for name, value in found.items() if value is not None}
    try:
        model.generation_config = GenerationConfig(**kept | options)
    except Exception as error:  # settings are checked in many ways; all mean that they cannot be
        reason = " ".join(str(error).split())
        raise UsageError(f"{where}: its generation_config.json cannot be used ({reason}); correct it") from error
