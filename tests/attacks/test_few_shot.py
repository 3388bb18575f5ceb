"""What an attacker does with n examples: folds and rates, and the training of a live network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from network.small_classifier import FEATURES, Classifier, make_task, predict
from unmergeable.attacks import FewShot
from unmergeable.attacks.few_shot import FOLDS, JUDGED, few_shot, in_last_layers, parse_rates, turns
from unmergeable.errors import BadInput, Mismatch, UnmergeableError, UsageError
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import fine_tune, gather_examples
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.train import Schedule
from zoo import TOYS, write_toy


@pytest.mark.parametrize(
    ("samples", "expected"), [(2, (2, 2)), (3, (3, 3)), (16, (4, 4)), (100, (4, 2)), (1000, (4, 1))]
)
def test_as_many_folds_take_a_turn_as_the_judgement_needs(samples: int, expected: tuple[int, int]) -> None:
    folds, used = turns(samples)
    assert (folds, used) == expected
    judged = used * samples / folds
    assert judged >= min(JUDGED, samples)
    assert used == 1 or (used - 1) * samples / FOLDS < JUDGED  # one less would not do


def test_rates_are_read_from_text() -> None:
    assert parse_rates("1e-3") == (1e-3,)
    assert parse_rates("3e-5, 1e-4") == (3e-5, 1e-4)
    assert len(parse_rates(FewShot().learning_rates)) > 1


@pytest.mark.parametrize("text", ["", "1e-3;1e-4", "0", "-1", "1,nan", "inf", "1,,2"])
def test_rates_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give positive numbers separated by commas"):
        parse_rates(text)


State = dict[str, Tensor]

EXPERT = 7
"""Seed of the network whose answers are the labels."""


def state(seed: int, *, noise: float = 0.0) -> State:
    """Weights of a classifier; ``noise`` is what a protection or a merge did to them."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        name: tensor + noise * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in Classifier(seed).state_dict().items()
    }


def answered(count: int, seed: int) -> Task:
    """Random features with the expert's answers."""
    features = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        labels = Classifier(EXPERT)(features).argmax(-1)
    return Task(f"answers {seed}", [EncodedBatch({"features": features}, labels)], predict)


def scored(weights: State, task: Task) -> float:
    network = Classifier()
    network.load_state_dict(weights)
    return accuracy(network, task)


