"""The conditions that every result records."""

from datetime import UTC, datetime

import torch

from budwood.environment import installed, machine
from budwood.reports.results import Conditions
from budwood.stream.arithmetic import name_of


def conditions(dtype: torch.dtype, device: torch.device, *packages: str) -> Conditions:
    """Those of this process now. packages: further ones whose versions matter."""
    return Conditions(
        dtype=name_of(dtype),
        device=device.type,
        machine=machine(),
        versions={name: installed(name) for name in ("budwood", "torch", "transformers", *packages)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
