"""What is merged with what: networks compared tensor by tensor, differences settled or refused by name.

Every tensor of the template is merged if all models have it. Where it belongs to a part that a model does without (a
head, a tower, layers that predict further tokens) the base's stands in for it: that model has learnt nothing there.
Where no expert has it, or the base does not, it stays as the template has it. Parts that only others have are not
merged, and lost only if the user says whose parts the merge is to have. Whatever belongs to the body must be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.source import TensorSource
from unmergeable.checkpoint.spare import is_buffer, is_output_head, is_tied, tied_to
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.differences import is_auxiliary
from unmergeable.merges.members import Member, differing_settings
from unmergeable.merges.models import is_merged, missing, require_equal_buffer, source_operand
from unmergeable.merges.networks import Networks, Share, Template
from unmergeable.merges.vocabularies import Tokenizer, Vocabularies, is_vocabulary


def compare(
    base: TensorSource | None,
    experts: Sequence[TensorSource],
    *,
    reads_base: bool,
    template: Template = None,
    tokenizer: Tokenizer | None = None,
) -> Networks:
    """Compare the models of a merge.

    Args:
        base: the common ancestor, or None.
        experts: fine-tunes of it.
        reads_base: whether the base is an operand of the merge.
        template: whose configuration, files and parts the merge has; None for the base's (without one, those of the
            first expert), as long as no other model's are lost.
        tokenizer: which tokens the merge has; None for the template's.

    Raises:
        UsageError: there is no such template.
        Mismatch: naming the first tensor that not all models have, or have in other shapes, and what settles it.
        BadInput: for dtypes that cannot be merged, or when there is nothing to merge.
    """
    sources = {f"expert {number}": source for number, source in enumerate(experts, start=1)}
    if base is not None:
        sources = {"base": base, **sources}
    chosen = _role(template, sources)
    models = [Member.of(role, source, sources[chosen]) for role, source in sources.items()]
    return _Comparison(models, chosen, is_chosen=template is not None, reads_base=reads_base).networks(tokenizer)


def _role(template: Template, sources: Mapping[str, TensorSource]) -> str:
    if template is None:
        return next(iter(sources))
    role = str(template) if template == "base" else f"expert {template}"
    if role not in sources:
        known = ", ".join(name.removeprefix("expert ") for name in sources)
        raise UsageError(f"template {template}: there is no such model in this merge; choose one of {known}.")
    return role


class _Comparison:
    def __init__(self, models: Sequence[Member], chosen: str, *, is_chosen: bool, reads_base: bool) -> None:
        self.models, self.is_chosen = models, is_chosen
        self.base = next((member for member in models if member.role == "base"), None)
        self.experts = [member for member in models if member is not self.base]
        self.template = next(member for member in models if member.role == chosen)
        self.read = [member for member in models if reads_base or member is not self.base]
        self.kept: dict[str, list[str]] = {}
        self.unchanged: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def networks(self, tokenizer: Tokenizer | None) -> Networks:
        template = self.template.source
        for member in self.models:
            self.notes += [f"{member.role}: {note}" for note in member.source.index.notes]
            self.notes += differing_settings(self.template, member) if member is not self.template else ()
        vocabularies = Vocabularies.of(self.models, self.template, tokenizer, self.notes)
        copies = self._copies()
        shares = {
            name: found
            for name in template.names
            if name not in copies and (found := self._shares(name, vocabularies)) is not None
        }
        untied = self._untied_heads()
        added = {name: (template.spec(original), None) for name, original in untied.items()}
        shares |= {name: self._head_shares(name, original) for name, original in untied.items()}
        carried = self._carried(untied)
        if not shares:
            raise BadInput("nothing to merge: the models hold no floating-point tensors.")
        self._describe(untied)
        is_untied = bool(untied) or self._is_untied_by_others()
        return Networks(
            owner=self.template,
            read=tuple(self.read),
            shares=shares,
            copies=copies,
            added={**added, **carried},
            vocabularies=vocabularies,
            notes=self.notes,
            is_untied=is_untied,
        )

    def _copies(self) -> dict[str, str]:
        """Tied heads that the template stores: copies in the merge too, unless another model has one of its own."""
        return {
            name: original
            for name, original in self.template.copies.items()
            if all(name not in member.names or member.names[name] in member.copies for member in self.models)
        }

    def _shares(self, name: str, vocabularies: Vocabularies) -> tuple[Share, ...] | None:
        """Each model's part in a tensor; None where it stays as the template has it."""
        if not is_merged(name, torch_dtype(self.template.source.spec(name).dtype)):
            self._require_equal_buffer(name)
            return None
        shares = {member.role: self._share(member, name, vocabularies) for member in self.read}
        lacking = [role for role, share in shares.items() if share is None]
        if not lacking:
            return tuple(share for share in shares.values() if share is not None)
        if is_buffer(name):
            return None
        # The base's own share, whether or not the method reads it.
        stand_in = None if self.base is None else self._share(self.base, name, vocabularies)
        if stand_in is None or all(member.role in lacking for member in self.experts):
            self.kept[name] = lacking
            return None
        for role in lacking:
            self.unchanged.setdefault(role, []).append(name)
        return tuple(share or stand_in for share in shares.values())

    def _share(self, member: Member, name: str, vocabularies: Vocabularies) -> Share | None:
        """A model's part; None where it has none, or one that cannot be merged with the template's."""
        if name not in member.names:
            tied = self._tied_share(member, name)
            if tied is not None:
                return tied
            if is_buffer(name) or is_auxiliary(name, self.template.source.config) or member.matched.is_part(name):
                return None
            raise Mismatch(missing(name, has=self.template.label, lacks=member.label))
        if self._fits(member, name, vocabularies):
            is_labelled = self._is_labelled(member, name)
            if not is_labelled or set(member.labels) == set(self.template.labels):
                return Share(member, member.names[name], self._rows_of_labels(member) if is_labelled else None)
            if not self.is_chosen:
                raise Mismatch(
                    f"{name}: its rows are {_listed(self.template.labels)} in {self.template.label} but "
                    f"{_listed(member.labels)} in {member.label}; {self._heads_do_not_merge()}"
                )
            return None
        if is_buffer(name) or (self.is_chosen and self._is_on_top(name)):
            return None
        raise Mismatch(self._other_shape(member, name))

    def _is_labelled(self, member: Member, name: str) -> bool:
        """Whether the rows of a tensor are a classifier's labels, which both models name."""
        counts = {len(self.template.labels), len(member.labels), *self.template.shape(name)[:1]}
        return len(counts) == 1 and 0 not in counts and self._is_on_top(name) and ".dense." not in name

    def _rows_of_labels(self, member: Member) -> tuple[int, ...] | None:
        """Where a model has the template's labels among its rows, None where they are in the same order."""
        if member.labels == self.template.labels:
            return None
        note = f"{member.role} has its labels in another order than {self.template.role}: rows of one label merge."
        self.notes += [] if note in self.notes else [note]
        return tuple(member.labels.index(label) for label in self.template.labels)

    def _fits(self, member: Member, name: str, vocabularies: Vocabularies) -> bool:
        ours, theirs = self.template.shape(name), member.shape(name)
        if not is_merged(name, torch_dtype(member.source.spec(member.names[name]).dtype)):
            return False
        return ours == theirs or (is_vocabulary(name) and bool(ours) and ours[1:] == theirs[1:] and vocabularies.differ)

    def _tied_share(self, member: Member, name: str) -> Share | None:
        """The embedding of a model that ties its output head to it, where the template has a head of its own."""
        original = tied_to(name, self.template.source.names)
        if original is None or original not in member.names:
            return None
        if name in self.template.copies:
            return Share(member, member.names[original])
        if is_tied(member.source.config) is True and is_output_head(name):
            raise Mismatch(
                f"{name}: {self.template.label} has its own output head, {member.label} ties it to the embeddings; "
                "merge models that are all tied or all untied."
            )
        return None

    def _untied_heads(self) -> dict[str, str]:
        """Output heads that experts of a tied template have of their own, with the embedding it is tied to."""
        found: dict[str, str] = {}
        for member in self.models:
            for name in member.unexplained():
                original = tied_to(name, self.template.source.names)
                if original is not None and is_output_head(name) and self._ties():
                    found[name] = original
        return found

    def _ties(self) -> bool:
        """Whether the template has an output head that is not stored, because it is the embedding."""
        config = self.template.source.config
        classes = config.get("architectures") or ()
        names_head = any("LMHead" in str(name) or "For" in str(name) for name in classes)
        return is_tied(config) is True or (is_tied(config) is None and names_head)

    def _head_shares(self, name: str, original: str) -> tuple[Share, ...]:
        return tuple(
            Share(member, name if name in member.source.index.entries else member.names[original])
            for member in self.read
        )

    def _is_untied_by_others(self) -> bool:
        """Whether the template's stored copy of a tied head becomes a head of its own."""
        return any(name not in self._copies() and is_output_head(name) for name in self.template.copies)

    def _carried(self, untied: Mapping[str, str]) -> dict[str, tuple[TensorSpec, tuple[TensorSource, str] | None]]:
        """What one model has beside the network, taken over as it is. Refuses what would be lost."""
        carried: dict[str, tuple[TensorSpec, tuple[TensorSource, str] | None]] = {}
        left_out: dict[str, list[str]] = {}
        owners: dict[str, str] = {}
        for member in self.models:
            for name in member.unexplained():
                if name in untied:
                    continue
                is_beside = is_auxiliary(name, member.source.config)
                if is_beside and not self.is_chosen and owners.setdefault(name, member.role) == member.role:
                    carried[name] = (member.source.spec(name), (member.source, name))
                elif not (is_beside or member.matched_here.is_part(name)):
                    raise Mismatch(missing(name, has=member.label, lacks=self.template.label))
                elif not self.is_chosen:
                    raise Mismatch(self._would_be_lost(member, name))
                else:
                    left_out.setdefault(member.role, []).append(name)
        for role, names in left_out.items():
            self.notes.append(f"left out of {role}: {_listed(names)}.")
        if carried:
            self.notes.append(f"taken over from {_listed(dict.fromkeys(owners.values()))}: {_listed(carried)}.")
        return carried

    def _would_be_lost(self, member: Member, name: str) -> str:
        others = [option for option in self._options() if option != member.role.removeprefix("expert ")]
        return (
            f"{name} is in {member.label} but not in {self.template.label}, and such parts do not merge; choose whose "
            f"the merge has: --template {member.role.removeprefix('expert ')} keeps it, --template {others[0]} leaves "
            "it out."
        )

    def _other_shape(self, member: Member, name: str) -> str:
        ours, theirs = (described(m.source, m.names[name]) for m in (self.template, member))
        what = f"{name}: {ours} in {self.template.label} but {theirs} in {member.label}"
        if self._is_on_top(name):
            return f"{what}; {self._heads_do_not_merge()}"
        return f"{what}; merge fine-tunes of one base, not resized."

    def _heads_do_not_merge(self) -> str:
        options = " or ".join(f"--template {option}" for option in self._options())
        return f"heads of other labels do not merge: choose whose the merge has with {options}."

    def _options(self) -> list[str]:
        return [member.role.removeprefix("expert ") for member in self.models]

    def _is_on_top(self, name: str) -> bool:
        """Whether a tensor lies in a head: in a module that holds no numbered layer and is not called as a body is."""
        root = name.split(".", 1)[0]
        return (
            "." in name
            and not any(
                other.startswith(f"{root}.") and any(part.isdigit() for part in other.split("."))
                for other in self.template.source.names
            )
            and not is_vocabulary(name)
        )

    def _require_equal_buffer(self, name: str) -> None:
        first = source_operand(self.template.label, self.template.source, name)
        for member in self.models:
            if member is self.template or name not in member.names:
                if name not in member.names and not is_buffer(name) and not member.matched.is_part(name):
                    raise Mismatch(missing(name, has=self.template.label, lacks=member.label))
                continue
            other = source_operand(member.label, member.source, member.names[name])
            if (first.shape, first.dtype) == (other.shape, other.dtype):
                require_equal_buffer(name, first, other)
            elif not is_buffer(name):
                raise Mismatch(self._other_shape(member, name))

    def _describe(self, untied: Mapping[str, str]) -> None:
        by_reason: dict[tuple[str, ...], list[str]] = {}
        for name, roles in self.kept.items():
            by_reason.setdefault(tuple(roles), []).append(name)
        for lacking, kept in by_reason.items():
            self.notes.append(
                f"kept as {self.template.role} has them, for {_listed(lacking)} did not have the same: {_listed(kept)}."
            )
        for role, names in self.unchanged.items():
            self.notes.append(f"{role} counts as unchanged where it has nothing: {_listed(names)}.")
        if untied:
            self.notes.append(f"the merge has an output head of its own, as some of its models do: {_listed(untied)}.")


def described(source: TensorSource, name: str) -> str:
    spec = source.spec(name)
    return f"{str(torch_dtype(spec.dtype)).removeprefix('torch.')} {list(spec.shape)}"


def _listed(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
