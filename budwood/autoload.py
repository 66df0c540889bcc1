"""Registers the quantizer of packed checkpoints with transformers, by an import hook on its registry.

`install` is an entry point of the group `torch.backends`, which torch calls at the end of `import torch`; `import
budwood` calls it too. An exception in it would break `import torch`, so it raises none. It imports neither torch nor
transformers: the quantizer is registered when `transformers.quantizers.auto` is imported, or at once where it was
imported before. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` disables the entry point.
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
    """Finds the registry by the other finders, and wraps its loader to register the quantizer afterwards."""

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
    """The loader of the registry, which also registers the quantizer."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["loader"], name)  # get_source, get_filename, ... of the wrapped loader


def register() -> None:
    """Register the quantizer; a failure is logged, because transformers must work without budwood."""
    try:
        from budwood.checkpoints.quantizer import register as register_quantizer

        register_quantizer()
    except Exception as error:
        logger.warning("budwood checkpoints cannot be loaded by transformers here: %s", error)


def install() -> None:
    """Make plain `from_pretrained` load packed folders. Never raises; a second call has no effect."""
    try:
        registry = sys.modules.get(REGISTRY)
        if registry is not None and not getattr(registry.__spec__, "_initializing", False):
            register()
        elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, RegistryFinder())
    except Exception as error:
        logger.warning("budwood could not hook into transformers: %s", error)
