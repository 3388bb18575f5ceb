"""Vocabularies that differ: rows of the same token are merged, as many as the chosen tokenizer has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merges.networks_on_disk import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    ROWS,
    close,
    config_of,
    half_of_each,
    language_model,
    merged,
    notes_of,
    write,
)
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import Linear, Ties
from unmergeable.merges.vocabularies import Tokenizer, TokenSource

BASE, FIRST, SECOND = (language_model(seed) for seed in range(3))
TOKENS = {letter: row for row, letter in enumerate("abcdefghi")}


def grown(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    more = torch.full((rows - ROWS, HIDDEN), 7.0)
    return {**state, EMBEDDING: torch.cat([state[EMBEDDING], more])}


def rows_of(*rows: Tensor) -> Tensor:
    return torch.stack(rows)


@pytest.mark.parametrize("block", [1, 5, 2**18])
def test_rows_in_common_are_merged_by_number_without_tokenizers(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, in the expert; blocks may end anywhere in a row."""
    monkeypatch.setattr("unmergeable.merges.blocks.BLOCK_ELEMENTS", block)
    base = write(tmp_path / "base", BASE)
    found = merged(base, [write(tmp_path / "a", grown(FIRST, 16)), write(tmp_path / "b", SECOND)], tmp_path / "out")
    assert close(found[EMBEDDING], half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING], SECOND[EMBEDDING]))
    assert config_of(tmp_path / "out")["vocab_size"] == ROWS
    assert "expert 1 has 16 rows of tokens, base 9: 9 merge, 7 are left out" in notes_of(tmp_path / "out")


def test_rows_that_an_expert_lacks_stay_the_bases(tmp_path: Path) -> None:
    short = {**FIRST, EMBEDDING: FIRST[EMBEDDING][:6]}
    folders = write(tmp_path / "base", BASE), [write(tmp_path / "a", short)]
    found = merged(*folders, tmp_path / "out")
    assert close(found[EMBEDDING][:6], half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING])[:6])
    assert torch.equal(found[EMBEDDING][6:], BASE[EMBEDDING][6:])
    assert "9 rows" not in notes_of(tmp_path / "out") or "6 merge" in notes_of(tmp_path / "out")


def test_rows_are_merged_by_token_where_tokenizers_tell(tmp_path: Path) -> None:
    """The expert's vocabulary is in another order, and one longer."""
    order = [3, 1, 4, 0, 5, 8, 2, 6, 7]
    tokens = {"abcdefghi"[old]: new for new, old in enumerate(order)} | {"<x>": 9}
    shuffled = {**FIRST, EMBEDDING: torch.cat([FIRST[EMBEDDING][order], torch.full((1, HIDDEN), 5.0)])}
    base = write(tmp_path / "base", BASE, TOKENS)
    found = merged(base, [write(tmp_path / "a", shuffled, tokens)], tmp_path / "out")
    assert close(found[EMBEDDING], half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING]))
    assert "left out ('<x>'); --tokenizer union" in notes_of(tmp_path / "out")
    # Control: by number it would be another merge.
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    by_number = merged(base, [tmp_path / "a"], tmp_path / "control")
    assert not close(by_number[EMBEDDING], found[EMBEDDING])


def union_of_two(tmp_path: Path) -> tuple[Path, list[Path]]:
    first = {**TOKENS, "<x>": 9, "<y>": 10}
    second = {**TOKENS, "<y>": 9, "<z>": 10}
    base = write(tmp_path / "base", BASE, TOKENS)
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    new = {"a": grown(FIRST, 11), "b": grown(SECOND, 11)}
    for number, state in enumerate(new.values(), start=1):
        state[EMBEDDING][9:] = torch.arange(2 * HIDDEN).reshape(2, HIDDEN) * number
    return base, [write(tmp_path / "a", new["a"], first), write(tmp_path / "b", new["b"], second)]


def test_the_union_of_tokens(tmp_path: Path) -> None:
    base, experts = union_of_two(tmp_path)
    found = merged(base, experts, tmp_path / "out", tokenizer=Tokenizer("union"))[EMBEDDING]
    assert close(found[:ROWS], half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING], SECOND[EMBEDDING]))
    x, y = torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    # <x> is known to one expert: in all models it is that row. <y> is known to both: the mean of both stands for the
    # base's, and each half of the difference to it is added, which cancels. <z> is the second's own.
    mean = (y + 2 * x) / 2
    assert close(found[ROWS:], rows_of(x, half_of_each(mean, y, 2 * x), 2 * y))
    assert config_of(tmp_path / "out")["vocab_size"] == ROWS + 3
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [(entry["id"], entry["content"]) for entry in written["added_tokens"]] == [
        (9, "<x>"),
        (10, "<y>"),
        (11, "<z>"),
    ]
    decoder = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["11"]["content"] == "<z>"
    assert "id" not in decoder["11"]


def test_transformers_reads_a_united_tokenizer(tmp_path: Path) -> None:
    base, experts = union_of_two(tmp_path)
    merged(base, experts, tmp_path / "out", tokenizer=Tokenizer("union"))
    from tokenizers import Tokenizer as Reader

    reader = Reader.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert reader.get_vocab() == TOKENS | {"<x>": 9, "<y>": 10, "<z>": 11}
    assert reader.encode("<z>").ids == [11]


