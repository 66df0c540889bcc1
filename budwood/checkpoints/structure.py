"""What a model consists of, known without its weights: blocks, matrices in scope, the rest."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from budwood.checkpoints.meta_model import MODULES, at_most, build, reason_of
from budwood.checkpoints.trial import Trial
from budwood.errors import BudwoodError, UsageError
from budwood.models.blocks import find_blocks
from budwood.models.experts import LINEAR, split_fused, unfuse
from budwood.models.linears import prunable, read, routers
from budwood.models.units import candidates, fit_shapes
from budwood.sparsity.units import Units


class ModelStructure:
    """A model on meta with its parts named.

    module: the model, experts as plain linears. path, modules: the decoder blocks. linears: the matrices in scope by
    full name. fused: all tensors on meta by name, as files in module names hold them: experts fused, except where
    one of them has a shape of its own. trial: the configuration, to be changed and tried. shapes: of parameters (full
    name: shape as the module stores it) that differ from those of `config`, or that it does not give.
    Raises UsageError for models that are not decoders and for bad `skip` expressions, RunError for `shapes` of a
    module that the model does not have.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        compute: torch.dtype = torch.float32,
        skip: Sequence[str] = (),
        trust_remote_code: bool = False,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        self.trial = Trial(type(config), config.to_dict(), trust_remote_code)
        self.compute, self.skip = compute, skip
        self.module = _built(config, compute, trust_remote_code)
        described = self.module.state_dict()
        with at_most(MODULES):
            experts = unfuse(self.module)
        fit_shapes(self.module, shapes_unfused(shapes or {}))
        self.fused = tensors_in_files(described, self.module.state_dict(), experts, shapes or {})
        self.parameters = sum(parameter.numel() for parameter in self.module.parameters())
        self.path, self.modules = find_blocks(self.module)
        self.linears = prunable(self.module, skip)
        self._routers = routers(self.modules, self.path)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return len(self.module.get_input_embeddings().get_parameter("weight"))

    def check_scope(self) -> None:
        """UsageError where there is nothing to prune."""
        if not self.linears:
            skipped = "--skip names every matrix, so nothing is left to prune; skip fewer"
            raise UsageError(skipped if self.skip else "the blocks of this model have no matrix that can be pruned")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every matrix in scope, by full name."""
        return {name: shape_of(module) for name, module in self.linears.items()}

    @property
    def shapes_in_files(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all stored tensors as files in module names hold them, by full name."""
        return {name: tuple(tensor.shape) for name, tensor in self.fused.items()}

    @property
    def units(self) -> dict[str, dict[str, Units]]:
        """What can be removed of every block as far as its shapes tell: by full name of the block, by consumer."""
        return {
            f"{self.path}.{index}": {name: options[0] for name, options in self.unit_options(index).items()}
            for index in range(len(self.modules))
        }

    def unit_options(self, index: int) -> dict[str, list[Units]]:
        """The possible units of block `index` by consumer, where all their linears are in scope; see `candidates`."""
        prefix = f"{self.path}.{index}."
        routers = [name.removeprefix(prefix) for name in self._routers if name.startswith(prefix)]
        return {
            name: options
            for name, options in candidates(self.modules[index], routers).items()
            if all(prefix + linear in self.linears for linear in options[0].linears)
        }

    @property
    def in_scope(self) -> int:
        """Weights in the matrices in scope."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def _built(config: PretrainedConfig, compute: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model on meta; UsageError where transformers cannot build what config.json says."""
    try:
        return build(config, compute, trust_remote_code)
    except BudwoodError:
        raise
    except Exception as error:  # models fail on wrong fields in every way
        raise UsageError(
            f"config.json describes no model that transformers can build ({type(error).__name__}: {reason_of(error)}); "
            "correct it, or fetch it again"
        ) from error


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """[out, in]"""
    rows, columns = read(linear).shape
    return rows, columns


def shapes_unfused(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes by parameter, those of fused experts as shapes of plain linears."""
    return {
        name: tuple(part.shape)
        for whole, shape in shapes.items()
        for name, part in split_fused(whole, torch.empty(tuple(shape), device="meta")).items()
    }


def tensors_in_files(
    described: Mapping[str, Tensor],
    unfused: Mapping[str, Tensor],
    experts: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """All tensors of a model on meta by the names they have in files.

    described: those that its configuration gives, experts fused. unfused: those that it has, experts as plain
    linears. experts: paths of the experts. shapes: those that the configuration does not give.
    """
    separate = {path for path in experts if any(LINEAR.fullmatch(name.removeprefix(f"{path}.")) for name in shapes)}
    fused = [f"{path}." for path in experts if path not in separate]
    tensors = {name: tensor for name, tensor in unfused.items() if not name.startswith(tuple(fused))}
    for name, tensor in described.items():
        if name.startswith(tuple(fused)):
            tensors[name] = tensor.new_empty(tuple(shapes[name])) if name in shapes else tensor
    return tensors
