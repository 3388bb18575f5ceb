"""What an adapter changes of a network besides the values of its weights: tied weights part, a new head takes over.

peft wraps an embedding that is saved whole, and the head that was tied to it stays what it was. Merged, the two differ,
and peft's ``config.json`` says so (``tie_word_embeddings: false``). A low-rank update of one of the two would be merged
into the weight they share and so change both, which is not what the adapter computes: refused.

An adapter for classification is trained in another class than the base's; the merged network is of that class, with
the adapter's head and without the base's. One for embeddings is trained in the network without any head, which its keys
tell: the merged network has none either, and its features are what it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unmergeable.checkpoint.adapter.file import AdapterFile
from unmergeable.checkpoint.adapter.matching import Changes
from unmergeable.checkpoint.adapter.names import Names
from unmergeable.checkpoint.adapter.settings import MERGE_WITH_PEFT, AdapterSettings
from unmergeable.checkpoint.adapter.skeleton import TASK_CLASSES, Skeleton, task_class
from unmergeable.checkpoint.adapter.updates import Rows, Update
from unmergeable.checkpoint.index import TensorSpec
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, CheckpointError, Mismatch, UsageError

_UNTIED = {"tie_word_embeddings": False}

# T5 and its kin multiply by 1/sqrt(d) before a head that is tied, and not before one that is not.
_SCALES_WHAT_IS_TIED = ("t5", "udop", "switch_transformers")
_SUFFIXES = {name: name.removeprefix("AutoModel") for name in TASK_CLASSES.values()}
_WITHOUT_HEAD = ("FEATURE_EXTRACTION", "")
_LABELS_TRIED = 1009  # a number of labels that no other axis has


@dataclass(frozen=True)
class Outcome:
    """A base with an adapter merged into it, by names on disk.

    Attributes:
        updates, replacements: as in :class:`~unmergeable.checkpoint.adapter.matching.Changes`; replacements include
            tensors that the base lacks.
        copies: tensors that are another tensor of the base, as it is stored.
        dropped: tensors of the base that the merged network has not.
        config_changes: what differs in ``config.json``.
    """

    updates: Mapping[str, Update]
    replacements: Mapping[str, str]
    copies: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def trained_class(config: Mapping[str, Any], settings: AdapterSettings) -> str:
    """The network class that the adapter was trained in: its task's, or else the base's.

    Raises:
        UsageError: it takes transformers to tell, which is not installed.
        BadInput: transformers has no such class, or the base names none.
    """
    own = _own_class(config)
    if settings.task in TASK_CLASSES and not own.endswith(_SUFFIXES[TASK_CLASSES[settings.task]]):
        return task_class(config, settings.task)
    if any(settings.network_class.endswith(head) and not own.endswith(head) for head in _SUFFIXES.values()):
        return settings.network_class
    return own or settings.network_class or task_class(config, settings.task)


def _own_class(config: Mapping[str, Any]) -> str:
    return str(next(iter(config.get("architectures") or ()), ""))


def settle(
    adapter: AdapterFile, base: TensorSource, settings: AdapterSettings, names: Names, changes: Changes
) -> Outcome:
    """Decide what becomes of tied weights, of the head, and of tensors that the base lacks.

    Raises:
        Mismatch: a tensor that the network has no place for.
        CheckpointError: an adapter whose merge would not compute what the adapter computes.
    """
    unknown = dict(changes.unknown)
    if settings.task in _WITHOUT_HEAD and not unknown and (backbone := _backbone(base, names, changes)) is not None:
        _require_matched(adapter, base, changes)
        return _without_head(adapter, base, names, changes, backbone)
    name = trained_class_or_none(base.config, settings)
    if name is not None and name != _own_class(base.config) and name.endswith(tuple(_SUFFIXES.values())):
        _require_matched(adapter, base, changes)
        return _with_another_head(adapter, base, names, changes, unknown)
    copies, config_changes = _untie(adapter, base, names, changes, unknown)
    _require_matched(adapter, base, changes)
    replacements = dict(changes.replacements)
    for target, key in unknown.items():
        replacements[_new_name(adapter, base, settings, names, target)] = key
    return Outcome(changes.updates, replacements, copies, config_changes=config_changes)


def trained_class_or_none(config: Mapping[str, Any], settings: AdapterSettings) -> str | None:
    """As :func:`trained_class`; None where nobody knows."""
    try:
        return trained_class(config, settings)
    except (BadInput, UsageError):
        if settings.task in TASK_CLASSES and config.get("architectures"):
            raise
        return None


def _require_matched(adapter: AdapterFile, base: TensorSource, changes: Changes) -> None:
    for name in changes.unmatched:
        module = name.removesuffix(".weight")
        raise Mismatch(
            f"{adapter.name}: module {module!r} matches no tensor of {base.description}; pass the base it was trained "
            f"on, or {MERGE_WITH_PEFT}."
        )


def _new_name(adapter: AdapterFile, base: TensorSource, settings: AdapterSettings, names: Names, target: str) -> str:
    module = target.rpartition(".")[0]
    is_saved = any(f".{saved}." in f".{module}." for saved in settings.modules_to_save)
    skeleton = names.skeleton
    # Without a class that says what it holds, a new head is believed; a new output layer would be tied and ignored.
    believed = skeleton is None and is_saved and module.rpartition(".")[2] not in ("lm_head", "embed_out")
    if believed or (skeleton is not None and skeleton.disk_name(target) is not None):
        return names.on_disk(target)
    raise Mismatch(
        f"{adapter.name}: {target!r} matches no tensor of {base.description}; pass the base it was trained on, or "
        f"{MERGE_WITH_PEFT}."
    )


# Tied weights


def _untie(
    adapter: AdapterFile, base: TensorSource, names: Names, changes: Changes, unknown: dict[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Copies of tied weights that part, and the config that says so; takes out of ``unknown`` what is settled."""
    tied = _tied(base, names, changes, unknown)
    for head, embedding in tied.items():
        stored = names.match(embedding)
        if stored is None:
            continue
        at_head = names.match(head)  # a copy that loading ignores
        updates = [changes.updates[place] for place in (stored, at_head) if place in changes.updates]
        saved_head = unknown.pop(head, None) or (changes.replacements.pop(at_head, None) if at_head else None)
        saved = changes.replacements.get(stored)
        of_head = [changes.unmatched.pop(head)] if head in changes.unmatched else []
        if any(not isinstance(update, Rows) for update in (*updates, *of_head)):
            raise _parted(adapter, head, embedding)
        if any(not _same_rows(adapter, rows, changes.updates.get(stored)) for rows in of_head):
            raise _parted(adapter, head, embedding)
        if updates and saved_head is not None:
            raise _parted(adapter, head, embedding)
        if saved_head is None and saved is None:
            continue
        if saved_head is not None and saved is not None and _equal(adapter, saved_head, saved):
            continue
        model_type = str(base.config.get("model_type"))
        if any(kind in model_type for kind in _SCALES_WHAT_IS_TIED) or len(tied) > 1:
            raise _parted(adapter, head, embedding)
        shape = base.spec(stored).shape
        if saved_head is not None and adapter.specs[saved_head].shape != shape:
            raise Mismatch(f"{adapter.name}: {head!r} is {adapter.specs[saved_head]} where {list(shape)} belong; "
                           f"{MERGE_WITH_PEFT}.")  # fmt: skip
        place = at_head or names.on_disk(head)
        if saved_head is None:
            return {place: stored}, dict(_UNTIED)
        changes.replacements[place] = saved_head
        return {}, dict(_UNTIED)
    return {}, {}


