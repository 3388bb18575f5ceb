"""``distil``: run the release on inputs of one's own, and train a student of the base's architecture to do as it does.

    min over theta of  D(student(x), release(x)) + mean over layers of |s h_student Q + t - h_release|^2 / |h_release|^2

D compares what both put out: T^2 KL(release || student) of softmaxes at temperature T for logits (Hinton, Vinyals and
Dean, arXiv 1503.02531), the squared distance relative to the features' spread for features. The second term does the
same for hidden states, where the release has as many as the student and of the same width; s, Q and t are the
similarity transformation that brings the student's first hidden states nearest to the release's
(:mod:`unmergeable.network.similarity`), so that a stream in another basis teaches as well as any. States that agree
with the student's in no basis are left out. ``layers=0`` compares outputs alone.

No weight of the release is looked at, so nothing that is done to weights alone is in the way: other bases, other
structures, idle blocks. No label is read either, and the inputs need not be those of the defended task. What a student
learns is what *every* release gives away to whoever can run it; weights are worth what they give beyond that.

The student starts from the base, or from a model given as a source: the free-rider's. An encoder and a decoder are
shown the release's own most likely answers (Kim and Rush, arXiv 1606.07947).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.live import edits_to, load, with_a_head
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.comparison import Comparison
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import drawn_batches, encoded, gather_examples, padding_token, select
from unmergeable.network.outputs import LOGITS, widths_of, with_answers
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.tasks import Task, is_encoder_decoder
from unmergeable.network.train import Batch, Schedule, train
from unmergeable.progress import Progress, silent
from unmergeable.settings import ADDED_LATER


@dataclass(frozen=True)
class Distil:
    """Settings of the attack.

    Attributes:
        examples: the most inputs that are read; their labels are not.
        steps: of the training.
        batch_size: examples of a step, or all if there are fewer.
        learning_rate: the highest; it rises and falls as in every training here.
        temperature: of the softmaxes that are compared, for networks that put out logits.
        layers: hidden states that are compared besides the outputs, spread over the depth; 0 for outputs alone.
        max_length: tokens after which texts are cut. Logits take batch_size * max_length * vocabulary numbers.
        start: "base", or "source": the model that is given as one.
        seed: of the examples and their order.
        precision: in which both networks compute while the student is trained.
    """

    name: ClassVar[str] = "distil"
    summary: ClassVar[str] = "train the base on what the release answers, without looking at its weights"

    examples: int = 640
    steps: int = 240
    batch_size: int = 8
    learning_rate: float = 3e-5
    temperature: float = 2.0
    layers: int = 4
    max_length: int = 128
    start: Literal["base", "source"] = "base"
    seed: int = 0
    precision: Precision = field(default=FULL, metadata=ADDED_LATER)

    def validate(self) -> None:
        for name, least in (("examples", 1), ("steps", 1), ("batch_size", 1), ("layers", 0), ("max_length", 2)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name}={value}: at least {least} is needed.")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name}={value}: must be a positive number.")

    def requirements(self) -> AttackRequirements:
        needs = ("base", "data", *(("sources",) if self.start == "source" else ()))
        return AttackRequirements(needs=needs, structure="any", examples="own", access="answers")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Train the student; the result has the base's layout, or the release's where only that has a head.

        Raises:
            UsageError: a head is given, which would not be read; start=source without one source.
            BadInput: the examples cannot be used, or the outputs have nothing in common.
            Mismatch: the source is no model of the base's architecture.
        """
        data = inputs.require_data(self.name)
        if data.head is not None:
            raise UsageError("distil compares what the networks put out, and reads no head; leave out --head.")
        start = self._start(inputs)
        task = data.unlabelled(examples=self.examples, seed=self.seed, max_length=self.max_length)
        teacher, student, template = load(inputs.protected), load(start), inputs.base
        if not is_encoder_decoder(teacher) and _lacks_a_head(teacher, student, task):
            student, template = with_a_head(load(inputs.protected), student, seed=self.seed), inputs.protected
        taught = distil(teacher, student, task, self, progress=progress)
        learnt = Learnt(data.path, start.folder, taught.examples, taught.losses, taught.layers)
        return Recovered(template, edits_to(taught.weights, template), learnt=learnt)

    def _start(self, inputs: Inputs) -> TensorSource:
        if self.start == "base":
            return inputs.base
        if len(inputs.sources) != 1:
            raise UsageError("distil with start=source: give one --source, the model that the student starts from.")
        require_same_tensors(inputs.base, inputs.sources[0], "base and --source")
        return inputs.sources[0]


