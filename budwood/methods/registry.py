"""All methods by name. A new method is a file and a line here."""

from budwood.methods.allocate import Allocate
from budwood.methods.alps import Alps
from budwood.methods.dense import Dense
from budwood.methods.drop_blocks import DropBlocks
from budwood.methods.flap import Flap
from budwood.methods.gblm import Gblm
from budwood.methods.graft import Graft
from budwood.methods.llm_pruner import LLMPruner
from budwood.methods.loraprune import LoRAPrune
from budwood.methods.magnitude import Magnitude
from budwood.methods.magnitude_sp import MagnitudeSp
from budwood.methods.matched import Matched
from budwood.methods.method import Method
from budwood.methods.perp import Perp
from budwood.methods.reap import Reap
from budwood.methods.refit import Refit
from budwood.methods.sds import Sds
from budwood.methods.sparsegpt import SparseGPT
from budwood.methods.tyr import Tyr
from budwood.methods.wanda import Wanda
from budwood.methods.wanda_sp import WandaSp
from budwood.methods.wrp import Wrp

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "wrp": Wrp,
    "refit": Refit,
    "alps": Alps,
    "graft": Graft,
    "allocate": Allocate,
    "reap": Reap,
    "drop_blocks": DropBlocks,
    "flap": Flap,
    "wanda_sp": WandaSp,
    "magnitude_sp": MagnitudeSp,
    "gblm": Gblm,
    "matched": Matched,
    "sds": Sds,
    "llm_pruner": LLMPruner,
    "loraprune": LoRAPrune,
    "perp": Perp,
    "tyr": Tyr,
    "dense": Dense,
}