def _tied(base: TensorSource, names: Names, changes: Changes, unknown: Mapping[str, str]) -> Mapping[str, str]:
    """Names in memory of tied weights, where the adapter touches any of them."""
    vocabulary = _vocabulary(base.config)
    touched = (*changes.updates, *changes.replacements)
    touches_vocabulary = any(vocabulary in base.spec(name).shape[:1] for name in touched)
    may_touch = touches_vocabulary or unknown or changes.unmatched
    if not may_touch or base.config.get("tie_word_embeddings") is False:
        return {}
    if names.skeleton is None:
        if touches_vocabulary:
            raise BadInput(
                f"{base.description}: the adapter changes an embedding, and whether it is tied is unknown: "
                f"{names.why_not.rstrip('.')}; {MERGE_WITH_PEFT}."
            )
        return {}
    return {head: source for head, source in names.skeleton.tied.items() if head.endswith("weight")}


def _vocabulary(config: Mapping[str, Any]) -> object:
    nested = config.get("text_config")
    return config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)


def _same_rows(adapter: AdapterFile, rows: Rows | None, other: Update | None) -> bool:
    return (
        isinstance(rows, Rows)
        and isinstance(other, Rows)
        and rows.indices == other.indices
        and _equal(adapter, rows.key, other.key)
    )


def _equal(adapter: AdapterFile, first: str, second: str) -> bool:
    return adapter.specs[first] == adapter.specs[second] and torch.equal(adapter.tensor(first), adapter.tensor(second))


def _parted(adapter: AdapterFile, head: str, embedding: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.name}: {head!r} and {embedding!r} are tied in the base, and the adapter changes one of them only; "
        f"merged into the weight they share it would compute something else. Load the base with "
        f"tie_word_embeddings=False and {MERGE_WITH_PEFT}."
    )


# No head


