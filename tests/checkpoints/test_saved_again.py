"""A base model that was loaded from a packed folder and saved: it loads again, and never with a random head."""

import pytest
import torch
from families import save_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM

from budwood.checkpoints.loading import load
from budwood.errors import RunError
from budwood.pruning import prune


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Packed folders of a family, and what `save_pretrained` makes of their base models."""

    def save(name, **options):
        folder = tmp_path_factory.mktemp(name)
        save_model(name, folder / "dense")
        prune(folder / "dense", folder / "packed", 'magnitude("2:4")')
        AutoModel.from_pretrained(folder / "packed").save_pretrained(folder / "base", **options)
        return folder

    return save


def hidden(folder):
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(token_ids(), use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("llama", {"max_shard_size": "20KB"}), ("gpt2", {}), ("mixtral", {})]
)
def test_base_models_are_loaded_and_saved(saved, name, options):
    folder = saved(name, **options)
    assert torch.equal(hidden(folder / "base"), hidden(folder / "packed"))
    again = AutoModel.from_pretrained(folder / "base")
    again.save_pretrained(folder / "twice")
    assert torch.equal(hidden(folder / "twice"), hidden(folder / "packed"))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_no_head_is_made_up_where_none_was_saved(saved, name):
    folder = saved(name)
    for opened in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(RunError, match=r"holds no lm_head\.weight .* load it with AutoModel"):
            opened(folder / "base")


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_tied_head_is_found_again(saved, name):
    folder = saved(name)
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(folder / part)(token_ids(), use_cache=False).logits
            for part in ("packed", "base")
        )
    assert torch.equal(found, expected)
