"""What a protection is: settings that say what they need, and that turn a checkpoint into one that does not merge.

A protection is a frozen dataclass in one file, a subclass of :class:`Protection`:

    requirements()   what it needs and promises with these settings
    check(inputs)    refuses what can be refused cheaply; returns what a dry run reports
    prepare(inputs)  calibrates, trains or draws; returns the checkpoint to write, as a :class:`Rewrite`

``protect`` does the rest: it opens the checkpoints, orders the methods, writes, verifies, resumes and reports. Exact
methods have a base class of their own (:class:`~unmergeable.protections.exact.ExactProtection`), and describe no more
than a change of basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from unmergeable import claims
from unmergeable.architecture import Architecture
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.plan import OutputTensor
from unmergeable.checkpoint.sharing import SharedPlan
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.gauge.key import Key
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.load import load_network, network_of
from unmergeable.pools.pool import Pool
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements
from unmergeable.settings import settings_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

Stage = Literal["weights", "basis", "structure"]
"""What a protection changes. Compositions go in this order: a task vector has to be read before the basis changes, and
nothing knows the symmetries of a network of polynomials."""


@dataclass(frozen=True)
class ProtectionRequirements(Requirements):
    """What a protection with given settings needs and promises, and its ``stage`` in a composition.

    ``needs`` and ``accepts`` may name fields of :class:`Extras`, and "key", "base", "training".
    """

    stage: Stage = "weights"

    @property
    def has_key(self) -> bool:
        """Whether a key is made, which gives the original back."""
        return "key" in self.needs


@dataclass(frozen=True)
class Extras:
    """What an owner may give besides the expert and its base; a protection reads what its requirements name.

    Attributes:
        data: examples of what the expert is used for.
        head: file of the task's head, where the expert ends in features.
        encoder: folder whose tokenizer or image processor prepares the data; None for the expert's.
        siblings: other fine-tunes of the base.
        generic: inputs of other kinds than the task's, without labels: what the release is to do as before.
    """

    data: Path | None = None
    head: Path | None = None
    encoder: Path | None = None
    siblings: tuple[Path, ...] = ()
    generic: Path | None = None


@dataclass(frozen=True)
class Elsewhere:
    """Other processes that share the work on streamed tensors.

    Attributes:
        pool: runs calls there.
        reopen: opens the same checkpoints in another process. Two that do so are equal and have one hash.
        threads: how many tensors each process works on at a time.
    """

    pool: Pool
    reopen: Callable[[], Inputs]
    threads: int = 1


@dataclass(frozen=True)
class Inputs:
    """What a protection works on.

    Attributes:
        expert: the checkpoint to protect.
        base: what it was fine-tuned from, under the expert's tensor names.
        architecture: of both.
        template: folder with the network's config and tokenizer: the expert's, or the base's for a LoRA expert.
        base_folder: of the base, for opening what lies on it.
        extras: what else was given; only what the protection's requirements name.
        key_file: where the key is kept; one that exists belongs to an interrupted run. None keeps it in memory.
        passphrase: of the key file.
        seed: of random choices, 0 when None. It also draws the key, which otherwise the operating system does.
        threads: how many threads work on streamed tensors.
        work: folder for what has to survive a kill. The protection makes it, and names the files in
            ``Rewrite.leftovers``. None in memory.
        elsewhere: other processes to share the work with; None for this one alone. Only where the step's
            :attr:`~Protection.is_shareable`.
    """

    expert: TensorSource
    base: TensorSource
    architecture: Architecture
    template: Path
    base_folder: Path
    extras: Extras = field(default_factory=Extras)
    key_file: Path | None = None
    passphrase: str | None = None
    seed: int | None = None
    threads: int = 1
    work: Path | None = None
    elsewhere: Elsewhere | None = None
    progress: Progress = silent

    def load_expert(self) -> Any:
        """The expert as a live network: float32, in evaluation mode, on the CPU."""
        if self.template == self.expert.folder:
            return load_network(self.template)
        # An adapter's folder has no network of its own; the merged one may be of another class than the base's.
        changed = self.expert.index.config_changes
        network = network_of(self.expert.config, self.expert.description) if changed else load_network(self.template)
        show(find_places(network), {name: self.expert.tensor(name) for name in self.expert.names})
        return network

    @property
    def encoder(self) -> Path:
        """Folder whose tokenizer or image processor prepares the data: the one given; or an adapter's, which may bring
        tokens that its base lacks; or the template's."""
        own = self.expert.folder
        brings_one = own != self.template and any((own / name).is_file() for name in _TOKENIZER_FILES)
        return self.extras.encoder or (own if brings_one else self.template)


