"""Merges that learn from data, as a program asks for them: from checkpoint folders and data files to a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unmergeable import ops
from unmergeable.errors import BadInput, Mismatch, UnmergeableError, UsageError
from unmergeable.merges import AdaMerging, AdaRank, Linear, engine, merge_state_dicts
from unmergeable.merges.variation import Variation
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

State = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
COUNT = 24


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_experts(place: Path, toy: str, count: int = 2, *, size: float = 0.1) -> tuple[Path, list[Path]]:
    """A base and fine-tunes of it that differ from it by noise in every tensor."""
    place.mkdir(exist_ok=True)
    base = write_toy(TOYS[toy], place / "base")
    weights = load_file(base / WEIGHTS)
    folders = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        folder = place / f"expert-{number}"
        folder.mkdir()
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        moved = {
            name: tensor + size * tensor.std().nan_to_num(1.0) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()
        }
        save_file(moved, folder / WEIGHTS, {"format": "pt"})
        folders.append(folder)
    return base, folders


def write_data(path: Path, toy: str, *, seed: int, answers_of: Path | None = None) -> Path:
    """Random inputs of a toy; labels are what the network in ``answers_of`` answers."""
    rows = [TOYS[toy].inputs(torch.Generator().manual_seed(1000 * seed + n)) for n in range(COUNT // 2)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if answers_of is not None:
        with torch.no_grad():
            arrays["label"] = load_network(answers_of)(**inputs).logits.argmax(-1).numpy()
    np.savez(path, **arrays)
    return path


def read(folder: Path) -> State:
    return load_file(folder / WEIGHTS)


# Mixtral's files cut what its modules fuse, GPT-2 has the inputs of its weights in front. The rest of the product, of
# which other tests here have vit and gpt2 too, is slow.
COVERING = [
    ("fisher", "llama"),
    ("regmean", "gpt2"),
    ("regmean", "mixtral"),
    ("adamerging", "mixtral"),
    ("adarank", "mixtral"),
]
ADAPTING = ("adamerging", "adarank")
PRODUCT = [
    (method, toy)
    for method in ("fisher", "regmean", "adamerging", "adarank")
    for toy in ("vit", "llama", "gpt2", "mixtral")
]


@pytest.mark.parametrize(
    ("method", "toy"),
    [*COVERING, *(pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT if case not in COVERING)],
)
def test_the_merge_differs_from_the_one_without_data(tmp_path: Path, toy: str, method: str) -> None:
    base, experts = write_experts(tmp_path, toy)
    data = [write_data(tmp_path / f"{number}.npz", toy, seed=number) for number in range(2)]
    settings = {"examples": 8, **({"steps": 3, "batch_size": 4} if method in ADAPTING else {})}
    result = ops.merge(
        experts=[(folder, None) for folder in experts],
        base=base,
        method=method,
        out=tmp_path / "out",
        settings=settings,
        data=data,
    )
    merged, plain = read(tmp_path / "out"), merge_state_dicts(None, [read(e) for e in experts], method=Linear())
    assert merged.keys() == plain.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    assert any(not torch.equal(merged[name], plain[name]) for name in plain)
    assert result.learnt is not None
    assert result.learnt["data"] == [str(path) for path in data]
    assert not (tmp_path / "out.statistics").exists()
    json.dumps(result.to_json())
    load_network(tmp_path / "out")


def test_adamerging_streams_what_it_learnt(tmp_path: Path) -> None:
    base, experts = write_experts(tmp_path, "vit")
    data = [write_data(tmp_path / f"{number}.npz", "vit", seed=number) for number in range(2)]
    result = ops.merge(
        experts=[(experts[0], 0.5), (experts[1], None)],
        base=base,
        method="adamerging",
        out=tmp_path / "out",
        settings={"steps": 4, "learning_rate": 0.05, "heads": "classifier", "task_vectors": "ties"},
        data=data,
    )
    assert result.learnt is not None
    coefficients = result.learnt["coefficients"]
    expected = merge_state_dicts(
        read(base),
        [read(folder) for folder in experts],
        method=AdaMerging(task_vectors="ties"),
        vary=lambda name: Variation(tuple(coefficients[name])),
    )
    merged = read(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert torch.equal(merged["classifier.weight"], read(base)["classifier.weight"])  # each task keeps its head
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    assert coefficients[name] != [0.5, 0.3]
    assert [abs(value - start) <= 4 * 0.05 + 1e-9 for value, start in zip(coefficients[name], (0.5, 0.3), strict=True)]
    assert len(result.learnt["entropies"]) == 4
    assert [expert[1] for expert in result.experts] == [None, None]


def test_adarank_streams_what_it_learnt(tmp_path: Path) -> None:
    base, experts = write_experts(tmp_path, "vit")
    data = [write_data(tmp_path / f"{number}.npz", "vit", seed=number) for number in range(2)]
    settings = {"steps": 6, "learning_rate": 0.05, "heads": "classifier", "batch_size": 4}
    result = ops.merge(
        experts=[(experts[0], 0.5), (experts[1], None)],
        base=base,
        method="adarank",
        out=tmp_path / "out",
        settings=settings,
        data=data,
    )
    assert result.learnt is not None
    coefficients, kept = result.learnt["coefficients"], result.learnt["kept"]
    merged, states = read(tmp_path / "out"), [read(folder) for folder in experts]
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    assert 0 < sum(kept[name]) < 2 * min(merged[name].shape)  # some were dropped
    assert coefficients[name] != [0.5, 0.3]
    plain = merge_state_dicts(
        read(base), states, method=AdaRank(), vary=lambda name: Variation(tuple(coefficients[name]))
    )
    # What has no mask is task arithmetic at the learnt coefficients, and of the rest what lost components is not.
    for tensor in merged:
        whole = (
            kept.get(tensor, [min(merged[tensor].shape, default=0)] * 2) == [min(merged[tensor].shape, default=0)] * 2
        )
        assert torch.equal(merged[tensor], plain[tensor]) == whole, tensor
    assert torch.equal(merged["classifier.weight"], read(base)["classifier.weight"])  # each task keeps its head
    assert len(result.learnt["entropies"]) == 6
    assert not (tmp_path / "out.statistics").exists()


def test_a_soup_leaves_out_what_makes_it_worse(tmp_path: Path) -> None:
    """Labels are the first expert's answers; the third is far away."""
    base, experts = write_experts(tmp_path, "vit", count=2, size=0.02)
    _, (*_, stranger) = write_experts(tmp_path / "far", "vit", count=3, size=5.0)
    data = write_data(tmp_path / "validation.npz", "vit", seed=0, answers_of=experts[0])
    result = ops.merge(
        experts=[(stranger, None), (experts[1], None), (experts[0], None)],
        base=base,
        method="soup",
        out=tmp_path / "out",
        data=[data],
    )
    assert result.learnt is not None
    assert result.learnt["scores"][2] == 1.0
    assert 1 not in result.learnt["soup"]
    assert result.learnt["soup"][0] == 3
    assert result.learnt["scores"][0] < 1.0  # control
    chosen = [read((stranger, experts[1], experts[0])[number - 1]) for number in sorted(result.learnt["soup"])]
    expected = merge_state_dicts(None, [*chosen, *chosen], method=Linear())
    merged = read(tmp_path / "out")
    assert all(torch.allclose(merged[n], expected[n], rtol=2e-7, atol=0) for n in expected)
    assert [value for _, value in result.experts] == [float(n in result.learnt["soup"]) for n in (1, 2, 3)]


