"""Which tokens a merge has, and where each model keeps them: mergekit's choices of a tokenizer.

By default the merge has the template's rows. Models with other numbers of rows are aligned by token where both have a
``tokenizer.json``, else by number. A choice of a tokenizer (``base``, ``union``, a model) aligns all of them by token,
and the merge has as many rows as that tokenizer has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.spare import is_input_embedding, is_output_head
from unmergeable.checkpoint.vocabulary import Vocabulary, is_tokenizer_file, shown_tokens, united, with_tokens
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges.blocks import Operand
from unmergeable.merges.differences import VOCABULARY_VECTORS
from unmergeable.merges.members import Member
from unmergeable.merges.rows import ZERO, Alignment, Place, by_number, by_token, is_in_place

SideFiles = dict[str, Path | bytes]


@dataclass(frozen=True)
class TokenSource:
    """Where the row of one token comes from, in models that lack the token, or (``force``) in all.

    ``model`` is ``"base"`` or the number of an expert, None for a row of zeros. ``token`` or ``row`` name another token
    of that model; without them it is the same one.
    """

    model: str | int | None
    token: str | None = None
    row: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a merge: those of the ``"base"``, of an expert by its number, or the ``"union"`` of all.

    ``tokens`` says of single tokens where their rows come from.
    """

    source: str | int
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has one row (or element) for each token."""
    return is_input_embedding(name) or is_output_head(name) or VOCABULARY_VECTORS.fullmatch(name) is not None


@dataclass(frozen=True)
class Vocabularies:
    """Rows of the merge in every model, by its role; empty where all have the same.

    ``size`` is the number of rows of the merge. ``files`` are the side files of the merge that are not the template's:
    None for those it leaves out. ``base`` are the parts that the base plays: an average may have it as an expert too.
    """

    size: int = 0
    rows: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    sources: Mapping[int, tuple[str, int] | str] = field(default_factory=dict)
    forced: frozenset[int] = frozenset()
    files: Mapping[str, Path | bytes | None] = field(default_factory=dict)
    base: tuple[str, ...] = ()

    @property
    def differ(self) -> bool:
        return bool(self.rows)

    @classmethod
    def of(
        cls, members: Sequence[Member], template: Member, tokenizer: Tokenizer | None, notes: list[str]
    ) -> Vocabularies:
        """How the vocabularies of a merge's models belong together; ``notes`` is told what is left out.

        Raises:
            UsageError: the choice names a model or token that there is not.
            BadInput: a union needs a tokenizer that is not there.
        """
        embedding = next((name for name in template.names if is_input_embedding(name)), None)
        heights = {
            member.role: member.shape(embedding)[0] for member in members if embedding and embedding in member.names
        }
        if embedding is None or (tokenizer is None and len(set(heights.values())) == 1):
            return cls()
        if tokenizer is None:
            found = _by_default(members, template, heights, notes)
        else:
            found = _as_chosen(members, template, heights, tokenizer)
        base = next((member.source for member in members if member.role == "base"), None)
        return replace(found, base=tuple(member.role for member in members if member.source is base))

    def aligned(self, name: str, roles: Sequence[str], operands: Sequence[Operand]) -> tuple[Operand, ...]:
        """The operands of a tensor, which models of these roles have, with the rows of the merge."""
        if not self.differ or not is_vocabulary(name):
            return tuple(operands)
        places = {role: number for number, role in enumerate(roles)}
        sources: dict[int, Place | str] = {}
        for row, source in self.sources.items():
            if isinstance(source, tuple) and source[0] not in places:
                raise UsageError(f"{name}: the row of a token is to come from {source[0]}, which does not have it.")
            sources[row] = (places[source[0]], source[1]) if isinstance(source, tuple) else source
        base = next((places[role] for role in self.base if role in places), None)
        alignment = Alignment(tuple(self.rows[role] for role in roles), base, sources, self.forced)
        if is_in_place(alignment, [operand.shape[0] for operand in operands]):
            return tuple(operands)
        return alignment.aligned(operands)

    def resized(self, name: str, spec: TensorSpec) -> TensorSpec:
        """The spec of a tensor with the rows of the merge."""
        if not self.differ or not is_vocabulary(name):
            return spec
        return replace(spec, shape=(self.size, *spec.shape[1:]))

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``vocab_size`` in a configuration and its parts, where the merge has another."""
        changes: dict[str, Any] = {}
        if not self.differ:
            return changes
        for key, value in config.items():
            if key == "vocab_size" and value != self.size:
                changes[key] = self.size
            elif key == "text_config" and isinstance(value, Mapping) and (inner := self.config_changes(value)):
                changes[key] = inner
        return changes


