"""Merges: one file per method, and the engine that runs any of them on files or in memory."""

from unmergeable.merges.breadcrumbs import Breadcrumbs
from unmergeable.merges.consensus_ta import ConsensusTa
from unmergeable.merges.dare_linear import DareLinear
from unmergeable.merges.dare_ties import DareTies
from unmergeable.merges.della import Della
from unmergeable.merges.engine import merge, merge_state_dicts
from unmergeable.merges.iso_c import IsoC
from unmergeable.merges.linear import Linear
from unmergeable.merges.method import Merge
from unmergeable.merges.model_stock import ModelStock
from unmergeable.merges.slerp import Slerp
from unmergeable.merges.task_arithmetic import TaskArithmetic
from unmergeable.merges.ties import Ties
from unmergeable.merges.tsv_m import TsvM
from unmergeable.merges.variation import Variation

_METHODS: tuple[type[Merge], ...] = (
    Linear,
    Slerp,
    TaskArithmetic,
    Ties,
    DareLinear,
    DareTies,
    Della,
    Breadcrumbs,
    ModelStock,
    ConsensusTa,
    TsvM,
    IsoC,
)

MERGES: dict[str, type[Merge]] = {method.name: method for method in _METHODS}
"""Every merge method by the name it has on the command line."""

__all__ = [
    "MERGES",
    "Breadcrumbs",
    "ConsensusTa",
    "DareLinear",
    "DareTies",
    "Della",
    "IsoC",
    "Linear",
    "Merge",
    "ModelStock",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Variation",
    "merge",
    "merge_state_dicts",
]