def test_beats_the_same_examples_without_the_victim() -> None:
    """What is left of the victim is worth more than the examples alone."""
    network, task, test = Classifier(), answered(100, 1), answered(1000, 2)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    broken = state(EXPERT, noise=0.5)
    kept = {name: tensor.clone() for name, tensor in broken.items()}
    method = FewShot(learning_rates="1e-3,1e-2,3e-2")
    attack = few_shot(network, broken, task, method)
    control = few_shot(network, state(3), task, method)

    assert scored(dict(attack.weights), test) > scored(broken, test) + 0.05
    assert scored(dict(attack.weights), test) > scored(dict(control.weights), test) + 0.05
    assert scored(dict(control.weights), test) > scored(state(3), test) + 0.05  # which does learn
    assert list(attack.weights) == list(broken)
    assert all(torch.equal(broken[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in own.items())
    assert len(attack.losses) == method.steps


def test_takes_the_rate_that_does_best_on_what_was_left_out() -> None:
    """Checked by hand for one rate: four folds of 16 examples, each judged once by the other twelve."""
    task, start = answered(16, 1), state(EXPERT, noise=0.3)
    method = FewShot(samples=16, learning_rates="1e-2,1e6", steps=20)
    result = few_shot(Classifier(), start, task, method)

    assert [trial.learning_rate for trial in result.trials] == [0.0, 1e-2, 1e6]
    untouched, chosen, wild = result.trials
    assert untouched.accuracy == scored(start, task)  # every example was left out once
    # By luck the wild rate is right more often; its loss gives it away.
    assert wild.accuracy > chosen.accuracy
    assert wild.loss > 100 > chosen.loss
    assert result.learning_rate == min((untouched, chosen), key=lambda trial: trial.loss).learning_rate

    examples = gather_examples(task, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    right = 0
    for left_out in order.split(4):
        network = Classifier()
        network.load_state_dict(start)
        others = torch.tensor([number for number in order.tolist() if number not in left_out.tolist()])
        features, labels = examples.inputs["features"], examples.labels
        assert labels is not None
        fold = EncodedBatch({"features": features[others]}, labels[others])
        fine_tune(network, predict, fold, Schedule(20, 1e-2), batch_size=16)
        right += int((network(features[left_out]).argmax(-1) == labels[left_out]).sum())
    assert chosen.accuracy == right / 16


def test_weights_that_need_nothing_stay_as_they_are() -> None:
    """Not training is one of the choices."""
    start = state(EXPERT)
    result = few_shot(Classifier(), start, answered(16, 1), FewShot(samples=16, learning_rates="3,10", steps=5))
    assert result.learning_rate == 0
    assert result.losses == ()
    assert all(torch.equal(result.weights[name], start[name]) for name in start)


def test_one_rate_is_taken_without_a_sweep() -> None:
    task, start = answered(16, 1), state(EXPERT, noise=0.3)
    method = FewShot(samples=16, learning_rates="1e-2", steps=5)
    result = few_shot(Classifier(), start, task, method)
    network = Classifier()
    network.load_state_dict(start)
    losses = fine_tune(network, predict, gather_examples(task, 16), Schedule(5, 1e-2), batch_size=16)
    assert result.trials == ()
    assert result.losses == tuple(losses)
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in network.state_dict().items())


def test_only_the_first_samples_are_used() -> None:
    method = FewShot(samples=16, learning_rates="1e-2", steps=5)
    start = state(EXPERT, noise=0.3)
    short, long, other = (
        few_shot(Classifier(), start, task, method).losses
        for task in (answered(16, 1), answered(40, 1), answered(16, 2))
    )
    assert short == long  # the first 16 of the 40 are the same
    assert other != short  # the control


@pytest.mark.parametrize("toy", ["vit", "gpt2"])
def test_low_rank_updates_reach_the_names_on_disk(toy: str, tmp_path: Path) -> None:
    """Classes of images, and the next token of texts."""
    folder = write_toy(TOYS[toy], tmp_path / "toy")
    network, weights = load_network(folder), load_file(folder / "model.safetensors")
    inputs = {
        name: torch.cat([TOYS[toy].inputs(torch.Generator().manual_seed(seed))[name] for seed in range(4)])
        for name in TOYS[toy].inputs(torch.Generator())
    }
    count = len(next(iter(inputs.values())))
    labels = torch.arange(count) % 5 if toy == "vit" else None
    task = Task("toy", [EncodedBatch(inputs, labels)])
    method = FewShot(samples=count, learning_rates="1e-2,1e-3", steps=3, low_rank=2)
    result = few_shot(network, weights, task, method)

    assert result.weights.keys() == weights.keys()
    # Weights by rate 0 are the weights; any other rate moves matrices by rank 2 and nothing else.
    forced = few_shot(network, weights, task, FewShot(samples=count, learning_rates="1e-2", steps=3, low_rank=2))
    changed = [name for name in weights if not torch.equal(forced.weights[name], weights[name])]
    assert changed
    for name in changed:
        assert weights[name].dim() == 2
        values = torch.linalg.svdvals(forced.weights[name].double() - weights[name].double())
        assert float(values[2:].max()) <= 2**-23 * float(weights[name].norm())
        assert float(values[0]) > 1e-4
    assert not any("embed" in name or "wte" in name for name in changed)
    full = few_shot(network, weights, task, FewShot(samples=count, learning_rates="1e-2", steps=3))
    assert sum(not torch.equal(full.weights[name], weights[name]) for name in weights) > len(changed)


def test_refuses() -> None:
    start = state(0)
    with pytest.raises(BadInput, match="16 examples where 17"):
        few_shot(Classifier(), start, answered(16, 1), FewShot(samples=17))
    with pytest.raises(BadInput, match="no labels"):
        few_shot(Classifier(), start, make_task(16, 4, labels=False), FewShot(samples=16))
    with pytest.raises(Mismatch, match="the network has no such tensor"):
        few_shot(Classifier(), {"other": torch.ones(2)}, answered(16, 1), FewShot(samples=16))
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in start.items()}
    with pytest.raises(UnmergeableError, match="lower the learning rate"):
        few_shot(Classifier(), nan, answered(16, 1), FewShot(samples=16, learning_rates="0.1"))
    with pytest.raises(UnmergeableError, match="no rate gives a finite loss"):
        few_shot(Classifier(), nan, answered(16, 1), FewShot(samples=16))
    for settings, message in (
        ({"samples": 1}, "samples=1"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rates": "1e-3;1"}, "separated by commas"),
        ({"learning_rates": "0"}, "positive numbers"),
        ({"low_rank": -1}, "low_rank=-1"),
        ({"last_layers": -1}, "last_layers=-1"),
        ({"last_layers": 1, "low_rank": 2}, "low_rank and last_layers"),
    ):
        with pytest.raises(UsageError, match=message):
            FewShot(**settings).validate()  # type: ignore[arg-type]


def test_the_last_layers_of_every_stack() -> None:
    names = [
        "shared.weight",
        *(f"encoder.block.{n}.layer.0.weight" for n in range(12)),
        *(f"decoder.block.{n}.layer.{m}.weight" for n in range(2) for m in range(3)),
        "decoder.final_layer_norm.weight",
    ]
    assert in_last_layers(names, 1) == {
        "encoder.block.11.layer.0.weight",
        *(f"decoder.block.1.layer.{m}.weight" for m in range(3)),
    }
    assert in_last_layers(names, 20) == {name for name in names if ".block." in name}
    assert in_last_layers(["0.weight", "2.weight"], 1) == {"2.weight"}
    assert in_last_layers(["embed.weight"], 1) == frozenset()


def test_only_the_last_layers_are_trained(tmp_path: Path) -> None:
    """The rest stays to the bit; with all layers trained it does not, which is the control."""
    toy = TOYS["llama"]
    folder = write_toy(toy, tmp_path / "toy")
    network, weights = load_network(folder), load_file(folder / "model.safetensors")
    task = Task("toy", [EncodedBatch(toy.inputs(torch.Generator().manual_seed(0)))])
    changed = {}
    for last_layers in (0, 1):
        method = FewShot(samples=2, learning_rates="1e-2", steps=2, last_layers=last_layers)
        result = few_shot(network, weights, task, method)
        changed[last_layers] = {name for name in weights if not torch.equal(weights[name], result.weights[name])}
    assert changed[1]
    assert changed[1] < changed[0]
    assert changed[1] <= in_last_layers(list(weights), 1)