def test_the_tokens_of_the_base_or_of_an_expert(tmp_path: Path) -> None:
    base, experts = union_of_two(tmp_path)
    ours = merged(base, experts, tmp_path / "ours", tokenizer=Tokenizer("base"))
    assert ours[EMBEDDING].shape == (ROWS, HIDDEN)
    theirs = merged(base, experts, tmp_path / "theirs", tokenizer=Tokenizer(2))[EMBEDDING]
    _, y = torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    assert close(theirs[10], 2 * y)
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (experts[1] / "tokenizer.json").read_bytes()
    assert not (tmp_path / "theirs" / "tokenizer_config.json").exists()  # the base's, of another tokenizer


def test_a_chosen_tokenizer_cuts_padding(tmp_path: Path) -> None:
    base = write(tmp_path / "base", grown(BASE, 16), TOKENS, vocab_size=16)
    expert = write(tmp_path / "a", grown(FIRST, 16), TOKENS, vocab_size=16)
    found = merged(base, [expert], tmp_path / "out", tokenizer=Tokenizer("base"))
    assert close(found[EMBEDDING], half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING]))
    assert config_of(tmp_path / "out")["vocab_size"] == ROWS
    kept = merged(base, [expert], tmp_path / "kept")
    assert kept[EMBEDDING].shape == (16, HIDDEN)


def test_single_tokens_come_from_where_they_are_said_to(tmp_path: Path) -> None:
    base, experts = union_of_two(tmp_path)
    tokens = {
        "<y>": TokenSource(1, force=True),
        "<x>": TokenSource(None),
        "<z>": TokenSource("base", token="c"),
        "b": TokenSource(2, row=0, force=True),
    }
    found = merged(base, experts, tmp_path / "out", tokenizer=Tokenizer("union", tokens))[EMBEDDING]
    x, y = torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    # Forced ones are so in every model; the others only where a model lacks the token.
    assert close(found[10], y)
    assert close(found[9], half_of_each(torch.zeros(HIDDEN), x, torch.zeros(HIDDEN)))
    c = BASE[EMBEDDING][2]
    assert close(found[11], half_of_each(c, c, 2 * y))
    assert close(found[1], SECOND[EMBEDDING][0])


def test_heads_and_their_biases_follow(tmp_path: Path) -> None:
    def untied(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        tall = grown(state, rows)
        return {**tall, HEAD: -tall[EMBEDDING], "lm_head.bias": tall[EMBEDDING][:, 0].clone()}

    base = write(tmp_path / "base", untied(BASE, ROWS), tie_word_embeddings=False)
    expert = write(tmp_path / "a", untied(FIRST, 12), tie_word_embeddings=False)
    found = merged(base, [expert], tmp_path / "out")
    expected = half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING])
    assert close(found[HEAD], -expected)
    assert close(found["lm_head.bias"], expected[:, 0])


@pytest.mark.parametrize("threads", [1, 4])
def test_files_of_another_precision_and_methods_that_rank(threads: int, tmp_path: Path) -> None:
    base = write(tmp_path / "base", {n: t.bfloat16() for n, t in BASE.items()})
    experts = [write(tmp_path / "a", grown(FIRST, 12)), write(tmp_path / "b", {n: t.half() for n, t in SECOND.items()})]
    found = merged(base, experts, tmp_path / "out", method=Ties(), threads=threads)
    cut = write(tmp_path / "cut", FIRST)
    expected = merged(base, [cut, experts[1]], tmp_path / "expected", method=Ties(), threads=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_average_without_a_base(tmp_path: Path) -> None:
    _, experts = union_of_two(tmp_path)
    found = merged(None, experts, tmp_path / "out", method=Linear(), tokenizer=Tokenizer("union"))[EMBEDDING]
    x, y = torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    assert close(found[ROWS:], rows_of(x, (y + 2 * x) / 2, 2 * y))


REFUSED: dict[str, tuple[Tokenizer, type[Exception], str]] = {
    "no such expert": (Tokenizer(3), UsageError, "tokenizer 3: no such model"),
    "no such token": (Tokenizer("union", {"<q>": TokenSource(1)}), UsageError, "no token '<q>'"),
    "not there": (Tokenizer("union", {"<x>": TokenSource("base")}), UsageError, "base has no token '<x>'"),
}


@pytest.mark.parametrize(("tokenizer", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_choices_that_cannot_be(tokenizer: Tokenizer, error: type[Exception], message: str, tmp_path: Path) -> None:
    base, experts = union_of_two(tmp_path)
    with pytest.raises(error, match=message):
        merged(base, experts, tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.glob("out*"))


def test_a_choice_needs_a_tokenizer(tmp_path: Path) -> None:
    folders = write(tmp_path / "base", BASE), [write(tmp_path / "a", FIRST)]
    with pytest.raises(BadInput, match=r"no tokenizer.json to align tokens by"):
        merged(*folders, tmp_path / "out", tokenizer=Tokenizer("union"))
