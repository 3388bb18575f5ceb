"""Releases that somebody else made: the defended expert under a protection that is not applied here.

    protect:
      expert: digits
      methods:
        - {name: theirs, checkpoint: their-release, recovered: what-we-got-out-of-it}

A release may have a configuration and a structure of its own. It is scored by its own network; it is merged only where
it has the base's structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unmergeable.errors import BadInput
from unmergeable.evaluation.plans.entries import TaskEntry
from unmergeable.evaluation.plans.fields import Entry

_PREPARE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""Files of tokenizers and image processors."""


@dataclass(frozen=True)
class ReleaseEntry:
    """A release.

    Attributes:
        name: what results call it.
        checkpoint: its folder.
        recovered: weights of the base's structure that somebody got out of it; None where nobody has.
        head: of the defended task, where its features are not those of the base; None for the task's own.
        encoder: prepares its examples; None for its own folder, or where that has nothing for it the task's.
        trust_remote_code: whether the code in its folder may be run.
    """

    name: str
    checkpoint: Path
    recovered: Path | None = None
    head: Path | None = None
    encoder: Path | None = None
    trust_remote_code: bool = False

    def asked(self, task: TaskEntry) -> TaskEntry:
        """The defended task as this release is asked it: with its own head, tokenizer or image processor."""
        encoder = self.encoder or (self.checkpoint if self._prepares_inputs_of(task) else task.encoder)
        return replace(task, head=self.head or task.head, encoder=encoder)

    def _prepares_inputs_of(self, task: TaskEntry) -> bool:
        """Whether its folder has everything that prepares the task's examples. Names of classes need the task's own."""
        wanted = [name for name in _PREPARE if (task.encoder / name).is_file()]
        has_all = all((self.checkpoint / name).is_file() for name in wanted)
        return bool(wanted) and has_all and not getattr(task.kind, "classes", ())

    @property
    def paths(self) -> tuple[Path, ...]:
        read = (self.checkpoint, self.recovered, self.head, self.encoder)
        return tuple(path for path in read if path is not None)


def is_release(item: object) -> bool:
    """Whether an item of the methods is a release and not a protection to apply."""
    return isinstance(item, Mapping) and item.get("checkpoint") is not None


def read_release(item: object, where: str, folder: Path) -> ReleaseEntry:
    """A release from its entry; paths start in ``folder``."""
    if isinstance(item, Mapping) and "method" in item:
        raise BadInput(f"{where}: give either method, which is applied here, or checkpoint, which somebody released.")
    entry = Entry(item, ("name", "checkpoint", "recovered", "head", "encoder", "trust_remote_code"), where)
    return ReleaseEntry(
        name=entry.name(),
        checkpoint=entry.checkpoint("checkpoint", folder),
        recovered=entry.checkpoint("recovered", folder) if "recovered" in entry else None,
        head=entry.path("head", folder) if "head" in entry else None,
        encoder=entry.checkpoint("encoder", folder) if "encoder" in entry else None,
        trust_remote_code=entry.flag("trust_remote_code"),
    )
