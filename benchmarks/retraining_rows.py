"""The rows of the retraining benchmark: what prunes, and what follows it."""

from dataclasses import dataclass
from itertools import product

PATTERNS = ("2:4", "50%", "70%")
METHODS = ("magnitude", "wanda", "sparsegpt", "gblm")
EXTRAS = {
    "neighbours": "differences=0.3",
    "centred": 'differences=0.3, pairs="all"',
    "sensitivities": "sensitivities=True",
}
GLOBAL = {"perp vectors": "biases+norms", "perp masklora": "biases+norms+masklora"}


@dataclass(frozen=True)
class Row:
    """method: an expression with {steps} and {fit}, the steps of training and of a block's fit; None: the dense model.

    move: trained by `budwood retrain` after it. alone: the row of the same method without more. tokens: of calibration,
    where they are the row's own.
    """

    method: str | None
    move: str | None = None
    alone: str | None = None
    tokens: int | None = None


def main_rows() -> dict[str, Row]:
    """The table of methods by what follows them."""
    inner = {f"{name} {pattern}": f'{name}("{pattern}")' for pattern in PATTERNS for name in METHODS}
    inner["wrp 2:4"] = "wrp(alpha=0.25)"
    rows = {"dense": Row(None)}
    for name, method in inner.items():
        rows[name] = Row(method)
        rows[f"refit {name}"] = Row(f"refit({method})", alone=name)
        rows[f"sds {name}"] = Row(f"sds({method})", alone=name)
        rows[f"matched {name}"] = Row(f"matched({method}, steps={{fit}})", alone=name)
        rows[f"perp blocks {name}"] = Row(f'perp({method}, steps={{fit}}, reconstruct="block")', alone=name)
        for way, move in GLOBAL.items():
            rows[f"{way} {name}"] = Row(method, move=move, alone=name)
    return rows


def ablation_rows() -> dict[str, Row]:
    """graft's block fit: target, norms, steps, calibration tokens; and what changes its masks."""
    rows = {}
    bases = {"9.75": "bits=9.75", "9.0 free": 'bits=9.0, pattern="free"'}
    for (bits, base), tokens in product(bases.items(), (32768, 131072)):
        alone = f"graft {bits} {tokens // 1024}k"
        rows[alone] = Row(f"graft({base})", tokens=tokens)
        for name, given in EXTRAS.items():
            rows[f"{alone} {name}"] = Row(f"graft({base}, {given})", alone=alone, tokens=tokens)
        for target, norms, steps in product(("pruned", "dense", "0.5"), (True, False), (16, 64, 256)):
            given = target if target == "0.5" else f'"{target}"'
            move = "weights+biases+norms" if norms else "weights+biases"
            method = f'graft({base}, steps={steps}, target={given}, move="{move}")'
            name = f"{alone} {steps} steps, {target}, {'norms' if norms else 'no norms'}"
            rows[name] = Row(method, alone=alone, tokens=tokens)
    return rows


ROWS = main_rows() | ablation_rows()
