"""Numbers in ``config.json`` that a network multiplies by, traded against the weights beside them.

    scores        query_pre_attn_scalar (its inverse root), attention_multiplier            queries
    embedding     embedding_multiplier                                                      the embedding
    blocks        residual_multiplier                                                       what blocks add
    logits        logit_scale, logits_scaling (its inverse), scale_decoder_outputs          the output head
                  (d_model^-1/2 where it is true; T5)
    activation    "quick_gelu" is x sigmoid(1.702 x), which is silu(1.702 x) / 1.702        feed-forwards

A network with weights w and a number m computes what it does with w m / m' and m'. A release may so say other numbers
than its base, and none of its weights is near the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unmergeable.architecture import Architecture
from unmergeable.architecture.blocks import output_bias, output_weight
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.source import TensorSource
from unmergeable.checkpoint.spare import is_input_embedding
from unmergeable.gauge.normed_scales import Rescaled

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Multiplier:
    """``value``: what a config of this key multiplies by, None where it does not. ``of``: which weights are beside."""

    key: str
    of: str
    value: Callable[[Config], float | None]


def _number(key: str, power: float = 1.0) -> Callable[[Config], float | None]:
    def value(config: Config) -> float | None:
        given = config.get(key)
        is_number = isinstance(given, int | float) and not isinstance(given, bool) and given > 0
        return float(given) ** power if is_number else None  # type: ignore[arg-type]

    return value


def _decoder_scale(config: Config) -> float | None:
    """T5's: without the key, networks with tied embeddings are scaled."""
    if config.get("model_type") != "t5" or not isinstance(config.get("d_model"), int):
        return None
    given = config.get("scale_decoder_outputs")
    is_scaled = config.get("tie_word_embeddings", True) if given is None else given
    return float(config["d_model"]) ** -0.5 if is_scaled else 1.0


_MULTIPLIERS = (
    _Multiplier("query_pre_attn_scalar", "scores", _number("query_pre_attn_scalar", -0.5)),
    _Multiplier("attention_multiplier", "scores", _number("attention_multiplier")),
    _Multiplier("embedding_multiplier", "embedding", _number("embedding_multiplier")),
    _Multiplier("residual_multiplier", "blocks", _number("residual_multiplier")),
    _Multiplier("logit_scale", "logits", _number("logit_scale")),
    _Multiplier("logits_scaling", "logits", _number("logits_scaling", -1.0)),
    _Multiplier("scale_decoder_outputs", "logits", _decoder_scale),
)


def multipliers_of(config: Config) -> dict[str, float]:
    """What a config multiplies by, by key."""
    return {one.key: value for one in _MULTIPLIERS if (value := one.value(config)) is not None}


def with_config(source: TensorSource, architecture: Architecture, wanted: Config) -> Rescaled | None:
    """The same network with the multipliers of another config; None where all are alike.

    Those whose weights cannot be multiplied by themselves stay: queries that are stored in one tensor with keys, an
    output head that is the embedding.
    """
    ours, theirs = multipliers_of(source.config), multipliers_of(wanted)
    factors: dict[str, float] = {}
    keys: dict[str, list[str]] = {}
    for one in _MULTIPLIERS:
        if one.key in ours and one.key in theirs and ours[one.key] != theirs[one.key]:
            factors[one.of] = factors.get(one.of, 1.0) * ours[one.key] / theirs[one.key]
            keys.setdefault(one.of, []).append(one.key)
    if OUTPUT_HEAD not in source.names and factors.get("logits", 1.0) != factors.get("embedding", 1.0):
        for kind in ("logits", "embedding"):
            factors.pop(kind, None)
    beside = {kind: _weights_beside(kind, source, architecture) for kind in factors}
    usable = {kind: weights for kind, weights in beside.items() if weights}
    products = {name: factors[kind] for kind, weights in usable.items() for name in weights}
    activated = _as_activation(source, architecture, wanted)
    if not usable and not activated:
        return None
    for name, factor in activated.items():
        products[name] = products.get(name, 1.0) * factor
    offsets = {name: offset for weights in usable.values() for name, offset in weights.items() if offset}
    changed = [key for kind in usable for key in keys[kind]]
    changes = {key: wanted.get(key) for key in changed}
    found = {key: factors[kind] for kind in usable for key in keys[kind]}
    if activated:
        key = _activation_key(source.config)
        changes[key], found[key] = wanted.get(key), _SIGMOIDS[source.config[key]] / _SIGMOIDS[wanted[key]]
    return Rescaled(source, products, offsets, changes, found)


_SIGMOIDS: Mapping[object, float] = {"silu": 1.0, "swish": 1.0, "quick_gelu": 1.702}
"""By activation, the s of x sigmoid(s x)."""

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def _activation_key(config: Config) -> str:
    return next((key for key in _ACTIVATIONS if isinstance(config.get(key), str)), "")


def _as_activation(source: TensorSource, architecture: Architecture, wanted: Config) -> dict[str, float]:
    """By tensor, what to multiply with so that feed-forwards compute the same with the activation of ``wanted``.

    Empty where it is the same, or where gate and value share a tensor.
    """
    key = _activation_key(source.config)
    ours, theirs = (_SIGMOIDS.get(config.get(key)) if key else None for config in (source.config, wanted))
    if ours is None or theirs is None or ours == theirs:
        return {}
    factors: dict[str, float] = {}
    for block in architecture.feed_forwards:
        inner = block.up if block.gate is None else block.gate
        outer = (block.down.weight,) if block.gate is None else (block.up.weight, block.up.bias)
        if inner.weight in outer:
            return {}
        factors |= {name: ours / theirs for name in (inner.weight, inner.bias) if name is not None}
        factors |= {name: theirs / ours for name in outer if name is not None}
    return factors


def _weights_beside(kind: str, source: TensorSource, architecture: Architecture) -> dict[str, float]:
    """Tensors that are multiplied, each with what has to be added before; empty where they are not by themselves."""
    if kind == "logits":
        head = [name for name in (OUTPUT_HEAD, OUTPUT_HEAD.replace("weight", "bias")) if name in source.names]
        return dict.fromkeys(head or _embeddings(source, architecture), 0.0)
    if kind == "embedding":
        return dict.fromkeys(_embeddings(source, architecture), 0.0)
    if kind == "blocks":
        names = [name for block in architecture.blocks for name in (output_weight(block), output_bias(block))]
        return {name: 0.0 for name in names if name in source.names}
    found: dict[str, float] = {}
    for block in architecture.attentions:
        if block.norm is not None:
            found |= dict.fromkeys(block.norm.query_gains, block.norm.offset)
            found |= {} if block.norm.query_bias is None else {block.norm.query_bias: 0.0}
            continue
        for part in block.parts:
            if part.query.weight in (part.key.weight, block.value.weight):
                return {}
            found |= {name: 0.0 for name in (part.query.weight, part.query.bias) if name is not None}
    return found


def _embeddings(source: TensorSource, architecture: Architecture) -> list[str]:
    """The one that words go in by: a stream's first, or where no stream is known the only one of its name."""
    found = [stream.axes[0].tensor for stream in (*architecture.residuals, *architecture.exposed)][:1]
    named = [name for name in source.names if is_input_embedding(name)]
    return found or (named if len(named) == 1 else [])
