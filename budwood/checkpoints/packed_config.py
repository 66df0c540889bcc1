"""`quantization_config` of a folder that budwood wrote: what is packed, and which parameters have other shapes."""

from copy import deepcopy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from budwood.checkpoints.checksums import INDEX_NAME
from budwood.checkpoints.schema import FILE_NAME, NONE, POSITIVE, Each, fault
from budwood.checkpoints.sidecars import FORMAT_VERSION
from budwood.errors import RunError, UsageError

METHOD = "budwood"
CHECKED = {"format_version": POSITIVE, "linears": Each({"format": str}), "index": (FILE_NAME, NONE)}


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; unknown keys are kept.

    linears: packed matrices, name -> {"format", "shape": [out, in]}. index: the index file of the shards, None for
    the usual names. shapes: every parameter whose shape differs from, or that does not exist in, the model that the
    rest of config.json describes, full name -> shape as its module stores it.
    """

    def __init__(
        self,
        linears: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        index: str | None = INDEX_NAME,
        shapes: dict[str, list[int]] | None = None,
        **others: Any,
    ):
        others.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.linears = linears or {}
        self.format_version = format_version
        self.index = index
        self.shapes = shapes or {}
        self.others = others  # not as attributes: some names have a meaning for transformers

    def to_dict(self) -> dict[str, Any]:
        known = {key: value for key, value in self.__dict__.items() if key != "others"}
        if self.index == INDEX_NAME:
            del known["index"]
        if not self.shapes:
            del known["shapes"]
        return deepcopy({**self.others, **known})

    def check(self) -> None:
        """Raises UsageError when the checkpoint needs a newer budwood, RunError when an entry is malformed."""
        from budwood.formats import FORMATS

        found = fault(dict(vars(self)), CHECKED, "quantization_config")
        if found:
            raise RunError(f"config.json is damaged: {found}; fetch or write it again")
        if self.format_version > FORMAT_VERSION:
            raise UsageError(
                f"the checkpoint has format_version {self.format_version} and this budwood reads up to "
                f"{FORMAT_VERSION}; install a newer budwood"
            )
        for name, entry in self.linears.items():
            if entry["format"] not in FORMATS:
                raise UsageError(
                    f"{name} is stored in format {entry['format']!r}, which this budwood does not know "
                    f"(it knows {', '.join(FORMATS)}); install a newer budwood"
                )
            shape = entry.get("shape")
            if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(type(n) is int for n in shape)):
                raise RunError(f"config.json gives {name} the shape {shape!r}; it should be [out, in]")
        check_shapes(self.shapes)


def check_shapes(shapes: Any) -> None:
    """Raises RunError unless `shapes` of a quantization config is name -> list of positive integers."""
    if not isinstance(shapes, dict):
        raise RunError(f"config.json has the shapes {shapes!r}; they should be given by name; write it again")
    for name, shape in shapes.items():
        right = isinstance(shape, list | tuple) and shape and all(type(size) is int and size > 0 for size in shape)
        if not right:
            raise RunError(
                f"config.json gives {name} the shape {shape!r}; expected a list of positive integers; write it again"
            )