@dataclass(frozen=True)
class TaughtLayer:
    """A hidden state by its number, and its distance to the release's (relative to its spread) before and after."""

    number: int
    before: float
    after: float


@dataclass(frozen=True)
class Distilled:
    """``weights`` of the student by their names on disk; ``losses`` of each step, before it; how many ``examples``."""

    weights: Mapping[str, Tensor]
    losses: tuple[float, ...]
    layers: tuple[TaughtLayer, ...]
    examples: int


@dataclass(frozen=True)
class Learnt:
    """What a student learnt from the inputs in ``data``."""

    data: Path
    start: Path
    examples: int
    losses: tuple[float, ...]
    layers: tuple[TaughtLayer, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "data": str(self.data),
            "start": str(self.start),
            "examples": self.examples,
            "steps": len(self.losses),
            "losses": list(self.losses),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def lines(self) -> list[str]:
        compared = f"outputs and hidden states {', '.join(str(layer.number) for layer in self.layers)}"
        if not self.losses:
            return [f"Nothing to teach: {self.start} answers as the release does, on {self.examples} inputs"]
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        return [
            f"Taught a student that started from {self.start}: {len(self.losses)} steps on {self.examples} inputs, "
            f"{compared if self.layers else 'outputs'} compared",
            f"Distance to the release's answers: {first:.3g} in the first tenth of the steps, {last:.3g} in the last",
        ]


def distil(teacher: Any, student: Any, task: Task, method: Distil, *, progress: Progress = silent) -> Distilled:
    """Train ``student``, in place, to do as ``teacher`` does on the inputs of a task.

    Args:
        teacher: any network that takes the inputs; it stays as it is.
        student: a network on the same device.
        task: inputs; neither labels nor how the output is read matter.
        method: the settings.
        progress: called with the steps done.

    Raises:
        BadInput: there are no examples, a network does not take them, or the outputs have nothing in common.
        UnmergeableError: the training diverges.
    """
    method.validate()
    teacher.eval()
    examples = _gathered(teacher, student, task, method.examples)
    compared = Comparison.between(
        teacher,
        student.eval(),
        examples,
        layers=method.layers,
        temperature=method.temperature,
        batch_size=method.batch_size,
    )
    before = compared.distances(teacher, student, examples)
    steps = 0 if compared.are_alike(teacher, student, examples) else method.steps

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return compared.loss(teacher, network, encoded(examples, batch))

    losses = train(
        student,
        drawn_batches(examples, method.batch_size, method.seed),
        loss,
        Schedule(steps, method.learning_rate),
        seed=method.seed,
        precision=method.precision,
        stage="training the student",
        progress=progress,
    )
    after = compared.distances(teacher, student, examples)
    layers = tuple(map(TaughtLayer, compared.layers, before, after))
    weights = {name: tensor.detach().clone() for name, tensor in to_disk_names(student, student.state_dict()).items()}
    return Distilled(weights, tuple(losses), layers, len(examples))


def _gathered(teacher: Any, student: Any, task: Task, most: int) -> EncodedBatch:
    """The examples of a task as one batch without labels, for an encoder and a decoder with the teacher's answers."""
    batches = [EncodedBatch(batch.inputs) for batch in task.batches]
    count = min(most, sum(len(batch) for batch in batches))
    if count == 0:
        raise BadInput(f"{task.name}: no examples to learn from; give some.")
    examples = gather_examples(Task(task.name, batches), count, pad=padding_token(student))
    if is_encoder_decoder(teacher) and "decoder_input_ids" not in examples.inputs:
        return with_answers(teacher, examples)
    return examples


@torch.no_grad()
def _lacks_a_head(teacher: Any, student: Any, task: Task) -> bool:
    """Whether only the release answers by classes or tokens."""
    one = select(next(iter(task.batches)), torch.arange(1))
    return LOGITS in widths_of(teacher, one) and LOGITS not in widths_of(student, one)