def test_statistics_may_be_given_instead_of_data(tmp_path: Path) -> None:
    base, experts = write_experts(tmp_path, "vit")
    ones = {name: torch.ones_like(tensor) for name, tensor in read(base).items()}
    for number in (1, 2):
        folder = tmp_path / "statistics" / str(number)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        save_file(ones, folder / WEIGHTS)
    ops.merge(
        experts=[(folder, None) for folder in experts],
        method="fisher",
        out=tmp_path / "out",
        settings={"statistics": str(tmp_path / "statistics")},
    )
    expected = merge_state_dicts(None, [read(folder) for folder in experts], method=Linear())
    merged = read(tmp_path / "out")
    # a + (b - a) / 2 against (a + b) / 2: two roundings of what is added up.
    bound = {n: 4 * 2**-24 * (abs(read(experts[0])[n]) + abs(read(experts[1])[n])) for n in expected}
    assert all(bool(((merged[n] - expected[n]).abs() <= bound[n]).all()) for n in expected)


REFUSED: list[tuple[str, dict[str, Any], type[UnmergeableError], str]] = [
    ("no data", {"method": "fisher", "data": []}, UsageError, r"fisher: 2 experts and data of 0; give --data once for"),
    ("too few", {"method": "regmean", "data": ["a"]}, UsageError, r"regmean: 2 experts and data of 1"),
    (
        "soup without",
        {"method": "soup", "data": []},
        UsageError,
        r"soup: 2 experts and data of 0; give --data at least",
    ),
    ("soup weighted", {"method": "soup", "coefficient": 0.5}, UsageError, r"give them without coefficients"),
    ("data unasked", {"method": "ties"}, UsageError, r"ties merges without data; leave out --data"),
    ("both", {"method": "fisher", "settings": {"statistics": "s"}}, UsageError, r"either data or statistics, not both"),
    (
        "masks too",
        {"method": "adarank", "settings": {"statistics": "s"}},
        UsageError,
        r"either data or statistics, not",
    ),
    ("no base for masks", {"method": "adarank", "base": None}, UsageError, r"name the base"),
    ("no base", {"method": "adamerging", "base": None}, UsageError, r"name the base"),
    (
        "no head",
        {"method": "adamerging", "settings": {"heads": "score"}},
        BadInput,
        r"heads=score: no tensor begins so",
    ),
    ("no file", {"method": "fisher", "data": ["a", "gone"]}, BadInput, r"gone does not exist"),
    ("no label", {"method": "soup"}, BadInput, r"a.npz\[\d+\]: no label"),
    ("setting", {"method": "adamerging", "settings": {"steps": 0}}, UsageError, r"steps=0"),
    ("examples", {"method": "regmean", "settings": {"examples": 0}}, UsageError, r"examples=0"),
    ("alpha", {"method": "regmean", "settings": {"alpha": 2}}, UsageError, r"alpha=2.0"),
    ("labels", {"method": "fisher", "settings": {"labels": "true"}}, UsageError, r"labels must be one of sampled, "),
    ("one expert", {"method": "soup", "experts": 1}, UsageError, r"soup: 1 experts given, at least 2"),
]


