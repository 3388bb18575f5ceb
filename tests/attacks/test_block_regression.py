"""On live networks of several families: whatever was done to a release, the base computes it afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.planted import Build, Network
from unmergeable.attacks.block_regression.fitting import Coordinates, coordinates, fit
from unmergeable.attacks.block_regression.inputs import complete, drawn
from unmergeable.attacks.block_regression.recording import layer_stacks, record
from unmergeable.attacks.block_regression.regression import RegressionResult, block_regression
from unmergeable.attacks.block_regression.stream_map import find_map, match_layers, rows_of
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation.planted import planted
from unmergeable.gauge.groups import haar
from unmergeable.network.encoding import EncodedBatch
from unmergeable.randomness import Stream
from zoo import TOYS, load_toy, random_network

ROWS, WIDTH = 400, 12


def live(name: str, source: MemorySource, folder: Path) -> Any:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in source.tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return load_toy(folder, TOYS[name])


def inputs(name: str, seeds: range) -> list[EncodedBatch]:
    return [EncodedBatch(TOYS[name].inputs(torch.Generator().manual_seed(seed))) for seed in seeds]


@torch.no_grad()
def gap(name: str, network: nn.Module, other: nn.Module) -> float:
    """Relative distance of outputs on inputs that were not fitted."""
    found = [
        (getattr(network(**batch.inputs), TOYS[name].output), getattr(other(**batch.inputs), TOYS[name].output))
        for batch in inputs(name, range(900, 904))
    ]
    away = sum(float((x - y).square().sum()) for x, y in found)
    return (away / sum(float(y.square().sum()) for _, y in found)) ** 0.5


def attacked(
    network: Network, release: MemorySource, folder: Path, batches: list[EncodedBatch] | None = None
) -> tuple[float, float, RegressionResult]:
    """How far the base's outputs are from the release's before and after, and what was found."""
    name = network.name
    student = live(name, network.base, folder / "base")
    teacher = live(name, release, folder / "release")
    before = gap(name, student, teacher)
    shapes = {key: tensor.shape for key, tensor in network.base.tensors.items()}
    tables = {key: tensor for key, tensor in release.tensors.items() if shapes.get(key) == tensor.shape}
    batches = inputs(name, range(40)) if batches is None else batches
    result = block_regression(student, teacher, network.architecture, batches, tables=tables, steps=8)
    return before, gap(name, student, teacher), result


MORE = ("bert-embedding", "gpt2", "t5", "vit")


@pytest.mark.parametrize("name", ["dinov2", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_whatever_was_planted_hides_nothing(name: str, network: Build, tmp_path: Path) -> None:
    """The rigged release comes as near as the bare expert, up to a half; both far nearer than the base was."""
    toy = network(name)
    expert = toy.expert(0.1)
    (tmp_path / "bare").mkdir()
    before, bare, _ = attacked(toy, expert, tmp_path / "bare")
    (tmp_path / "rigged").mkdir()
    _, rigged, result = attacked(toy, planted(expert, toy.architecture, 1).source, tmp_path / "rigged")
    assert result.is_recognised
    assert bare < before
    assert rigged < before
    assert rigged < 1.5 * bare
    assert result.median("after") < 0.6 * result.median("before")
    assert set(result.weights) >= {key for key in toy.base.tensors if "lm_head" not in key}


def test_inputs_that_say_nothing_teach_nothing(network: Build, tmp_path: Path) -> None:
    """The control: one token over and over leaves the release as far as the base was from it, or further."""
    toy = network("llama")
    same = [EncodedBatch({"input_ids": torch.full((2, 11), 7)}) for _ in range(40)]
    (tmp_path / "same").mkdir()
    before, after, _ = attacked(toy, toy.expert(0.1), tmp_path / "same", same)
    (tmp_path / "text").mkdir()
    _, taught, _ = attacked(toy, toy.expert(0.1), tmp_path / "text")
    assert taught < 0.7 * before
    assert after > 0.8 * before


def test_another_network_is_not_recognised(network: Build, tmp_path: Path) -> None:
    toy = network("llama")
    other = random_network(TOYS["llama"], seed=9)
    release = MemorySource({key: tensor.detach() for key, tensor in other.state_dict().items()}, toy.base.config)
    before, after, result = attacked(toy, release, tmp_path)
    assert not result.is_recognised
    assert after == before
    assert result.maps[0].unexplained > 0.5


def streams(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 2, WIDTH)
    return [torch.randn(ROWS, WIDTH, generator=generator) * spread for _ in range(3)]


def test_the_smallest_map_is_found() -> None:
    base = streams()
    learnt = [y + 0.1 * x for y, x in zip(base, streams(1), strict=True)]
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    signs = torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    rotation = haar(1, WIDTH, Stream.from_seed(3))[0].float()
    stretched = rotation * torch.linspace(0.2, 3, WIDTH)
    away = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    for kind, change in {
        "none": lambda y: y,
        "permutation": lambda y: (y * signs)[:, order],
        "rotation": lambda y: 3 * y @ rotation,
        "linear": lambda y: y @ stretched,
    }.items():
        for constant in (0.0, 2.0):
            release = [change(y) + constant * away for y in learnt]
            found = find_map(release, base, is_centred=False)
            assert found.kind == kind
            assert bool(found.constants.any()) == (constant != 0)
            for layer, (x, y) in enumerate(zip(release, learnt, strict=True)):
                # What is left is at most what was learnt, a tenth, and what a free matrix makes of it.
                assert float((found.of(x, layer) - y).norm()) <= 0.15 * float(y.norm())
    unrelated = find_map(streams(7), base, is_centred=False)
    assert unrelated.unexplained > 0.9


def test_a_map_is_found_from_some_rows_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over all batches, in the same places of both streams; all of them where there are few."""
    stream_map = sys.modules[rows_of.__module__]
    monkeypatch.setattr(stream_map, "ROWS", 50)
    monkeypatch.setattr(stream_map, "ROWS_OF_WIDTH", 2)
    batches = [torch.arange(start, start + 70.0)[:, None].expand(-1, 4) for start in (0, 70, 140, 210)]
    (found,) = rows_of([batches])
    assert found[:, 0].tolist() == list(range(0, 280, 5))
    (wide,) = rows_of([[batch.repeat(1, 10) for batch in batches]])
    assert wide[:, 0].tolist() == list(range(0, 280, 3)), "twice the width of 40"
    (few,) = rows_of([batches[:1]])
    assert len(few) == 70


