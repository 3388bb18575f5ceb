"""Names that a wrapper around the network put in front of its tensors, or between their parts.

``torch.compile`` inserts ``_orig_mod``, DistributedDataParallel and DeepSpeed ``module``, FSDP and activation
checkpointing names of their own, TRL ``pretrained_model``, peft ``base_model.model``. A state dict saved from inside
one loads nowhere else: transformers knows none of its names. The network is the same without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

_ANYWHERE = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
_IN_FRONT = ("module.", "pretrained_model.", "base_model.model.")
_BESIDE = ("v_head.",)
"""What TRL keeps beside the network that it wraps."""


def unwrapped_names(names: Collection[str]) -> dict[str, str]:
    """The names without their wrappers, by the name on disk; empty where there is none.

    A prefix counts as a wrapper only if every tensor has it. Names stay as they are where two would become one.
    """
    bare = {name: without_insertions(name) for name in names}
    while wrapper := _common_wrapper(bare.values()):
        bare = {name: inner.removeprefix(wrapper) for name, inner in bare.items()}
    changed = any(name != inner for name, inner in bare.items())
    return bare if changed and len(set(bare.values())) == len(bare) and all(bare.values()) else {}


def without_insertions(name: str) -> str:
    """The name without what wrappers insert between its parts."""
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)


def _common_wrapper(names: Iterable[str]) -> str | None:
    wrapped = [name for name in names if not name.startswith(_BESIDE)]
    return next((prefix for prefix in _IN_FRONT if wrapped and all(name.startswith(prefix) for name in wrapped)), None)


def describe(renamed: dict[str, str]) -> str:
    """One line for the user: what the names were, and that the wrapper is left out."""
    stored, bare = next((stored, bare) for stored, bare in renamed.items() if stored != bare)
    return f"tensors carry the names of a wrapper ({stored}), which no loader knows; read and written as {bare}."
