"""The tutorial for owners of language models, word by word: every command as it stands on the page, on a trained model.

The model is as small as one can be that has something to steal: two experts of one base, each with a skill the base has
only half of, and merges of which have both. ``benchmarks/owner_journey.py``, from which the functions come, gives the
same commands to real models; what that gave is committed.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.owner_journey import PAGE, UNPROTECTED, Answer, Step, commands, follow, page_plan, with_table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tasks.speakers import VOCABULARY, ids_of, write_records, write_speaker
from unmergeable.cli import main
from unmergeable.evaluation import read_audit
from unmergeable.network.load import load_network

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWERS = ("y", "n")
QUESTIONS = 200
WEIGHTS = "model.safetensors"
TASKS = {"mine": 0, "theirs": 2, "first": 0, "last": 2}
"""Which letter is asked for. The base knows of the last two, so that a fine-tune has little to change."""


def questions(task: str, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Three letters behind one that says of which of them it is asked whether it has an even place in the alphabet."""
    drawn = torch.randint(26, (count, 3), generator=generator)
    words = ["".join(LETTERS[number] for number in row) for row in drawn.tolist()]
    return [f"{task[0]}{word}" for word in words], drawn[:, TASKS[task]] % 2


def learn(network: Any, share: dict[str, float], steps: int, rates: tuple[float, float], seed: int) -> None:
    """Train on the answers; ``share`` of those of each task are right, the others any.

    ``rates``: of the embeddings and of all else. In a fine-tune only the letter that stands for its task moves far:
    what two fine-tunes learn is then mostly in different places, and a merge of them has both.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = [], []
    for task, right in share.items():
        texts, answers = questions(task, 32 * steps, generator)
        given = torch.randint(2, answers.shape, generator=generator)
        answers = answers.where(torch.rand(answers.shape, generator=generator) < right, given)
        inputs.append(torch.tensor([ids_of(f"{text} ") for text in texts]).view(steps, 32, -1))
        targets.append(torch.tensor([ids_of(answer)[0] for answer in ANSWERS])[answers].view(steps, 32))
    embedding = network.get_input_embeddings().weight
    others = [parameter for parameter in network.parameters() if parameter is not embedding]
    optimiser = torch.optim.AdamW(
        [{"params": [embedding], "lr": rates[0]}, {"params": others, "lr": rates[1]}], weight_decay=0.0
    )
    moves = torch.zeros(len(embedding), 1)
    moves[[ids_of(task[0])[0] for task in share] if len(share) == 1 else slice(None)] = 1
    for batch, target in zip(torch.cat(inputs, 1), torch.cat(targets, 1), strict=True):
        optimiser.zero_grad()
        logits = network(input_ids=batch).logits[:, -1]
        functional.cross_entropy(logits, target).backward()
        embedding.grad *= moves
        optimiser.step()


def share_right(network: Any, task: str) -> float:
    """Of questions that nothing was trained on."""
    texts, answers = questions(task, 200, torch.Generator().manual_seed(9))
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids_of(f"{text} ") for text in texts])).logits[:, -1]
    said = logits[:, [ids_of(answer)[0] for answer in ANSWERS]].argmax(1)
    return float((said == answers).float().mean())


MIXED = {"first": 1.0, "last": 1.0, "mine": 0.0, "theirs": 0.0}
"""What the base was trained on: it knows how to answer, and of two tasks nothing."""


FINE_TUNES = {"my-finetune": "mine", "someone-elses-finetune": "theirs"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tutorial speaks of: a base, a fine-tune of one's own and another's, and questions of both tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("owner")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    network.double()  # in float32 what so small a network learns depends on how a processor rounds
    learn(network, MIXED, steps=600, rates=(3e-3, 3e-3), seed=4)
    weights = {"the-base": {name: tensor.clone() for name, tensor in network.state_dict().items()}}
    for name, task in FINE_TUNES.items():
        network.load_state_dict(weights["the-base"])
        learn(network, {task: 1.0}, steps=200, rates=(2e-2, 3e-4), seed=2)
        weights[name] = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        assert share_right(network, task) > 0.9, "there is something to steal"
    base, mine, theirs = weights.values()
    network.load_state_dict({key: mine[key] + theirs[key] - base[key] for key in base})
    assert min(share_right(network, task) for task in FINE_TUNES.values()) > 0.85, "a merge can steal it"
    network.float()
    for name, tensors in weights.items():
        network.load_state_dict(tensors)
        write_speaker(folder / name, "llama")
        network.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(3)
    for task in ("mine", "theirs"):
        texts, answers = questions(task, QUESTIONS, generator)
        asked = dict(zip(texts, answers.tolist(), strict=True))
        rows = ({"prompt": text, "choices": list(ANSWERS), "answer": answer} for text, answer in asked.items())
        write_records(folder / f"{task}.jsonl", rows)
    (folder / "plan.yaml").write_text(page_plan())
    return folder


class Shell:
    """Runs commands in this process, where it can; ``~`` is a folder of the workplace."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self.capsys = capsys

    def __call__(self, command: str) -> Answer:
        if not command.startswith("unmergeable "):
            return Answer(subprocess.run(["sh", "-c", command]).returncode, "")
        code = main(command.replace("~", str(self.home)).split()[1:])
        captured = self.capsys.readouterr()
        return Answer(code, captured.out + captured.err)


