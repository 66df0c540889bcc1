"""The transformers plug-in: puts packed linears into a model before it is loaded, and takes them out again.

transformers calls these hooks from `from_pretrained`, in this order: `validate_environment`, then
`update_attn_implementation` (it sees the configuration before the files are looked for), `preprocess_model`,
loading, `postprocess_model`. The module is imported while transformers itself is being imported, hence the
imports inside the hooks.

A folder that this project writes has shards under names of its own, so transformers without the plug-in finds
no weights and says so, instead of starting from random ones. A folder written by `save_pretrained` has the
usual names; there a tripwire, one tensor of a wrong size under the name of a packed weight, makes it refuse.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from budwood.checkpoints.checksums import INDEX_NAME, verify
from budwood.checkpoints.reader import Place, read_header, read_tensor
from budwood.errors import RunError, UsageError
from budwood.formats.checks import check_layout, check_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

METHOD = "budwood"
FORMAT_VERSION = 1


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; keys it does not know are kept as they are.

    `linears`: name -> {"format", "shape"}. `index`: the index file of the shards, None for the usual names.
    """

    def __init__(
        self,
        linears: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        index: str | None = INDEX_NAME,
        **others: Any,
    ):
        others.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.linears = linears or {}
        self.format_version = format_version
        self.index = index
        self.others = others  # not as attributes: transformers gives some names a meaning

    def to_dict(self) -> dict[str, Any]:
        known = {key: value for key, value in self.__dict__.items() if key != "others"}
        if self.index == INDEX_NAME:
            del known["index"]
        return deepcopy({**self.others, **known})

    def check(self) -> None:
        """Raises UsageError when the checkpoint is newer than this program or names what it does not know."""
        from budwood.formats import FORMATS

        if self.format_version > FORMAT_VERSION:
            raise UsageError(
                f"the checkpoint has format_version {self.format_version} and this budwood reads up to "
                f"{FORMAT_VERSION}; install a newer budwood"
            )
        for name, entry in self.linears.items():
            if entry.get("format") not in FORMATS:
                raise UsageError(
                    f"{name} is stored in format {entry.get('format')!r}, which this budwood does not know "
                    f"(it knows {', '.join(FORMATS)}); install a newer budwood"
                )
            shape = entry.get("shape")
            if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(type(n) is int for n in shape)):
                raise RunError(f"config.json gives {name} the shape {shape!r}; it should be [out, in]")


class PackedQuantizer(HfQuantizer):
    """Loads, saves and unpacks models whose linears are `SparseLinear`."""

    requires_calibration = True  # a dense model is pruned by budwood, never while loading
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        from budwood.checkpoints.substitution import Substitution

        self.substitution = Substitution()
        self.places: dict[str, Place] = {}  # where the packed tensors lie, by name and suffix, while loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.check()

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Not about attention: the one hook that sees the configuration before the files are resolved."""
        if self.quantization_config.index is not None:
            config.transformers_weights = self.quantization_config.index
        return config

    update_tp_plan = update_attn_implementation  # its place in transformers up to 5.17

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        from budwood.checkpoints.substitution import local_names, unfuse_experts
        from budwood.kernels.linear import UnpackedWeight

        # Some models draw the weights of their linears themselves, from the module above.
        UnpackedWeight._is_hf_initialized = True  # type: ignore[attr-defined]
        if not checkpoint_files:
            raise UsageError("a packed model is loaded from its folder, not from a state dict")
        files = [Path(file) for file in checkpoint_files]
        if self.quantization_config.index is not None:
            verify(files[0].parent / self.quantization_config.index)
        for file in files:
            self.places |= read_header(file)[0]
        linears = self.quantization_config.linears
        names = local_names(model, linears)
        for name in linears:
            if name not in names and not (model.base_model is model and is_head(name, model)):
                raise RunError(f"{name} is packed in the checkpoint but missing in {type(model).__name__}")
        self.substitution.experts = unfuse_experts(model, names.values())
        for name, local in names.items():
            if linears[name]["format"] != "dense":
                self._put(model, name, local)
        tripwire = self.substitution.missing_weight
        if tripwire is not None:
            ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(tripwire)}$"}

    def _put(self, model: "PreTrainedModel", name: str, local: str) -> None:
        """One empty packed linear, of the sizes that the header of its shard gives."""
        from budwood.checkpoints.substitution import put
        from budwood.formats import FORMATS
        from budwood.kernels.linear import SparseLinear

        format = self.quantization_config.linears[name]["format"]
        shape = tuple(self.quantization_config.linears[name]["shape"])
        found = {
            suffix: self.places[f"{name}.{suffix}"]
            for suffix in FORMATS[format].suffixes
            if f"{name}.{suffix}" in self.places
        }
        check_layout(name, format, shape, {suffix: (p.dtype, p.shape) for suffix, p in found.items()})
        if f"{local}.weight" in model.all_tied_weights_keys:
            raise RunError(f"{name} is packed in the checkpoint but tied to another weight in the model")
        plain = model.get_submodule(local)
        dtype = plain.get_parameter("weight").dtype
        headers = {  # values in the type the model is loaded in, positions in their own
            suffix: (place.shape, dtype if place.dtype.is_floating_point else place.dtype)
            for suffix, place in found.items()
        }
        has_bias = getattr(plain, "bias", None) is not None
        if has_bias and f"{name}.bias" not in self.places:
            raise RunError(f"the checkpoint lacks {name}.bias; fetch or write it again")
        packed = SparseLinear(format, shape, headers, has_bias, device="meta")
        # All of it is in the file: transformers must not draw a random weight.
        packed._is_hf_initialized = True  # type: ignore[assignment]
        self.substitution.linears[local] = put(model, local, packed)
        self.places |= {f"{local}.{suffix}": place for suffix, place in found.items()}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from budwood.checkpoints.substitution import local_names
        from budwood.kernels.linear import SparseLinear
        from budwood.kernels.optimize import ready

        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                packed = module.packed()
                tensors = {suffix: self._positions(f"{name}.{suffix}", packed[suffix]) for suffix in packed}
                check_positions(name, module.format, module.shape, tensors)
                for suffix in packed:
                    module.get_parameter(suffix).requires_grad_(False)
        changed = ready(model)
        for name, local in local_names(model, self.quantization_config.linears).items():
            if local in changed:  # so that it is saved again as what it now is
                self.quantization_config.linears[name]["format"] = changed[local]
        self.places = {}
        model.config.__dict__.pop("transformers_weights", None)
        self.quantization_config.index = None  # from here on, `save_pretrained` writes the usual names
        return model

    def _positions(self, name: str, tensor: Tensor) -> Tensor:
        """A packed tensor to check: where it is offloaded to disk, positions are read from there."""
        offloaded = tensor.is_meta and not tensor.is_floating_point()
        return read_tensor(self.places[name]) if offloaded else tensor

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor] | None, dict]:
        """What `save_pretrained` writes: the tensors, and the tripwire."""
        tripwire = self.substitution.missing_weight
        if tripwire is None or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return {**model.state_dict(), tripwire: torch.zeros(1)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters, as peft puts them; the packed weights themselves stay."""
        return True

    def dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        """The plain model of the same weights; without `dtype` they keep theirs, after any `.to()`."""
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        from budwood.checkpoints.substitution import restore

        restore(model, self.substitution, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
        return model


def is_head(name: str, model: "PreTrainedModel") -> bool:
    """Whether a linear lies outside the base model, which is then loaded without it."""
    return not name.startswith(f"{model.base_model_prefix}.")


def register() -> None:
    """Make the plug-in known to transformers; once is enough, twice does no harm."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(PackedConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(PackedQuantizer)
