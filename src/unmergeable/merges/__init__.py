"""Merges: one file per method, and the engine that runs any of them on files or in memory."""

from unmergeable.merges.adamerging import AdaMerging
from unmergeable.merges.base import Merge
from unmergeable.merges.breadcrumbs import Breadcrumbs
from unmergeable.merges.consensus_ta import ConsensusTa
from unmergeable.merges.dare_linear import DareLinear
from unmergeable.merges.dare_ties import DareTies
from unmergeable.merges.della import Della
from unmergeable.merges.engine import merge, merge_state_dicts
from unmergeable.merges.fisher import Fisher
from unmergeable.merges.iso_c import IsoC
from unmergeable.merges.linear import Linear
from unmergeable.merges.model_stock import ModelStock
from unmergeable.merges.regmean import RegMean
from unmergeable.merges.slerp import Slerp
from unmergeable.merges.soup import Soup
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
    Fisher,
    RegMean,
    Soup,
    AdaMerging,
)

MERGES: dict[str, type[Merge]] = {method.name: method for method in _METHODS}
"""Every merge method by the name it has on the command line."""

__all__ = [
    "MERGES",
    "AdaMerging",
    "Breadcrumbs",
    "ConsensusTa",
    "DareLinear",
    "DareTies",
    "Della",
    "Fisher",
    "IsoC",
    "Linear",
    "Merge",
    "ModelStock",
    "RegMean",
    "Slerp",
    "Soup",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Variation",
    "merge",
    "merge_state_dicts",
]