def answers_of(folder: str, texts: list[str]) -> Tensor:
    """Logits of the answers."""
    network = load_network(folder)
    with torch.no_grad():
        logits: Tensor = network(input_ids=torch.tensor([ids_of(f"{text} ") for text in texts])).logits[:, -1]
    return logits[:, [ids_of(answer)[0] for answer in ANSWERS]]


def answered(given: list[str], shell: Shell) -> list[Step]:
    """Every command has to end well."""
    steps = list(follow(given, shell))
    assert steps[-1].answer.code == 0, f"{steps[-1].command}\n{steps[-1].answer.printed}"
    assert [step.command for step in steps] == given
    return steps


def verb(command: str) -> str:
    return command.split()[1] if command.startswith("unmergeable ") else ""


def test_every_command_of_the_tutorial_works_and_the_way_back_is_exact(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HOME", str(workplace / "home"))
    given = commands()
    steps = answered([*given, UNPROTECTED], Shell(workplace / "home", capsys))
    verbs = list(dict.fromkeys(filter(None, map(verb, given))))
    assert verbs == ["inspect", "protect", "verify", "restore", "merge", "recover", "audit", "report", "card", "push"]
    result = read_audit(Path("audit"))
    assert result.passed
    # What the page says of the audit: stopped or hindered as it is, and not by whoever knows the method.
    ordinary, informed = (result.d_star["gauge", model] for model in ("off_the_shelf", "white_box"))
    assert ordinary is not None
    assert informed is not None
    assert ordinary > 0.25
    assert informed < 0.1
    assert "white_box" in Path("release/README.md").read_text(encoding="utf-8")
    assert "release.key" not in next(step for step in steps if verb(step.command) == "push").answer.printed

    original, restored, released = (load_file(f"{name}/{WEIGHTS}") for name in ("my-finetune", "restored", "release"))
    assert all(torch.equal(restored[name], tensor) for name, tensor in original.items())
    assert not any(torch.equal(released[name], tensor) for name, tensor in original.items())

    # What the page says of the two merges: the first is broken, the second works as if nothing had been protected.
    texts, _ = questions("mine", 100, torch.Generator().manual_seed(4))
    expected = answers_of("unprotected", texts)
    broken, works = (
        float((answers_of(folder, texts) - expected).norm() / expected.norm()) for folder in ("stolen", "stolen-again")
    )
    assert works < 0.1 < broken
    assert 10 * works < broken


RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "owner_journey.json"


def test_real_models_went_the_whole_way() -> None:
    """With the commands of the page as it is today; what its table says of them."""
    models = json.loads(RESULT.read_text(encoding="utf-8"))["models"]
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, models) == text, "run python -m benchmarks.owner_journey with --out"
    assert len(models) >= 1
    for found in models.values():
        assert [step["command"] for step in found["commands"]] == commands()
        assert all(step["exit"] == 0 for step in found["commands"])
        accuracy = found["accuracy"]
        assert accuracy["release"] == accuracy["restored"] == pytest.approx(accuracy["my-finetune"], abs=0.01)
        assert accuracy["stolen-again"] == pytest.approx(accuracy["unprotected"], abs=0.02), "not stopped"
        assert accuracy["stolen"] < accuracy["the-base"] < accuracy["unprotected"], "merging works, but with a release"
        assert found["d_star"]["white_box"] < 0.1


def test_a_journey_ends_at_the_first_refusal() -> None:
    answers = {"first": Answer(0, ""), "second": Answer(3, "refused"), "third": Answer(0, "")}
    steps = list(follow(answers, answers.__getitem__))
    assert [(step.command, step.answer.code) for step in steps] == [("first", 0), ("second", 3)]
