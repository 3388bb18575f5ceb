"""The checkpoints of a merge as networks: every tensor of the template, where it lies in each of the others.

The *template* says what the merge is: its configuration, its files, and which tensors it has. It is the base, without
one the first expert, or whom the user chooses. A tensor that another file stores needlessly (masks, the second copy of
a tied head) or lacks for that reason makes no difference; neither do names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

from unmergeable.checkpoint.correspondence import corresponding_names, further_names
from unmergeable.checkpoint.parts import common_part, kind_of
from unmergeable.checkpoint.source import ChunkSource, TensorSource, shapes_of, tensor_bytes
from unmergeable.checkpoint.spare import is_buffer, is_input_embedding, is_tied, tied_to
from unmergeable.checkpoint.vocabulary import Vocabulary, read_vocabulary
from unmergeable.errors import Mismatch
from unmergeable.merges.differences import Matched

_CHUNK = 1 << 22

# What makes networks of equal shapes compute differently; merging across it is meaningless. The head counts are here
# because other heads hide behind equal shapes.
ARCHITECTURE_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_heads", "n_head")

_SETTINGS = (
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
)
"""What a fine-tune may change without another shape, and a merge can have from one model only; rotary settings too."""


@dataclass(frozen=True)
class Member:
    """One model of a merge. ``names`` maps the template's tensors to those here; ``further`` are the others it has."""

    role: str
    source: TensorSource
    names: Mapping[str, str]
    further: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, role: str, source: TensorSource, template: TensorSource) -> Member:
        """The model beside the template.

        Raises:
            Mismatch: the configurations name other architectures, or another number of heads.
        """
        if source is template:
            return cls(role, source, {name: name for name in source.names})
        require_same_architecture(template, source)
        names = corresponding_names(shapes_of(template), shapes_of(source))
        return cls(role, source, names, tuple(further_names(source.names, names)))

    @property
    def label(self) -> str:
        return f"{self.role} ({self.source.description})"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by its name in the template."""
        return self.source.spec(self.names[name]).shape

    @cached_property
    def matched(self) -> Matched:
        """What the template shares with this model, in the template's names."""
        return Matched(self.names)

    @cached_property
    def matched_here(self) -> Matched:
        """The same in the names of this model."""
        return Matched(self.names.values())

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Output heads, their biases and further embeddings that are stored as copies of others, by their names here.

        A configuration that unties the embeddings speaks of the output: encoder and decoder share theirs all the same.
        """
        names = self.source.names
        if is_tied(self.source.config) is False:
            names = tuple(filter(is_input_embedding, names))
        tied = {name: tied_to(name, names) for name in names}
        return {name: other for name, other in tied.items() if other and same_values(self.source, name, other)}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's rows; none where the configuration gives none, or only numbers them."""
        named = self.source.config.get("id2label")
        if not isinstance(named, Mapping) or not all(str(number).isdecimal() for number in named):
            return ()
        labels = tuple(str(named[number]) for number in sorted(named, key=int))
        is_numbered = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
        return () if is_numbered or len(set(labels)) < len(labels) else labels

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return read_vocabulary(self.source.index.side_files)

    def unexplained(self) -> Iterator[str]:
        """Tensors beside the template's that the network needs: no buffers, no copies of tied weights."""
        return (name for name in self.further if not is_buffer(name) and name not in self.copies)


def require_same_architecture(template: TensorSource, other: TensorSource) -> None:
    """Require that two configurations, where both say something, describe one network, or one and a part of it.

    Raises:
        Mismatch: naming what differs.
    """
    common = common_part(template.config, other.config)
    if common is None:
        ours, theirs = kind_of(template.config), kind_of(other.config)
        raise Mismatch(
            f"config.json: model_type is {ours} in {template.description} but {theirs} in {other.description}; only "
            "models of one architecture can be merged. If both compute the same from the same numbers, unmergeable "
            f"recover {other.description} --base {template.description} --method canonicalise --out {other.description}"
            f"-as-{ours} writes the one as the other."
        )
    for key in ARCHITECTURE_KEYS:
        values = [part.get(key) for part in common]
        if None not in values and values[0] != values[1]:
            raise Mismatch(
                f"config.json: {key} is {values[0]} in {template.description} but {values[1]} in {other.description}; "
                "only models of one architecture can be merged."
            )


def differing_settings(template: Member, other: Member) -> Iterator[str]:
    """A line for each setting that changes what equal weights compute, of which the merge has the template's."""
    common = common_part(template.source.config, other.source.config)
    assert common is not None, "members are of one architecture"
    ours, theirs = ({**{key: part.get(key) for key in _SETTINGS}, **_rotary(part)} for part in common)
    for key, value in ours.items():
        if value is not None and theirs.get(key) is not None and value != theirs[key]:
            yield (
                f"config.json: {key} is {value} in {template.role} and {theirs[key]} in {other.role}; the merge has "
                f"that of {template.role}."
            )


def _rotary(config: Mapping[str, object]) -> dict[str, object]:
    """Rotary settings, which transformers 5 keeps in ``rope_parameters`` and older releases beside it."""
    values: dict[str, object] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if isinstance(section, Mapping):
            values |= {name: value for name, value in section.items() if isinstance(value, int | float | str)}
    return values


def same_values(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint hold the same numbers; they are read as far as they agree."""
    if source.spec(first) != source.spec(second):
        return False
    return all(ours == theirs for ours, theirs in zip_longest(_bytes(source, first), _bytes(source, second)))


def _bytes(source: TensorSource, name: str) -> Iterator[bytes]:
    if isinstance(source, ChunkSource):
        return (bytes(chunk) for chunk in source.raw_chunks(name, _CHUNK))
    return iter([bytes(tensor_bytes(source.tensor(name)))])
