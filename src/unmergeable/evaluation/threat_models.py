"""Threat models: what an attacker has. They are listed here and nowhere else.

    off_the_shelf   T0   ordinary tools to merge
    white_box       T1   the base and the method as well, but no data
    few_shot        T2   labelled examples of the defended task as well
    unlabelled      T3   unlabelled examples as well, as many as there are

Each of these contains those before it. Two more stand beside them:

    black_box            runs the release, on inputs of its own, and never looks at its weights
    retrain              trains its own task into the release, with what labelled examples it has

What they do is no merge of the release, so nothing that protects against merging need stop them: they are the limit
against which weights are judged. Plans take names and codes; results on disk have codes, pages and terminals names.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from unmergeable.errors import BadInput
from unmergeable.settings import nearest


class ThreatModel(Enum):
    """What an attacker has.

    Attributes:
        code: in results on disk.
        phrase: what such an attacker is called in a sentence.
    """

    OFF_THE_SHELF = ("off_the_shelf", "T0", "ordinary merging")
    WHITE_BOX = ("white_box", "T1", "an attacker who knows base and method, with labelled examples to select on alone")
    FEW_SHOT = ("few_shot", "T2", "an attacker who has labelled examples as well")
    UNLABELLED = ("unlabelled", "T3", "an attacker with additional unlabelled data")
    BLACK_BOX = ("black_box", "black_box", "an attacker who only runs the release")
    RETRAIN = ("retrain", "retrain", "an attacker who trains its own task into the release")

    def __init__(self, label: str, code: str, phrase: str) -> None:
        self.label = label
        self.code = code
        self.phrase = phrase

    def __str__(self) -> str:
        return self.label

    def includes(self, other: ThreatModel) -> bool:
        """Whether this attacker has everything that the other one has."""
        if self.merges and other.merges:
            return _ORDER.index(self) >= _ORDER.index(other)
        return self is other

    def may(self, other: ThreatModel, *, with_victim: bool) -> bool:
        """Whether this attacker may do what the other one does; what takes no more than its own model, anybody may."""
        return self.includes(other) or (not with_victim and other is ThreatModel.OFF_THE_SHELF)

    @property
    def merges(self) -> bool:
        """Whether it is one of those who merge the release's weights, each of whom has what those before have."""
        return self not in (ThreatModel.BLACK_BOX, ThreatModel.RETRAIN)

    @property
    def trains(self) -> bool:
        """Whether this attacker has labelled examples to train on."""
        return self.includes(ThreatModel.FEW_SHOT) or self is ThreatModel.RETRAIN

    @classmethod
    def named(cls, text: str) -> ThreatModel:
        """The threat model of a name (``white_box``) or a code (``T1``).

        Raises:
            BadInput: there is none, with the nearest name.
        """
        known = {word: model for model in cls for word in (model.label, model.code)}
        if text not in known:
            raise BadInput(f"no threat model is called {text!r}{nearest(text, {model.label: model for model in cls})}")
        return known[text]


_ORDER = tuple(ThreatModel)


def least(models: Iterable[ThreatModel]) -> ThreatModel:
    """The weakest threat model that includes all of these; ``off_the_shelf`` for none.

    Ordinary tools everybody has; and who has weights and data may run the release as well.
    """
    found = sorted(set(models) - {ThreatModel.OFF_THE_SHELF}, key=_ORDER.index)
    beyond = [model for model in found if model.merges] or found
    return beyond[-1] if beyond else ThreatModel.OFF_THE_SHELF
