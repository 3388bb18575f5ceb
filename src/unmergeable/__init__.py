"""Protect an open-weight transformer against merging, restore it, attack it, and say what the protection is worth.

    from pathlib import Path
    import unmergeable

    unmergeable.protect(Path("my-finetune"), base=Path("the-base"), out=Path("release"), key=Path("release.key"))

The functions below are the whole public interface; ``unmergeable.errors`` holds what they raise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmergeable.evaluation import Audit, audit
    from unmergeable.ops import inspect, merge, methods, protect, recover, restore, schema, verify

__all__ = ["Audit", "audit", "inspect", "merge", "methods", "protect", "recover", "restore", "schema", "verify"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import, and `unmergeable --help` does not need it.
    if name in ("Audit", "audit"):
        from unmergeable import evaluation

        return getattr(evaluation, name)
    if name in __all__:
        from unmergeable import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'unmergeable' has no attribute {name!r}")
