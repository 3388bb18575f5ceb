"""What is merged with what: for every tensor of a merge, each model's share of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.source import TensorSource
from unmergeable.merges.blocks import Operand, in_one_dtype, tensor_operand
from unmergeable.merges.members import Member
from unmergeable.merges.models import source_operand
from unmergeable.merges.vocabularies import Vocabularies, is_vocabulary

Template = str | int | None
"""Whose configuration, files and parts a merge has: ``"base"``, the number of an expert, or None for the default."""


@dataclass(frozen=True)
class Share:
    """One model's part in a merged tensor: where it lies, under which name.

    ``rows``: those of its rows that belong to the template's, in their order; None where they lie as the template's do.
    """

    member: Member
    name: str
    rows: tuple[int, ...] | None = None

    def operand(self) -> Operand:
        if self.rows is not None:
            return tensor_operand(self.member.label, self.member.source.tensor(self.name)[list(self.rows)])
        return source_operand(self.member.label, self.member.source, self.name)


@dataclass
class Networks:
    """The models of a merge compared; see :func:`unmergeable.merges.comparison.compare`.

    Attributes:
        owner: the template's model, which says what the merge is.
        read: the models that are operands: the base, if the method reads it, and the experts.
        shares: for every merged tensor, by its name in the merge, each model's part in it: the base's, if it is read,
            and then the experts'.
        copies: tensors of the merge that are copies of others in it (a tied head that is stored), by name.
        added: tensors that the template does not have: their specs, and for those copied from a model which one's.
        vocabularies: how rows of tokens belong together.
        notes: what the user should know of what differs.
    """

    owner: Member
    read: tuple[Member, ...]
    shares: dict[str, tuple[Share, ...]]
    copies: dict[str, str]
    added: dict[str, tuple[TensorSpec, tuple[TensorSource, str] | None]]
    vocabularies: Vocabularies
    notes: list[str] = field(default_factory=list)
    is_untied: bool = False
    _aligned: dict[str, tuple[Operand, ...]] = field(default_factory=dict, repr=False)

    @property
    def template(self) -> TensorSource:
        return self.owner.source

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors to be merged."""
        return tuple(self.shares)

    def operands(self, name: str) -> tuple[Operand, ...]:
        """The models' shares of a merged tensor."""
        shares = self.shares[name]
        if not (self.vocabularies.differ and is_vocabulary(name)):
            return in_one_dtype([share.operand() for share in shares])
        if name not in self._aligned:  # which rows belong together is found once
            roles = [share.member.role for share in shares]
            aligned = self.vocabularies.aligned(name, roles, [share.operand() for share in shares])
            self._aligned[name] = in_one_dtype(aligned)
        return self._aligned[name]

    def kept(self, name: str) -> Operand:
        """A tensor that stays as the template has it, with the rows of the merge."""
        operand = source_operand(self.owner.label, self.template, name)
        return self.vocabularies.aligned(name, [self.owner.role], [operand])[0]

    def spec(self, name: str) -> TensorSpec:
        """Of a tensor of the merge, in the template's dtype."""
        stored = self.added[name][0] if name in self.added else self.template.spec(name)
        return self.vocabularies.resized(name, stored)
