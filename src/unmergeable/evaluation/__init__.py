"""Evaluation: what a protection is worth against an attacker who knows about it, and why.

    audit, Audit, AuditResult          the worst case over a menu of attacks, with controls
    table, TableResult                 merges with published settings, as a paper's table has them
    write_report, model_card           an audit as a page, and as a block for a model card
    release_card                       the section of a release's card: what was done, what it is worth
    connectivity, landscape, ...       what weights look like from outside

An audit starts in :mod:`unmergeable.evaluation.audits`; the measure is in :mod:`unmergeable.evaluation.worst_case`.
"""

# ruff: noqa: F405 (analysis lists its own names)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmergeable.evaluation.analysis import *  # noqa: F403
    from unmergeable.evaluation.audits import Audit, audit, estimate_audit
    from unmergeable.evaluation.cards import release_card
    from unmergeable.evaluation.estimate import Estimate
    from unmergeable.evaluation.released import audit_of_releases
    from unmergeable.evaluation.report.page import render_report, write_report
    from unmergeable.evaluation.report.verdict import model_card, summary
    from unmergeable.evaluation.results import AuditResult, read_audit
    from unmergeable.evaluation.table_results import TableResult
    from unmergeable.evaluation.tables import table
    from unmergeable.evaluation.threat_models import ThreatModel

__all__ = [
    "Audit", "AuditResult", "Backpropagate", "CanonicalSource", "Curve", "Estimate", "Landscape",
    "NoiseSensitivity", "PartGram", "Place", "Plane", "Score", "Scored", "Sharpness", "TableResult", "ThreatModel",
    "audit", "audit_of_releases", "backpropagate_task", "barrier", "canonical_source", "connectivity",
    "estimate_audit", "grid", "landscape", "model_card", "noise_sensitivity", "part_grams", "plane_through",
    "principal_plane", "read_audit", "release_card", "render_report", "scaling", "score_task", "sharpness", "summary",
    "table", "taken_together", "task_vector_gram", "write_report",
]  # fmt: skip

_HOMES = {
    "Audit": "audits",
    "AuditResult": "results",
    "TableResult": "table_results",
    "ThreatModel": "threat_models",
    "Estimate": "estimate",
    "audit": "audits",
    "audit_of_releases": "released",
    "estimate_audit": "audits",
    "model_card": "report.verdict",
    "read_audit": "results",
    "release_card": "cards",
    "render_report": "report.page",
    "summary": "report.verdict",
    "table": "tables",
    "write_report": "report.page",
}
"""Modules of what is not in ``analysis``."""


def __getattr__(name: str) -> Any:
    # A worker that needs one module should not load all.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'analysis')}"), name)