def _by_default(
    members: Sequence[Member], template: Member, heights: Mapping[str, int], notes: list[str]
) -> Vocabularies:
    size = heights[template.role]
    rows = {}
    for member in members:
        height = heights.get(member.role, size)
        ours, theirs = template.vocabulary, member.vocabulary
        if height == size or ours is None or theirs is None:
            (rows[member.role],) = by_number([height], size)
        else:
            rows[member.role] = by_token(ours.by_row(), size, theirs.rows, height)
        if height != size:
            notes.append(_difference(member, template, heights, rows[member.role]))
    return Vocabularies(size, rows)


def _difference(member: Member, template: Member, heights: Mapping[str, int], rows: Sequence[int | None]) -> str:
    common = sum(row is not None for row in rows)
    lost = heights[member.role] - common
    ours, theirs = template.vocabulary, member.vocabulary
    tokens = [token for token in theirs.rows if token not in ours.rows] if ours and theirs else []
    named = f" ({shown_tokens(tokens)})" if tokens else ""
    theirs_rows, our_rows = heights[member.role], heights[template.role]
    line = f"{member.role} has {theirs_rows} rows of tokens, {template.role} {our_rows}: {common} merge"
    return f"{line}, {lost} are left out{named}; --tokenizer union keeps them." if lost else f"{line}."


def _as_chosen(
    members: Sequence[Member], template: Member, heights: Mapping[str, int], tokenizer: Tokenizer
) -> Vocabularies:
    known = {member.role: member for member in members} | {template.role: template}
    vocabularies = {role: member.vocabulary or template.vocabulary for role, member in known.items()}
    if template.vocabulary is None:
        raise BadInput(
            f"{template.label} has no tokenizer.json to align tokens by; save its tokenizer with transformers, or "
            "leave out the choice of a tokenizer."
        )
    files: dict[str, Path | bytes | None] = {}
    first = known.get("base", template)
    source = _role(tokenizer.source, known, template)
    if tokenizer.source == "union":
        others = [vocabulary for role, vocabulary in vocabularies.items() if role != first.role and vocabulary]
        vocabulary, entries = united([_required(vocabularies[first.role]), *others])
        if first is not template:
            files |= _tokenizer_files(first, template)
        if entries:
            files |= with_tokens(first.source.index.side_files, entries)
    else:
        donor = known.get(source)
        if donor is None or donor.vocabulary is None:
            raise UsageError(f"tokenizer {tokenizer.source}: no such model in this merge has a tokenizer.json.")
        vocabulary = donor.vocabulary
        if donor is not template:
            files |= _tokenizer_files(donor, template)
    if tokenizer.source != "union":
        # Tokens without a row of their own are none of the model's.
        height = heights.get(source, vocabulary.size)
        vocabulary = Vocabulary({t: r for t, r in vocabulary.rows.items() if r < height}, vocabulary.added)
    tokens = vocabulary.by_row()
    rows = {
        role: by_token(tokens, vocabulary.size, _required(vocabularies[role]).rows, heights.get(role, vocabulary.size))
        for role in known
    }
    named = {token: (entry, _role(entry.model, known, template)) for token, entry in tokenizer.tokens.items()}
    sources, forced = _sources(named, vocabulary, {role: _required(v) for role, v in vocabularies.items()})
    return Vocabularies(vocabulary.size, rows, sources, forced, files)


def _required(vocabulary: Vocabulary | None) -> Vocabulary:
    assert vocabulary is not None, "a model without one is taken to have the template's"
    return vocabulary


def _sources(
    tokens: Mapping[str, tuple[TokenSource, str]], vocabulary: Vocabulary, known: Mapping[str, Vocabulary]
) -> tuple[dict[int, tuple[str, int] | str], frozenset[int]]:
    sources: dict[int, tuple[str, int] | str] = {}
    for token, (source, role) in tokens.items():
        row = vocabulary.rows.get(token)
        if row is None:
            raise UsageError(
                f"tokens: the merge has no token {token!r}; leave it out, or choose the union of tokenizers."
            )
        if source.model is None:
            sources[row] = ZERO
            continue
        own = source.row
        if own is None and role in known:
            own = known[role].rows.get(source.token or token)
        if own is None:
            raise UsageError(f"tokens: {role} has no token {source.token or token!r}, which {token!r} is to come from.")
        sources[row] = (role, own)
    return sources, frozenset(vocabulary.rows[token] for token, (source, _) in tokens.items() if source.force)


def _role(model: str | int | None, known: Mapping[str, Member], template: Member) -> str:
    """The part of a model in the merge; without a base the template stands for it, as in mergekit."""
    if model == "base":
        return "base" if "base" in known else template.role
    return f"expert {model}"


def _tokenizer_files(donor: Member, template: Member) -> dict[str, Path | bytes | None]:
    """The donor's tokenizer in place of the template's."""
    files: dict[str, Path | bytes | None] = {
        name: None for name in template.source.index.side_files if is_tokenizer_file(name)
    }
    return files | {name: path for name, path in donor.source.index.side_files.items() if is_tokenizer_file(name)}


__all__ = ["SideFiles", "TokenSource", "Tokenizer", "Vocabularies", "is_vocabulary"]
