"""Protect an open-weight transformer against merging, restore it, attack it, and say what the protection is worth.

    import unmergeable

    unmergeable.protect("my-finetune", base="the-base", out="release", key="release.key")

The functions below are the whole public interface; ``unmergeable.errors`` holds what they raise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmergeable.evaluation.run import audit
    from unmergeable.ops import (
        inspect,
        merge,
        methods,
        protect,
        protect_state_dict,
        recover,
        restore,
        restore_state_dict,
        schema,
        verify,
    )
    from unmergeable.protections import register_protection

__all__ = [
    "audit",
    "inspect",
    "merge",
    "methods",
    "protect",
    "protect_state_dict",
    "recover",
    "register_protection",
    "restore",
    "restore_state_dict",
    "schema",
    "verify",
]


def __getattr__(name: str) -> Any:
    # torch takes a second to import, and `unmergeable --help` does not need it.
    if name == "audit":
        from unmergeable.evaluation.run import audit

        return audit
    if name == "register_protection":
        from unmergeable.protections import register_protection

        return register_protection
    if name in __all__:
        from unmergeable import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'unmergeable' has no attribute {name!r}")