class Facts:
    """What a protection reports of one checkpoint. Each has a frozen dataclass of its own; by default there are none.

    A dry run gets them from ``check``, with None for whatever is not measured yet.
    """

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the owner has to read."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``protect --json``."""
        return {}

    def record(self) -> Mapping[str, Any]:
        """What the manifest, which is published, says after verification; JSON-able."""
        return {}

    def lines(self) -> list[str]:
        """What the terminal shows."""
        return []


@dataclass(frozen=True)
class Rewrite:
    """A protected checkpoint, ready to be written.

    Attributes:
        source: gives names, layout and side files, and the tensors that the plan copies or edits.
        plan: the tensors of the result (:func:`unmergeable.checkpoint.plan.output_like`).
        recipe: what was done, for the manifest, which is published: no secrets.
        resume_token: identifies the bytes: an interrupted run goes on only with the same one.
        facts: what is known before writing.
        record: more for the manifest, JSON-able.
        config_changes: merged into ``config.json``; None leaves it byte for byte.
        also_read: further checkpoints whose files the manifest lists, by role.
        key: the secret that undoes it, None where nothing does.
        verify: judges the written checkpoint and completes the facts. What it raises removes the result.
        leftovers: files in the work folder, removed once the result is there.
        is_determined: whether recipe, record and the files read say all that the bytes depend on.
        shared: other processes that write shards of it; None where this one writes all.
    """

    source: TensorSource
    plan: Sequence[OutputTensor]
    recipe: Mapping[str, Any]
    resume_token: str
    facts: Facts = field(default_factory=Facts)
    record: Mapping[str, Any] = field(default_factory=dict)
    config_changes: Mapping[str, Any] | None = None
    also_read: Mapping[str, TensorSource] = field(default_factory=dict)
    key: Key | None = None
    verify: Callable[[TensorSource], Facts] | None = None
    leftovers: tuple[Path, ...] = ()
    is_determined: bool = False
    shared: SharedPlan | None = None


class Protection:
    """A way to publish an expert so that it does not merge. Subclasses are frozen dataclasses of their settings.

    ``summary`` and ``remark`` are for people: what it does, in a line, and why it stops what it stops and nothing more.
    ``attack``: the recovery to check that with, if there is one that needs nothing but the base.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    remark: ClassVar[str] = ""
    is_control: ClassVar[bool] = False
    """A control protects nothing: audits use it, ``protect`` refuses it."""
    is_shareable: ClassVar[bool] = False
    """Whether several processes can share its work: every tensor of the result is made by itself, from files."""

    @property
    def limits(self) -> str:
        """What audits measured of it with these settings, and the remark: what every ``protect`` ends with."""
        defaults = settings_of(type(self)())
        changed = {name: value for name, value in settings_of(self).items() if value != defaults.get(name)}
        return f"{claims.limits(self.name, settings=changed)} {self.remark}".strip()

    @property
    def attack(self) -> str | None:
        return None

    def validate(self) -> None:
        """Raises UsageError for a setting out of range."""

    def require(self, is_valid: bool, setting: str, what: str) -> None:
        """Raise UsageError, saying ``what`` the setting must do, unless ``is_valid``."""
        if not is_valid:
            raise UsageError(f"{self.name}: {setting} must {what}, not {getattr(self, setting)}.")

    def requirements(self) -> ProtectionRequirements:
        """What it needs and promises with these settings."""
        raise NotImplementedError

    def unsupported(self, family: str) -> str | None:
        """Why no model of a family can have it; None where it can."""
        return None

    def recipe(self) -> dict[str, Any]:
        """Name and settings, as the manifest records them."""
        return {"method": self.name, "settings": settings_of(self)}

    def check(self, inputs: Inputs) -> Facts:
        """Refuse everything that can be refused before the work begins.

        Raises:
            UsageError, BadInput: naming what is wrong and what to do.
        """
        return Facts()

    def prepare(self, inputs: Inputs) -> Rewrite:
        """The checkpoint to write. Refuses what :meth:`check` refuses.

        Raises:
            As :meth:`check`; UnmergeableError where training or calibration fails.
        """
        raise NotImplementedError


def shared_tensors(sources: Sequence[TensorSource]) -> tuple[str, ...]:
    """Floating-point tensors that all checkpoints hold in one shape, in the first one's order."""
    first, *others = sources
    held = [set(source.names) for source in others]
    return tuple(
        name
        for name in first.names
        if torch_dtype(first.spec(name).dtype).is_floating_point
        and all(name in names for names in held)
        and all(source.spec(name).shape == first.spec(name).shape for source in others)
    )