def _backbone(base: TensorSource, names: Names, changes: Changes) -> str | None:
    """The class of the network inside the base's, if the adapter's modules are called as they are in there."""
    paths = [update.module for update in changes.updates.values()]
    if not paths or any(f"{path}.weight" in base.index.entries for path in paths) or names.skeleton is None:
        return None
    network = names.skeleton.network
    inside = network.base_model
    if inside is network or any(names.skeleton.module(path) is not None for path in paths):
        return None
    alone = Skeleton(inside)
    return type(inside).__name__ if all(alone.module(path) is not None for path in paths) else None


def _without_head(adapter: AdapterFile, base: TensorSource, names: Names, changes: Changes, class_name: str) -> Outcome:
    """The network inside the base's. What the base lacks of it (a pooler) loading draws, as it did for the training."""
    config_changes: dict[str, Any] = {"architectures": [class_name]}
    held = _held(base, names, Skeleton.of({**base.config, **config_changes}, class_name))
    dropped = frozenset(base.names) - set(held)
    lost = dropped & (set(changes.updates) | set(changes.replacements))
    if lost:
        raise Mismatch(f"{adapter.name}: it changes {min(lost)!r}, which {class_name} has not; {MERGE_WITH_PEFT}.")
    return Outcome(changes.updates, changes.replacements, dropped=dropped, config_changes=config_changes)


# Another head


def _with_another_head(
    adapter: AdapterFile, base: TensorSource, names: Names, changes: Changes, unknown: Mapping[str, str]
) -> Outcome:
    skeleton = names.skeleton
    if skeleton is None:
        raise BadInput(f"{adapter.name}: the adapter has a head of its own: {names.why_not.rstrip('.')}.")
    class_name = type(skeleton.network).__name__
    added = {_in_class(adapter, skeleton, target, class_name): key for target, key in unknown.items()}
    shapes = {name: adapter.specs[key].shape for name, key in added.items()}
    labels = _labels(base.config, class_name, shapes)
    config_changes: dict[str, Any] = {"architectures": [class_name], **labels}
    exact = Skeleton.of({**base.config, **config_changes}, class_name)
    held = _held(base, names, exact)
    for name, shape in exact.shapes.items():
        if name not in held.values() and shapes.get(name) != shape:
            raise CheckpointError(
                f"{adapter.name}: {class_name} needs {name!r} {list(shape)}, which neither the adapter nor "
                f"{base.description} holds: what was drawn at random for the training is lost; pass the base that has "
                "it, or train with it in modules_to_save."
            )
    dropped = frozenset(base.names) - set(held)
    lost = dropped & (set(changes.updates) | set(changes.replacements))
    if lost:
        raise Mismatch(f"{adapter.name}: it changes {min(lost)!r}, which {class_name} has not; {MERGE_WITH_PEFT}.")
    return Outcome(changes.updates, {**changes.replacements, **added}, dropped=dropped, config_changes=config_changes)


def _in_class(adapter: AdapterFile, skeleton: Skeleton, target: str, class_name: str) -> str:
    name = skeleton.disk_name(target)
    if name is None:
        raise Mismatch(f"{adapter.name}: {target!r} is no tensor of {class_name}; {MERGE_WITH_PEFT}.")
    return name


def _held(base: TensorSource, names: Names, skeleton: Skeleton) -> dict[str, str]:
    """The base's tensors that a class has too, with the names it has there."""
    held = {}
    for name, shape in skeleton.shapes.items():
        found = names.find(name)
        if found is not None and base.spec(found).shape == shape:
            held[found] = name
    return held


def _labels(config: Mapping[str, Any], class_name: str, added: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The labels of a head: as many as the tensors have rows where the class has one for each label."""
    numbered = {str(number): f"LABEL_{number}" for number in range(_LABELS_TRIED)}
    tried = Skeleton.of({**config, "id2label": numbered, "label2id": _inverse(numbered)}, class_name)
    counts = {
        added[name][0]
        for name, shape in tried.shapes.items()
        if name in added and shape[:1] == (_LABELS_TRIED,) and added[name]
    }
    if len(counts) != 1:
        return {}
    count = counts.pop()
    if count == len(config.get("id2label") or (0, 1)):  # transformers gives a head two labels if nobody says more
        return {}
    labels = {str(number): f"LABEL_{number}" for number in range(count)}
    return {"id2label": labels, "label2id": _inverse(labels)}


def _inverse(labels: Mapping[str, str]) -> dict[str, int]:
    return {label: int(number) for number, label in labels.items()}


def spec_of(outcome: Outcome, adapter: AdapterFile, base: TensorSource, name: str) -> TensorSpec:
    """Dtype and shape of a tensor of the merged network. What the base has keeps the base's dtype."""
    if name in outcome.copies:
        return base.spec(outcome.copies[name])
    if name in base.index.entries:
        return base.spec(name)
    return adapter.specs[outcome.replacements[name]]
