"""From a config and the tensors on disk to an architecture, or a refusal that names the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import output_bias
from unmergeable.architecture.declare import Config, Names
from unmergeable.architecture.derived import architecture_of, known_map, shipped
from unmergeable.architecture.families import FAMILIES
from unmergeable.architecture.rules import possible_lengths
from unmergeable.errors import UnsupportedArchitecture

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads")


def detect(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a checkpoint.

    Args:
        config: the parsed ``config.json``.
        shapes: shape of every tensor, by on-disk name.

    Raises:
        UnsupportedArchitecture: no family for this model, a tensor its family does not know, one that is
            missing, or one of another shape than the config implies. The message names it.
    """
    kind = str(config.get("model_type") or config.get("_class_name") or "")
    declare = _declaration(kind)
    _require_possible_counts(config, shapes)
    try:
        architecture = declare(config, Names(shapes))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Families read sizes from the config and shapes without asking whether they are numbers that fit.
        raise UnsupportedArchitecture(
            f"config.json of this {kind} model holds a size that cannot be read or does not fit ({error}); "
            "it is damaged, or not the one these weights came with."
        ) from error
    _require_shapes(kind, architecture, shapes)
    _require_all_claimed(kind, architecture, shapes)
    return architecture


def _declaration(kind: str) -> Callable[[Config, Names], Architecture]:
    """What reads a checkpoint of this model type: the family declared by hand, or else the derived map."""
    if kind in FAMILIES:
        return FAMILIES[kind].declare
    derived = known_map(kind)
    if derived is not None:
        return partial(architecture_of, derived)
    known = ", ".join(sorted(FAMILIES))
    raise UnsupportedArchitecture(
        f"model type {kind or 'missing from config.json'}: no symmetry map. Known: {known}, and {len(shipped())} with "
        "a derived map; `unmergeable map` derives one."
    )


def _require_possible_counts(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse counts that families would go through one by one, before they do: memory would end first."""
    longest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    most = {
        **dict.fromkeys(_LAYER_COUNTS, (len(shapes), "tensors")),
        **dict.fromkeys((*_EXPERT_COUNTS, *_HEAD_COUNTS), (longest, "rows")),
    }
    for section in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name, (limit, what) in most.items():
            count = _count(section.get(name))
            if count > limit:
                raise UnsupportedArchitecture(
                    f"config.json: {name} is {min(count, 10**15):,}, but the weights have {limit:,} {what}; it is "
                    "damaged, or not the one these weights came with."
                )


def _count(value: object) -> int:
    """A count as families read it, who take ``int`` of numbers and of text alike; 0 for what is none."""
    if not isinstance(value, int | float | str):
        return 0
    try:
        return int(value)
    except (ValueError, OverflowError):
        return 0  # the family will say so


def _require_shapes(kind: str, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, axes in possible_lengths(architecture.symmetry).items():
        shape = shapes.get(name)
        if shape is None:
            raise UnsupportedArchitecture(
                f"tensor {name} is missing, which a {kind} model of this config has; is the checkpoint complete?"
            )
        for axis, lengths in axes.items():
            if len(shape) <= axis or shape[axis] not in lengths:
                raise UnsupportedArchitecture(
                    f"tensor {name} has shape {list(shape)}, but config.json implies {min(lengths)} along axis {axis}; "
                    "config.json and weights do not belong together."
                )


def _require_all_claimed(kind: str, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    owned = set(architecture.symmetry.legs) | {output_bias(block) for block in architecture.blocks}
    untouched = re.compile("|".join(f"(?:{pattern})" for pattern in architecture.untouched))
    for name in shapes:
        if name not in owned and untouched.fullmatch(name) is None:
            raise UnsupportedArchitecture(
                f"tensor {name} has no place in the symmetry map of {kind}; changing the tensors around it could break "
                "the model, so nothing is done. Please report the model."
            )