def test_layers_are_matched_past_those_that_do_nothing() -> None:
    base = [torch.stack([torch.arange(ROWS) * 1.0, torch.sin(torch.arange(ROWS) * (1.0 + at))], 1) for at in range(4)]
    release = [base[0], base[0], base[1], base[1] + 9 * torch.rand(ROWS, 2), base[2], base[3], base[3]]
    places = match_layers(release, base, is_centred=False)
    assert places[0] == 0
    assert places[-1] == 6
    assert places[1] == 2
    assert places[2] == 4
    assert match_layers(base, base, is_centred=False) == (0, 1, 2, 3)


def test_a_linear_layer_is_fitted_as_least_squares_fits_it() -> None:
    """Against the closed form; the control: of inputs never seen nothing is learnt."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 6, generator=generator))
    seen = torch.randn(200, 5, generator=generator)
    rows = torch.cat([seen, torch.zeros(200, 1)], dim=1)
    wanted = torch.randn(3, 6, generator=generator)
    target = rows @ wanted.T
    start = layer.weight.detach().clone()

    def losses(weights: Any) -> Any:
        yield (rows @ weights["weight"].T - target).square().sum() / target.square().sum()

    moved = coordinates(layer, ["weight"], lambda: layer(rows))
    assert moved["weight"].whiten is not None
    fitted, result = fit("layer", moved, losses, ridge=0.0, steps=12)
    assert result.after <= 1e-3 < result.before
    assert float((fitted["weight"][:, :5] - wanted[:, :5]).norm()) <= 5e-3 * float(wanted.norm())
    assert torch.equal(fitted["weight"][:, 5], start[:, 5])
    pulled, _ = fit("layer", moved, losses, ridge=1e3, steps=12)
    assert float((pulled["weight"] - start).norm()) < 0.1 * float((fitted["weight"] - start).norm())
    assert Coordinates(start, scale=2.0).at(torch.ones(3, 6)).equal(start + 2)


def test_inputs_are_drawn_for_what_a_network_reads() -> None:
    for name, shape in (("llama", (32, 32)), ("vit", (32, 3, 32, 32)), ("t5", (32, 32))):
        network = random_network(TOYS[name])
        task = drawn(network, examples=40, seed=0)
        batches = complete(network, task)
        assert [len(batch) for batch in batches] == [32, 8]
        assert next(iter(batches[0].inputs.values())).shape == shape
        recording = record(network, batches[:1])
        assert len(recording.streams) == len(layer_stacks(network)) == (2 if name == "t5" else 1)
        again = complete(network, drawn(network, examples=40, seed=0))
        key = next(iter(batches[0].inputs))
        assert torch.equal(batches[0].inputs[key], again[0].inputs[key])
    with pytest.raises(UsageError, match="cannot be drawn: give --data"):
        drawn(random_network(TOYS["unet-sd15"]), examples=2, seed=0)
    assert np.isfinite(float(batches[0].inputs["input_ids"].double().mean()))


def test_refuses_what_it_cannot_follow() -> None:
    with pytest.raises(BadInput, match="has no run of layers"):
        record(nn.Linear(3, 3), [])


def test_a_choice_among_many_tokens_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fitted to it, and it takes more memory than all streams: of 128 000 tokens, 8 GB for 512 examples."""
    network = random_network(TOYS["llama"])
    batches = complete(network, drawn(network, examples=4, seed=0))
    kept = record(network, batches)
    assert kept.outputs[0].shape == (4, 32, network.config.vocab_size)
    monkeypatch.setattr(sys.modules[record.__module__], "WIDE", network.config.vocab_size - 1)
    without = record(network, batches)
    assert without.outputs == ()
    assert all(map(torch.equal, without.streams[0][-1], kept.streams[0][-1]))
