"""Results of audits as they stand in audit.json, small and made up."""

from __future__ import annotations

import copy
from typing import Any

WORST = {
    "d_star": 0.9,
    "interval": [0.85, 0.95],
    "protected": 0.2,
    "unprotected": 0.8,
    "without_victim": 0.15,
    "is_denominator_small": False,
}

PLAN = {
    "base": "<base> & more",
    "experts": [
        {"name": "mine", "path": "my model", "task": "mine"},
        {"name": "theirs", "path": "t", "task": "theirs"},
    ],
    "protect": {"expert": "mine", "methods": [{"name": "lock", "method": "mergelock", "settings": {"condition": 9}}]},
    "merges": ["ties"],
    "recoveries": ["kabsch"],
}


def document(**worst: Any) -> dict[str, Any]:
    """A small result; ``worst`` changes what was found about the protection."""
    best = {"recovery": None, "merge": "ties", "coefficients": [1.0, 0.5], "uses_victim": True, "cpu_seconds": 1.5}
    found = {**WORST, "rider": "theirs", "seed": 0, "attacks_tried": 7, "best": {"protected": best}, **worst}
    protection = {
        "is_control": False,
        "utility": {"expert": 0.9, "protected": 0.88, "loss": 0.02},
        "tiers": {"T0": {"worst": found, "trials": [found]}},
        "matrix": [{"recovery": None, "merge": "ties", "score": 0.2, "attacks": 7}],
        "fronts": [
            {
                "rider": "theirs",
                "seed": 0,
                "unprotected": [[0.8, 0.7], [0.5, 0.9]],
                "protected": [[0.2, 0.7]],
                "without_victim": [[0.1, 0.9]],
            }
        ],
    }
    control = {**copy.deepcopy(protection), "is_control": True}
    line = {"seed": 0, "recovery": None, "rider": "theirs", "share": [0.0, 1.0], "scores": {"mine": [0.1, 0.9]}}
    return {
        "plan": PLAN,
        "environment": {"unmergeable": "1"},
        "task": "mine",
        "kept_share": 0.95,
        "protections": {"identity": control, "scale": control, "lock": protection},
        "models": [{"protection": "lock", "recovery": "kabsch", "cpu_seconds": 2.0, "distance_before": None}],
        "connectivity": [{"protection": name, **line} for name in ("identity", "scale", "lock")],
        "controls": [{"name": "identity", "what": "x", "value": 0.0, "bound": 0.05, "passed": True}],
        "passed": True,
        "refused": [
            {"protection": "lock", "recovery": "kabsch", "merge": merge, "reason": "not that <structure>"}
            for merge in ("linear", "slerp")
        ],
        "cells": [],
    }


def analysed(**worst: Any) -> dict[str, Any]:
    """The same with analyses; a network that was taken apart has no loss at one point."""

    def model(protection: str, form: str, distance: float) -> dict[str, Any]:
        part = {"distance": distance, "expert_distance": 0.1, "norm_ratio": 10 * distance, "cosine": 0.5}
        kinds = ("query_key", "value_output", "feed_forward")
        return {
            "protection": protection,
            "seed": 0,
            "form": form,
            "parts": {
                "blocks": [{"block": f"{n}", "part": kind, **part} for n in range(12) for kind in kinds],
                "together": [{"block": "all", "part": kind, **part} for kind in kinds],
            },
            "lines": {
                "theirs": {
                    "positions": [0.0, 0.5, 1.0],
                    "losses": [2.0, None, 0.1],
                    "credits": [0.1, 0.2, 0.9],
                    "barrier": None,
                }
            },
            "scaling": {"positions": [0.0, 1.0], "losses": [2.0, 0.1], "credits": [0.1, 0.9]},
            "noise": {"sizes": [0.0, 0.1], "losses": [[0.1, 1.0]] * 2, "credits": [[0.9, 0.5], [0.9, 0.6]]},
            "sharpness": {"loss": 0.1, "radii": [0.01], "rises": [distance]},
            "landscape": {
                "xs": [-1.0, 0.0, 1.0],
                "ys": [-1.0, 2.0],
                "losses": [[1.0, 2.0, None], [3.0, 0.5, 9e9]],
                "credits": [[0.1, 0.2, 0.3], [0.1, 0.9, 0.1]],
                "places": {"base": [0.0, 0.0], "rider": [0.8, 0.0], "model": [0.1, 1.5]},
            },
            "landscape_rider": "theirs",
            "refused": {},
        }

    strange = {**model("strange", "raw", 1.0), "lines": {"theirs": None}}
    strange |= dict.fromkeys(("parts", "scaling", "noise", "sharpness", "landscape"))
    strange["refused"] = {"parts": "another <structure>", "line": "another <structure>"}
    place = {"y": 1.0, "off_plane": 0.5}
    points = [{"name": name, "x": x, **place} for name, x in (("base", 0.0), ("identity", 1.0), ("lock", 3.0))]
    models = [
        model(name, form, distance)
        for name, form, distance in (
            ("identity", "raw", 0.1),
            ("identity", "canonical", 0.1),
            ("lock", "raw", 30.0),
            ("lock", "canonical", 0.1),
        )
    ]
    return {
        **document(**worst),
        "analyses": {
            "task": "mine",
            "settings": {"examples": 100, "steps": 3},
            "models": [*models, strange],
            "maps": [
                {"form": "raw", "points": points, "shares": [0.9, 0.1], "refused": ""},
                {"form": "canonical", "points": None, "shares": None, "refused": "on one line"},
            ],
        },
    }
