"""Merges: one file per method, and the engine that runs any of them on files or in memory.

Every method is a function of state dicts, or of live networks, under its own name:

    from unmergeable import merges

    merged = merges.ties(base, [mathematician, programmer], density=0.2)
    merged = merges.task_arithmetic(base, [mathematician, programmer], coefficients=[0.5, 0.5])

and a frozen dataclass of settings, for :func:`merge_state_dicts` and for :func:`merge` on files. A method of another
package derives from :class:`Merge` and is added with :func:`register_merge`, or by an entry point of the group
``unmergeable.merges``.
"""

from unmergeable.merges.adamerging import AdaMerging, adamerging
from unmergeable.merges.adarank import AdaRank, adarank
from unmergeable.merges.arcee_fusion import ArceeFusion, arcee_fusion
from unmergeable.merges.base import Inputs, Merge, TensorMerge, TermsOf
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, merge_whole
from unmergeable.merges.breadcrumbs import Breadcrumbs, breadcrumbs
from unmergeable.merges.breadcrumbs_ties import BreadcrumbsTies, breadcrumbs_ties
from unmergeable.merges.consensus_ta import ConsensusTa, consensus_ta
from unmergeable.merges.dare_linear import DareLinear, dare_linear
from unmergeable.merges.dare_ties import DareTies, dare_ties
from unmergeable.merges.della import Della, della
from unmergeable.merges.della_linear import DellaLinear, della_linear
from unmergeable.merges.engine import merge, merge_state_dicts
from unmergeable.merges.fisher import Fisher, fisher
from unmergeable.merges.iso_c import IsoC, iso_c
from unmergeable.merges.karcher import Karcher, karcher
from unmergeable.merges.linear import Linear, linear
from unmergeable.merges.model_stock import ModelStock, model_stock
from unmergeable.merges.multislerp import MultiSlerp, multislerp
from unmergeable.merges.nearswap import NearSwap, nearswap
from unmergeable.merges.nuslerp import NuSlerp, nuslerp
from unmergeable.merges.ram import Ram, ram
from unmergeable.merges.regmean import RegMean, regmean
from unmergeable.merges.sce import Sce, sce
from unmergeable.merges.slerp import Slerp, slerp
from unmergeable.merges.soup import Soup, soup
from unmergeable.merges.task_arithmetic import TaskArithmetic, task_arithmetic
from unmergeable.merges.ties import Ties, ties
from unmergeable.merges.tsv_m import TsvM, tsv_m
from unmergeable.merges.variation import Variation
from unmergeable.merges.vocabularies import Tokenizer, TokenSource
from unmergeable.merges.wudi import Wudi, wudi
from unmergeable.registry import Registry, Requirements
from unmergeable.settings import configure

MERGES = Registry(
    "merge",
    "unmergeable.merges",
    (
        Linear,
        Slerp,
        NuSlerp,
        MultiSlerp,
        Karcher,
        TaskArithmetic,
        Ties,
        DareLinear,
        DareTies,
        Della,
        DellaLinear,
        Breadcrumbs,
        BreadcrumbsTies,
        ModelStock,
        NearSwap,
        ArceeFusion,
        Ram,
        Sce,
        ConsensusTa,
        TsvM,
        IsoC,
        Wudi,
        Fisher,
        RegMean,
        Soup,
        AdaMerging,
        AdaRank,
    ),
)
"""Every merge method by the name it has on the command line, those of other packages included."""

register_merge = MERGES.register


def merge_method(name: str, /, **settings: object) -> Merge:
    """The merge called ``name`` with these settings, for :func:`merge_state_dicts`.

    Raises:
        UsageError: there is no such merge, or it has no such setting or value; with the nearest name.
    """
    method: Merge = configure(MERGES.require(name), settings)
    return method


__all__ = [
    "MERGES",
    "AdaMerging",
    "AdaRank",
    "ArceeFusion",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "ConsensusTa",
    "DareLinear",
    "DareTies",
    "Della",
    "DellaLinear",
    "Fisher",
    "Inputs",
    "IsoC",
    "Karcher",
    "Linear",
    "Merge",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "Operand",
    "Ram",
    "RegMean",
    "Requirements",
    "Sce",
    "Scratch",
    "Slerp",
    "Soup",
    "TaskArithmetic",
    "TensorMerge",
    "TermsOf",
    "Ties",
    "TokenSource",
    "Tokenizer",
    "TsvM",
    "Variation",
    "Wudi",
    "adamerging",
    "adarank",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "iso_c",
    "karcher",
    "linear",
    "merge",
    "merge_blocks",
    "merge_method",
    "merge_state_dicts",
    "merge_whole",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "register_merge",
    "regmean",
    "sce",
    "slerp",
    "soup",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]
