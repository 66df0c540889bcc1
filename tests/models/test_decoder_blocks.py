"""Where the blocks are, and who is refused."""

import pytest
from families import BLOCKS, FAMILIES, build, config
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from budwood.errors import UsageError
from budwood.models.blocks import find_blocks

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
}


class Toy(nn.Module):
    """What a decoder from outside transformers looks like from here."""

    config = None
    _no_split_modules = ("Sequential",)

    def __init__(self, **lists):
        super().__init__()
        for name, modules in lists.items():
            self.add_module(name, nn.ModuleList(modules))

    def can_generate(self):
        return True

    def get_output_embeddings(self):
        return self


def linears(count):
    return [nn.Linear(4, 4) for _ in range(count)]


def sequences(count):
    return [nn.Sequential(*linears(1)) for _ in range(count)]


def test_every_family_has_its_blocks(family):
    path, blocks = find_blocks(build(family))
    assert len(blocks) == BLOCKS
    assert path.endswith(("layers", "h"))


def test_there_are_nineteen_families():
    assert len(FAMILIES) == 19


def test_blocks_of_an_unknown_class_are_found_by_no_split_modules():
    model = Toy(norms=linears(5), body=sequences(3), short=sequences(2))
    assert find_blocks(model) == ("body", model.body)


@pytest.mark.parametrize("lists", [{"norms": linears(5)}, {"one": sequences(3), "two": sequences(3)}, {}])
def test_ambiguous_lists_are_named(lists):
    with pytest.raises(UsageError, match=next(iter(lists), "no list of layers")):
        find_blocks(Toy(**lists))


def vision_and_text():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 32, "head_dim": 16, "num_key_value_heads": 1}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


OTHERS = {
    "BertForMaskedLM cannot": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "BertLMHeadModel is an encoder": lambda: BertLMHeadModel(BertConfig(**BERT)),
    "T5ForConditionalGeneration is an encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16, vocab_size=32)
    ),
    "ViTModel cannot": lambda: ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    ),
    "Gemma3ForConditionalGeneration is multimodal": vision_and_text,
    "LlamaModel cannot": lambda: LlamaModel(config("llama")),
    "GPT2Model cannot": lambda: AutoModel.from_config(config("gpt2")),
}


@pytest.mark.parametrize("message", OTHERS)
def test_models_other_than_decoders_are_refused_in_one_sentence(message):
    with pytest.raises(UsageError, match=message) as error:
        find_blocks(OTHERS[message]())
    assert "\n" not in str(error.value)


def test_an_encoder_configured_as_decoder_is_accepted():
    path, blocks = find_blocks(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)))
    assert (path, len(blocks)) == ("bert.encoder.layer", 2)
