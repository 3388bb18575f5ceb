"""Protect an open-weight transformer against merging, restore it, attack it, and say what the protection is worth.

    import unmergeable

    unmergeable.protect("my-finetune", base="the-base", out="release", key="release.key")

Besides the functions here, ``unmergeable.merges`` and ``unmergeable.attacks`` have every merge and every attack as a
function of state dicts; ``unmergeable.protections``, ``unmergeable.evaluation``, ``unmergeable.tasks`` and
``unmergeable.data`` what methods and audits are made of. ``unmergeable.errors`` holds what all of them raise. What is
not exported by one of these is private.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmergeable import attacks as attacks
    from unmergeable import data as data
    from unmergeable import evaluation as evaluation
    from unmergeable import merges as merges
    from unmergeable import protections as protections
    from unmergeable import tasks as tasks
    from unmergeable.attacks import register_attack
    from unmergeable.evaluation import Audit, audit
    from unmergeable.merges import register_merge
    from unmergeable.ops import (
        change_passphrase,
        derive_map,
        inspect,
        merge,
        protect,
        protect_state_dict,
        push,
        recover,
        restore,
        restore_state_dict,
        rotate,
        show_key,
        verify,
        verify_manifest,
    )
    from unmergeable.ops.methods import methods, schema
    from unmergeable.protections import register_protection

__all__ = [
    "Audit",
    "audit",
    "change_passphrase",
    "derive_map",
    "inspect",
    "merge",
    "methods",
    "protect",
    "protect_state_dict",
    "push",
    "recover",
    "register_attack",
    "register_merge",
    "register_protection",
    "restore",
    "restore_state_dict",
    "rotate",
    "schema",
    "show_key",
    "verify",
    "verify_manifest",
]

_HOMES = {
    "Audit": "evaluation",
    "audit": "evaluation",
    "register_attack": "attacks",
    "register_merge": "merges",
    "register_protection": "protections",
}
_PACKAGES = ("attacks", "data", "evaluation", "merges", "protections", "tasks")


def __getattr__(name: str) -> Any:
    # torch takes a second to import, and `unmergeable --help` does not need it.
    if name in _PACKAGES:
        return importlib.import_module(f"unmergeable.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"unmergeable.{_HOMES.get(name, 'ops')}"), name)
    raise AttributeError(f"module 'unmergeable' has no attribute {name!r}")
