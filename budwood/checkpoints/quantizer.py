"""The transformers plug-in: puts packed linears into a model before loading, and takes them out on request.

transformers calls these hooks from `from_pretrained`, in this order: `validate_environment`, then
`update_attn_implementation` (it sees the configuration before the files are looked for), `preprocess_model`,
loading, `postprocess_model`. The module is imported while transformers itself is being imported, hence the
imports inside the hooks.

Without the plug-in, transformers must fail instead of initialising weights at random. A folder that this project
writes has an index under a name of its own, so no weights are found. A folder written by `save_pretrained` has the
usual names; there a sentinel, one tensor of a wrong shape under the name of a packed weight, causes the error.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from budwood.checkpoints.checksums import verify
from budwood.checkpoints.packed_config import METHOD, PackedConfig
from budwood.checkpoints.reader import TensorLocation, read_header, read_tensor
from budwood.errors import RunError, UsageError
from budwood.formats.checks import check_layout, check_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class PackedQuantizer(HfQuantizer):
    """Loads, saves and unpacks models whose linears are `SparseLinear`."""

    requires_calibration = True  # a dense model is pruned by budwood, never while loading
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        from budwood.checkpoints.substitution import Substitution

        self.substitution = Substitution()
        self.locations: dict[str, TensorLocation] = {}  # of all tensors by full name, while loading
        self.guard: str | None = None  # the parameter that is stored with one dimension more, while loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.check()

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Names the index: this hook alone sees the configuration before the files are looked up."""
        if self.quantization_config.index is not None:
            config.transformers_weights = self.quantization_config.index
        return config

    update_tp_plan = update_attn_implementation  # the hook that does this in transformers up to 5.17

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        from budwood.checkpoints.reshaping import add_dimension, guarded
        from budwood.checkpoints.substitution import local_names, unfuse_experts
        from budwood.kernels.unpacked_weight import UnpackedWeight

        # Some models initialise the weights of their linears in the parent module.
        UnpackedWeight._is_hf_initialized = True  # type: ignore[attr-defined]
        if not checkpoint_files:
            raise UsageError("a packed model is loaded from its folder, not from a state dict")
        files = [Path(file) for file in checkpoint_files]
        if self.quantization_config.index is not None:
            verify(files[0].parent / self.quantization_config.index)
        for file in files:
            self.locations |= read_header(file)[0]
        refuse_without_head(model, self.locations)
        prefix = f"{model.base_model_prefix}."  # a base model is saved without it
        self.locations |= {
            prefix + name: location for name, location in self.locations.items() if not name.startswith(prefix)
        }
        linears = self.quantization_config.linears
        names = local_names(model, linears)
        for name in linears:
            if name not in names and not (model.base_model is model and is_head(name, model)):
                raise RunError(f"{name} is packed in the checkpoint but missing in {type(model).__name__}")
        self._reshape(model, names)
        self.substitution.experts |= unfuse_experts(model, names.values())
        for name, local in names.items():
            if linears[name]["format"] != "dense":
                self._put(model, name, local)
        if self.quantization_config.index is None:  # written by `save_pretrained`
            self.guard = guarded(model, self.substitution)
            add_dimension(model, self.guard)
        sentinel = self.substitution.missing_weight
        if sentinel is not None:
            ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(sentinel)}$"}

    def _reshape(self, model: "PreTrainedModel", linears: dict[str, str]) -> None:
        """Empty parameters of the shapes in the configuration; `linears`: packed ones, in the file -> in the model."""
        from budwood.checkpoints.reshaping import reshape
        from budwood.checkpoints.substitution import local_names, unfuse_experts

        shapes = self.quantization_config.shapes
        owners = {name: name.rpartition(".")[0] for name in shapes}
        local = local_names(model, owners.values())
        for name, owner in owners.items():
            if owner not in local and not (model.base_model is model and is_head(name, model)):
                raise RunError(f"{name} is in the checkpoint but {owner} is missing in {type(model).__name__}")
        self.substitution.experts |= unfuse_experts(model, [*local.values(), *linears.values()])
        for name, path in linears.items():  # a bias that the file has and the configuration does not mention
            plain, bias = model.get_submodule(path), f"{name}.bias"
            if bias in self.locations and bias not in shapes and getattr(plain, "bias", None) is None:
                shapes[bias], owners[bias], local[name] = list(self.locations[bias].shape), name, path
        here = {name: f"{local[owner]}.{name.rpartition('.')[2]}" for name, owner in owners.items() if owner in local}
        for name, owner in owners.items():
            if owner in linears and name.endswith(".weight"):
                continue  # its packed tensors are checked
            found = self.locations.get(name)
            if name in here and (found is None or found.shape != tuple(shapes[name])):
                what = "lacks it" if found is None else f"has {list(found.shape)}"
                raise RunError(
                    f"config.json gives {name} the shape {list(shapes[name])} and the checkpoint {what}; "
                    "fetch or write it again"
                )
        reshape(model, {full: shapes[name] for name, full in here.items()}, self.substitution)

    def _put(self, model: "PreTrainedModel", name: str, local: str) -> None:
        """Puts in one empty packed linear, with the shapes and dtypes that the headers of the shards give."""
        from budwood.checkpoints.substitution import put
        from budwood.formats import FORMATS
        from budwood.kernels.linear import SparseLinear

        format = self.quantization_config.linears[name]["format"]
        shape = tuple(self.quantization_config.linears[name]["shape"])
        found = {
            suffix: self.locations[f"{name}.{suffix}"]
            for suffix in FORMATS[format].suffixes
            if f"{name}.{suffix}" in self.locations
        }
        check_layout(name, format, shape, {suffix: (p.dtype, p.shape) for suffix, p in found.items()})
        if f"{local}.weight" in model.all_tied_weights_keys:
            raise RunError(f"{name} is packed in the checkpoint but tied to another weight in the model")
        plain = model.get_submodule(local)
        dtype = plain.get_parameter("weight").dtype
        headers = {  # values in the dtype of the loaded model, positions in their own
            suffix: (location.shape, dtype if location.dtype.is_floating_point else location.dtype)
            for suffix, location in found.items()
        }
        has_bias = getattr(plain, "bias", None) is not None
        if has_bias and f"{name}.bias" not in self.locations:
            raise RunError(f"the checkpoint lacks {name}.bias; fetch or write it again")
        packed = SparseLinear(format, shape, headers, has_bias, device="meta")
        # All of it is in the file: transformers must not initialise it at random.
        packed._is_hf_initialized = True  # type: ignore[assignment]
        self.substitution.linears[local] = put(model, local, packed)
        self.locations |= {f"{local}.{suffix}": location for suffix, location in found.items()}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from budwood.checkpoints.decoding_attention import accelerate_attention
        from budwood.checkpoints.reshaping import remove_dimension
        from budwood.checkpoints.substitution import local_names
        from budwood.formats import FORMATS
        from budwood.kernels.linear import SparseLinear
        from budwood.kernels.optimize import optimize

        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                packed = module.packed()
                placing = FORMATS[module.format].placing
                tensors = {
                    suffix: self._positions(f"{name}.{suffix}", tensor, suffix in placing)
                    for suffix, tensor in packed.items()
                }
                check_positions(name, module.format, module.shape, tensors)
                for suffix in packed:
                    module.get_parameter(suffix).requires_grad_(False)
        remove_dimension(model, self.guard)
        self.guard = None
        changed = optimize(model)
        accelerate_attention(model)
        for name, local in local_names(model, self.quantization_config.linears).items():
            if local in changed:  # so that it is saved in its present format
                self.quantization_config.linears[name]["format"] = changed[local]
        self.locations = {}
        model.config.__dict__.pop("transformers_weights", None)
        self.quantization_config.index = None  # from here on, `save_pretrained` writes the usual names
        return model

    def _positions(self, name: str, tensor: Tensor, placing: bool) -> Tensor:
        """A packed tensor to check: from its file where positions are offloaded, or lie in values that were cast."""
        offloaded = tensor.is_meta and not tensor.is_floating_point()
        cast = placing and (tensor.is_meta or tensor.dtype != self.locations[name].dtype)
        return read_tensor(self.locations[name]) if offloaded or cast else tensor

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor] | None, dict]:
        """What `save_pretrained` writes: the tensors, and what makes transformers without the plug-in refuse them.

        That is a tensor of a wrong size under the name of a packed weight. A parameter of another size has the same
        effect. Where parameters were only added, a weight of the same module is written with one dimension more.
        """
        from budwood.checkpoints.reshaping import guarded

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        sentinel = self.substitution.missing_weight
        if sentinel is not None:
            return {**model.state_dict(), sentinel: torch.zeros(1)}, {}
        guard = guarded(model, self.substitution)
        if guard is not None:
            state = model.state_dict()
            return {**state, guard: state[guard][None]}, {}
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters of peft; packed weights themselves are not trained."""
        return True

    def dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        """The plain model of the same weights; without `dtype` they keep theirs, after any `.to()`.

        Where shapes differ from those of the configuration, the quantization config stays and holds them.
        """
        model = self._dequantize(model, dtype)
        if self.quantization_config.shapes:
            self.quantization_config.linears = {}
            model.is_quantized = False  # type: ignore[assignment]  # nothing is packed, so it may be trained
        else:
            self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        from budwood.checkpoints.substitution import restore

        restore(model, self.substitution, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
        return model


def is_head(name: str, model: "PreTrainedModel") -> bool:
    """Whether the linear `name` is outside the base model, which is then loaded without it."""
    return not name.startswith(f"{model.base_model_prefix}.")


def refuse_without_head(model: "PreTrainedModel", locations: dict[str, TensorLocation]) -> None:
    """Raises RunError where a model with a head is loaded from what was saved without one, and so at random.

    The files call it by whatever name, so tensors of its shape are counted: embeddings may have the same.
    """
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is None or model.base_model is model:
        return
    name = next((f"{path}.weight" for path, module in model.named_modules() if module is head), None)
    if name is None or name in model.all_tied_weights_keys:
        return
    shape = tuple(head.weight.shape)
    needed = 1 + (tuple(embeddings.weight.shape) == shape)
    if sum(location.shape == shape for location in locations.values()) < needed:
        raise RunError(
            f"the checkpoint holds no {name} for {type(model).__name__}, which would be random: it was saved from the "
            "base model; load it with AutoModel, or save the whole model (AutoModelForCausalLM)"
        )


def register() -> None:
    """Registers the plug-in with transformers; further calls have no effect."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(PackedConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(PackedQuantizer)