@pytest.mark.parametrize(("changes", "error", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_refuses_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[UnmergeableError], message: str
) -> None:
    base, experts = write_experts(tmp_path, "vit")
    write_data(tmp_path / "a.npz", "vit", seed=0)
    changes = dict(changes)
    data = [tmp_path / f"{name}.npz" if name == "a" else tmp_path / name for name in changes.pop("data", ["a", "a"])]
    coefficient = changes.pop("coefficient", None)
    given = [(folder, coefficient) for folder in experts[: changes.pop("experts", 2)]]
    settings = {"examples": 4, **changes.pop("settings", {})} if changes["method"] != "ties" else {}
    with pytest.raises(error, match=message) as caught:
        ops.merge(
            **{"base": base, "experts": given, "data": data, "settings": settings, "out": tmp_path / "out", **changes}
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_methods_say_what_they_need() -> None:
    needs = {entry.name: list(entry.needs) for entry in ops.methods().merges}
    assert needs["adamerging"] == needs["adarank"] == ["base", "data"]
    assert [needs[name] for name in ("fisher", "regmean", "soup")] == [["data"]] * 3
    assert needs["ties"] == ["base"]


def test_folders_of_images_reach_the_network_through_its_processor(tmp_path: Path) -> None:
    """The label of an image is its folder; the base's preprocessor is used."""
    base, experts = write_experts(tmp_path, "vit", size=0.02)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(0)
    names = list(load_network(base).config.id2label.values())
    for number in range(6):
        place = tmp_path / "images" / names[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{number}.png")
    result = ops.merge(
        experts=[(folder, None) for folder in experts],
        method="soup",
        base=base,
        out=tmp_path / "out",
        data=[tmp_path / "images"],
    )
    assert result.learnt is not None
    assert all(score * 6 == pytest.approx(round(score * 6)) for score in result.learnt["scores"])
    # Control: classes have the names of the experts, whatever the base calls them.
    config = json.loads((experts[0] / "config.json").read_text())
    renamed = {number: f"kind {number}" for number in config["id2label"]}
    (experts[0] / "config.json").write_text(json.dumps({**config, "id2label": renamed}))
    with pytest.raises(BadInput, match=r"none of the network's classes \(kind 0, kind 1"):
        ops.merge(
            experts=[(folder, None) for folder in experts],
            method="soup",
            base=base,
            out=tmp_path / "renamed",
            data=[tmp_path / "images"],
        )
    (experts[0] / "config.json").write_text(json.dumps(config))
    (tmp_path / "images" / "zebra").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "zebra" / "x.png")
    with pytest.raises(BadInput, match="the label 'zebra' is none of the network's classes"):
        ops.merge(
            experts=[(folder, None) for folder in experts],
            method="soup",
            base=base,
            out=tmp_path / "other",
            data=[tmp_path / "images"],
        )


def test_lines_of_text_reach_the_network_through_its_tokenizer(tmp_path: Path) -> None:
    base, experts = write_experts(tmp_path, "gpt2")
    vocabulary = {word: number for number, word in enumerate(["[END]", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]").save_pretrained(base)
    (tmp_path / "a.txt").write_text("a b c d\nb c\n\nd e f g h\n")
    (tmp_path / "b.jsonl").write_text('{"text": "h g f e d c"}\n{"text": "a h"}\n')
    data = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    for method in ("fisher", "regmean", "adamerging", "adarank"):
        settings = {"steps": 2, "batch_size": 2} if method in ADAPTING else {}
        out = tmp_path / method
        ops.merge(experts=[(e, None) for e in experts], method=method, base=base, out=out, data=data, settings=settings)
        name = "transformer.h.0.mlp.c_fc.weight"
        assert not torch.equal(read(out)[name], read(base)[name])


def test_regmean_needs_no_head(tmp_path: Path) -> None:
    """An encoder that ends in features has inputs of its layers all the same; answers it has none."""
    base, experts = write_experts(tmp_path, "clip-vision")
    data = [write_data(tmp_path / f"{number}.npz", "clip-vision", seed=number) for number in range(2)]
    given: dict[str, Any] = {"experts": [(e, None) for e in experts], "base": base, "data": data}
    ops.merge(method="regmean", out=tmp_path / "out", **given)
    with pytest.raises(BadInput, match="no classifier and no language model"):
        ops.merge(method="fisher", out=tmp_path / "other", **given)
    assert not list(tmp_path.glob("other*"))


def test_tensors_that_the_network_does_not_use_stay_out_of_it(tmp_path: Path) -> None:
    """Older checkpoints hold masks and position ids that loading passes over."""
    base, experts = write_experts(tmp_path, "vit")
    for folder in (base, *experts):
        tensors = read(folder)
        save_file({**tensors, "h.0.attn.bias": torch.ones(2, 2), "ids": torch.arange(3)}, folder / WEIGHTS)
    data = [write_data(tmp_path / f"{number}.npz", "vit", seed=number, answers_of=base) for number in range(2)]
    for method in ("fisher", "regmean", "adamerging", "adarank", "soup"):
        settings = {"steps": 2} if method in ADAPTING else {}
        out = tmp_path / method
        ops.merge(experts=[(e, None) for e in experts], base=base, method=method, out=out, data=data, settings=settings)
        assert torch.equal(read(out)["h.0.attn.bias"], torch.ones(2, 2))
        assert torch.equal(read(out)["ids"], torch.arange(3))


def test_experts_of_another_architecture_are_refused_before_anything_is_learnt(tmp_path: Path) -> None:
    base, experts = write_experts(tmp_path, "vit")
    _, others = write_experts(tmp_path / "other", "bert-classification")
    given = [(experts[0], None), (others[0], None)]
    with pytest.raises(Mismatch, match=r"expert 2: tensor '.*' is "):
        ops.merge(experts=given, base=base, method="soup", out=tmp_path / "out", data=[tmp_path / "unread.npz"])


def test_what_a_killed_merge_left_behind_is_no_part_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statistics are gathered again; and its half of a merge is not taken over by one of other data."""
    base, experts = write_experts(tmp_path, "vit")
    data = [write_data(tmp_path / f"{number}.npz", "vit", seed=number) for number in range(3)]
    given: dict[str, Any] = {"experts": [(e, None) for e in experts], "base": base, "method": "regmean"}
    recipes = []
    real = engine.merge

    def killed(*arguments: Any, **options: Any) -> None:
        method, out = arguments[2], arguments[3]
        recipes.append(method.statistics)
        shutil.copytree(out.with_name("out.statistics"), tmp_path / "left", dirs_exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "merge", killed)
    for chosen in (data[:2], data[:2], data[1:]):
        with pytest.raises(KeyboardInterrupt):
            ops.merge(out=tmp_path / "out", data=chosen, **given)
    assert recipes[0] == recipes[1] != recipes[2]
    assert not list(tmp_path.glob("out*"))

    monkeypatch.setattr(engine, "merge", real)
    (tmp_path / "left").rename(tmp_path / "out.statistics")
    ops.merge(out=tmp_path / "out", data=data[:2], **given)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    (tmp_path / "other.statistics" / "theirs").mkdir(parents=True)  # control: a folder of somebody else's stays
    with pytest.raises(BadInput, match=r"other.statistics holds the unfinished work of another request: remove it"):
        ops.merge(out=tmp_path / "other", data=data[:2], **given)
    assert (tmp_path / "other.statistics").is_dir()
