"""What an error message says to do is done, on the very input that failed; and then the command works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merges.networks_on_disk import EMBEDDING, HIDDEN, language_model, write
from unmergeable.cli import main
from zoo import TOYS, write_toy

BAD_INPUT = 3

Command = Sequence[str | Path]


def run(command: Command, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it printed on either stream."""
    capsys.readouterr()
    code = main([str(word) for word in command])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def options_of(message: str) -> list[list[str]]:
    """The options that a message offers, each with its value."""
    return [
        found.split() for found in re.findall(r"--[a-z-]+(?: (?:base|union|\d+|bfloat16|float16|float32)\b)?", message)
    ]


def follow(message: str, command: Command, out: Path) -> list[Command]:
    """The commands to try next: the same with each option that is offered, or with the folder that is to be passed."""
    if code := re.search(r'python -c "(.*)"', message):
        exec(code[1], {})
        return [command]
    if folder := re.search(r"pass (?:its snapshot )?(/\S+?)\.?(?:$|\s)", message):
        inside = Path(folder[1])
        return [[inside if Path(word) in inside.parents else word for word in command]]
    tried = []
    for number, option in enumerate(options_of(message)):
        again = [out.with_name(f"{out.name}{number}") if word == out else word for word in command]
        tried.append([*again, *option])
    return tried


def llama(folder: Path, seed: int = 0) -> Path:
    write_toy(TOYS["llama"], folder, seed=seed)
    return folder


def pickled(folder: Path, seed: int = 1) -> Path:
    llama(folder, seed)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def merge_pickled(place: Path) -> Command:
    base, expert = llama(place / "base"), pickled(place / "a")
    return "merge", "--base", base, "--expert", f"{expert}=1", "--method", "task_arithmetic", "--out", place / "out"


def inspect_pickled(place: Path) -> Command:
    return "inspect", pickled(place / "a")


def recover_pickled(place: Path) -> Command:
    base, expert = llama(place / "base"), pickled(place / "a")
    return "recover", expert, "--base", base, "--method", "nearest_orbit", "--out", place / "out"


def verify_pickled(place: Path) -> Command:
    return "verify", llama(place / "b", seed=1), pickled(place / "a")


def inspect_the_hubs_cache(place: Path) -> Command:
    cache = place / "models--org--name"
    for name in ("blobs", "refs", "snapshots"):
        (cache / name).mkdir(parents=True)
    llama(cache / "snapshots" / "abc")
    return "inspect", cache


def inspect_a_training_run(place: Path) -> Command:
    for step in (500, 1000):
        llama(place / "run" / f"checkpoint-{step}")
    return "inspect", place / "run"


def merge(place: Path, base: Path, *experts: Path) -> Command:
    words = [word for expert in experts for word in ("--expert", f"{expert}=0.5")]
    return "merge", "--base", base, *words, "--method", "task_arithmetic", "--out", place / "out"


def merge_classifiers(place: Path) -> Command:
    heads = {"score.weight": torch.ones(3, HIDDEN)}
    experts = [write(place / name, {**language_model(seed), **heads}) for seed, name in enumerate("ab", 1)]
    return merge(place, write(place / "base", language_model(0)), *experts)


def merge_heads_of_other_labels(place: Path) -> Command:
    folders = [
        write(place / str(labels), {**language_model(labels), "classifier.weight": torch.ones(labels, HIDDEN)})
        for labels in (2, 3)
    ]
    return merge(place, *folders)


FAILING: list[Callable[[Path], Command]] = [
    merge_pickled,
    inspect_pickled,
    recover_pickled,
    verify_pickled,
    inspect_the_hubs_cache,
    inspect_a_training_run,
    merge_classifiers,
    merge_heads_of_other_labels,
]


@pytest.mark.parametrize("failing", FAILING, ids=lambda function: function.__name__)
def test_what_a_message_says_to_do_works(
    failing: Callable[[Path], Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = failing(tmp_path)
    code, message = run(command, capsys)
    assert code == BAD_INPUT, message
    assert len(message.strip().splitlines()) == 1
    remedies = follow(message, command, tmp_path / "out")
    assert remedies, message
    for remedy in remedies:
        code, printed = run(remedy, capsys)
        assert code == 0, printed


def test_files_that_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    code, message = run(["inspect", folder], capsys)
    assert code == BAD_INPUT
    assert "remove the one that is out of date" in message
    (folder / "model.safetensors.index.json").unlink()
    assert run(["inspect", folder], capsys)[0] == 0


def test_a_note_that_names_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens left out are kept with what the note names."""
    tokens = {letter: row for row, letter in enumerate("abcdefghi")}
    longer = language_model(1)
    longer[EMBEDDING] = torch.cat([longer[EMBEDDING], torch.ones(1, HIDDEN)])
    base = write(tmp_path / "base", language_model(0), tokens)
    command = merge(tmp_path, base, write(tmp_path / "a", longer, {**tokens, "<x>": 9}))
    code, printed = run(command, capsys)
    assert code == 0
    (remedy,) = follow(printed, command, tmp_path / "out")
    assert run(remedy, capsys)[0] == 0
    assert load_file(tmp_path / "out0" / "model.safetensors")[EMBEDDING].shape == (10, HIDDEN)


@pytest.mark.slow
def test_the_precision_that_mergekit_is_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from merges.mergekit.test_backend import write_llamas

    folders = write_llamas(tmp_path, 2, attention_bias=False)
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
        shutil.copy(folder / "config.json", tmp_path / "config.json")
        from safetensors.torch import save_file

        save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    command = [*merge(tmp_path, *folders), "--backend", "mergekit"]
    code, message = run(command, capsys)
    assert code == BAD_INPUT
    (remedy,) = follow(message, command, tmp_path / "out")
    assert run(remedy, capsys)[0] == 0
