"""Prune large language models to smaller files and faster models.

The public names are imported on first use, so that `import budwood` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from budwood.autoload import install

if TYPE_CHECKING:
    from budwood import methods as methods
    from budwood.benchmarking import bench as bench
    from budwood.checkpoints.loading import load as load
    from budwood.comparison.compare import compare as compare
    from budwood.evaluation.evaluate import evaluate as evaluate
    from budwood.finetuning import sparse_lora as sparse_lora
    from budwood.methods import METHODS as METHODS
    from budwood.pages.page import report as report
    from budwood.planning import plan as plan
    from budwood.pruning import prune as prune
    from budwood.repacking import repack as repack
    from budwood.retraining import retrain as retrain
    from budwood.runs.recipe import recipe_options as recipe_options

__version__ = "0.1.0"

PUBLIC = {  # name -> module that defines it
    "METHODS": "budwood.methods",
    "bench": "budwood.benchmarking",
    "compare": "budwood.comparison.compare",
    "evaluate": "budwood.evaluation.evaluate",
    "load": "budwood.checkpoints.loading",
    "plan": "budwood.planning",
    "prune": "budwood.pruning",
    "recipe_options": "budwood.runs.recipe",
    "repack": "budwood.repacking",
    "report": "budwood.pages.page",
    "retrain": "budwood.retraining",
    "sparse_lora": "budwood.finetuning",
}

__all__ = [
    "METHODS",
    "__version__",
    "bench",
    "compare",
    "evaluate",
    "load",
    "methods",
    "plan",
    "prune",
    "recipe_options",
    "repack",
    "report",
    "retrain",
    "sparse_lora",
]

install()


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("budwood.methods")
    if name not in PUBLIC:
        raise AttributeError(f"module 'budwood' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
