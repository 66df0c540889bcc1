"""Teaches transformers to load packed checkpoints, without importing it: a hook that waits for its registry.

`install` is the entry point of group `torch.backends`, which torch calls at the end of `import torch`, and is
called by `import budwood`. An exception in it would break `import torch`, so nothing may leave it. It imports
nothing heavy: the work is done when `transformers.quantizers.auto` is imported, or at once when it already
is. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns the entry point off.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
logger = logging.getLogger(__name__)


class RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds the registry as the other finders do, and lets its loader register the quantizer afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != REGISTRY:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, RegistryFinder) else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = RegisteringLoader(spec.loader)
                return spec
        return None


class RegisteringLoader(importlib.abc.Loader):
    """The registry's own loader, and one step more."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["loader"], name)  # get_source, get_filename, ... stay what they were


def register() -> None:
    """Put the quantizer into the registry; a failure is logged, for transformers must work without us."""
    try:
        from budwood.checkpoints.quantizer import register as register_quantizer

        register_quantizer()
    except Exception as error:
        logger.warning("budwood checkpoints cannot be loaded by transformers here: %s", error)


def install() -> None:
    """Make plain `from_pretrained` load packed folders. Never raises; doing it twice is doing it once."""
    try:
        registry = sys.modules.get(REGISTRY)
        if registry is not None and not getattr(registry.__spec__, "_initializing", False):
            register()
        elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, RegistryFinder())
    except Exception as error:
        logger.warning("budwood could not prepare transformers: %s", error)
