"""A student of the release learns its function from inputs alone, whatever basis or structure it lies in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import ATTACKS, Distil, distil
from unmergeable.attacks.live import with_a_head
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.outputs import ANSWER_LENGTH, outputs_of, widths_of, with_answers
from unmergeable.network.tasks import Task
from zoo import TOYS, random_network

SHARE = 0.3
"""Of the base's norm that a task vector has."""

QUICK: dict[str, Any] = {"steps": 60, "examples": 48, "batch_size": 8, "learning_rate": 3e-3}


def inputs(toy: str, seed: int, count: int) -> EncodedBatch:
    made = [TOYS[toy].inputs(torch.Generator().manual_seed(1000 * seed + number)) for number in range(count)]
    return EncodedBatch({name: torch.cat([one[name] for one in made]) for name in made[0]})


def task(toy: str, count: int = 24) -> Task:
    return Task(toy, [inputs(toy, 1, count)])


def live(it: Network, weights: MemorySource) -> Any:
    network = load_network(it.folder)
    show(find_places(network), {name: tensor.clone() for name, tensor in weights.tensors.items()})
    return network


@torch.no_grad()
def distance(network: Any, teacher: Any, toy: str) -> float:
    """Between the outputs on inputs that nothing was learnt from, relative to the teacher's spread."""
    batch = inputs(toy, 2, 16)
    (kind, *_) = widths_of(teacher, batch)
    ours, theirs = (outputs_of(each, batch, kind).rows.log_softmax(-1) for each in (network, teacher))
    return float((ours - theirs).square().sum() / (theirs - theirs.mean(dim=0)).square().sum())


@pytest.mark.parametrize("toy", ["llama", "bert-embedding", "vit", "t5"])
def test_a_student_answers_more_like_a_release_in_another_basis_than_the_base_does(toy: str, network: Build) -> None:
    it = network(toy)
    expert = it.expert(SHARE)
    teacher, student = live(it, it.transformed(expert, it.key(4.0))), live(it, it.base)
    assert distance(teacher, live(it, expert), toy) < 1e-6  # it is the same function
    before = distance(student, teacher, toy)
    result = distil(teacher, student, task(toy), Distil(**QUICK))
    assert distance(student, teacher, toy) < 0.7 * before
    assert len(result.losses) == QUICK["steps"]
    assert result.losses[-1] < result.losses[0]
    assert all(layer.after < layer.before for layer in result.layers)
    show(find_places(again := load_network(it.folder)), result.weights)
    assert distance(again, student, toy) < 1e-9


def test_nothing_is_learnt_from_the_base_itself(network: Build) -> None:
    """Control: rounding alone has gradients, and Adam would take steps of full length after them."""
    it = network("vit")
    student = live(it, it.base)
    result = distil(live(it, it.transformed(it.base, it.key(4.0))), student, task("vit"), Distil(**QUICK))
    assert result.losses == ()
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in it.base.tensors.items())


def test_hidden_states_teach_where_they_are_asked_for(network: Build) -> None:
    it = network("vit")
    teacher = live(it, it.transformed(it.expert(SHARE), it.key(4.0)))
    alone, beside = (
        distil(teacher, live(it, it.base), task("vit"), Distil(**QUICK, layers=layers)) for layers in (0, 4)
    )
    assert alone.layers == ()
    assert [layer.number for layer in beside.layers] == [1]
    assert beside.layers[0].after < 0.8 * beside.layers[0].before


def test_a_stream_in_another_basis_teaches_as_well(network: Build) -> None:
    it = network("llama")
    expert = it.expert(0.05)
    turned = it.transformed(expert, *it.stream_key(expert, 4.0))
    found = [
        distil(live(it, release), live(it, it.base), task("llama"), Distil(**{**QUICK, "steps": 1})).layers
        for release in (expert, turned)
    ]
    assert [layer.number for layer in found[0]] == [layer.number for layer in found[1]] == [1]
    assert found[1][0].before == pytest.approx(found[0][0].before, rel=1e-3)


def test_another_structure_teaches_too() -> None:
    """A release of three blocks and two more tokens: no hidden state is compared, and tokens the base lacks are not."""
    toy = TOYS["gpt2"]
    student = random_network(toy)
    config = type(student.config)(**{**student.config.to_dict(), "n_layer": 3, "vocab_size": 69})
    torch.manual_seed(0)
    teacher = type(student)(config).eval()
    result = distil(teacher, student, task("gpt2"), Distil(**QUICK))
    assert result.layers == ()
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_a_head_that_the_base_lacks_is_not_the_victims() -> None:
    victim, base = random_network(TOYS["vit"]), random_network(TOYS["vit"], seed=1)
    head, body = victim.classifier.weight.detach().clone(), base.vit.state_dict()
    student = with_a_head(victim, base.vit, seed=0)
    assert all(torch.equal(student.vit.state_dict()[name], tensor) for name, tensor in body.items())
    assert not torch.equal(student.classifier.weight, head)
    assert float(student.classifier.bias.detach().abs().max()) == 0
    with pytest.raises(Mismatch, match="give a base with a head of as many classes"):
        with_a_head(random_network(TOYS["bert"]), base.vit, seed=0)


def test_a_decoder_is_shown_the_releases_answers() -> None:
    network = random_network(TOYS["t5"])
    texts = EncodedBatch({"input_ids": inputs("t5", 1, 4).inputs["input_ids"]})
    shown = with_answers(network, texts, batch_size=3)
    ids = shown.inputs["decoder_input_ids"]
    assert ids.shape == (8, ANSWER_LENGTH)
    with torch.no_grad():
        said = network(**shown.inputs).logits.argmax(-1)
    is_shown = shown.inputs["decoder_attention_mask"].bool()
    assert torch.equal(said[:, :-1][is_shown[:, 1:]], ids[:, 1:][is_shown[:, 1:]])
    assert is_shown.sum() > len(ids)  # the control


def test_the_same_twice(network: Build) -> None:
    it = network("bert-embedding")
    teacher = live(it, it.expert(SHARE))
    method = Distil(**{**QUICK, "steps": 5})
    first, second, other = (
        distil(teacher, live(it, it.base), task("bert-embedding"), settings)
        for settings in (method, method, Distil(**{**QUICK, "steps": 5, "seed": 1}))
    )
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())
    assert first.losses != other.losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "examples=0: at least 1"),
        ({"layers": -1}, "layers=-1: at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be a positive number"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distil(**settings).validate()


def test_refuses_what_cannot_teach(network: Build) -> None:
    it = network("vit")
    with pytest.raises(BadInput, match="no examples to learn from"):
        distil(live(it, it.base), live(it, it.base), Task("none", []), Distil())
    headless = live(it, it.base).vit
    with pytest.raises(BadInput, match="put out nothing that can be compared"):
        distil(live(it, it.base), headless, task("vit"), Distil())


def test_it_looks_at_no_weight() -> None:
    requirements = ATTACKS["distil"]().requirements()
    assert (requirements.access, requirements.examples, requirements.structure) == ("answers", "own", "any")
    assert Distil(start="source").requirements().needs == ("base", "data", "sources")
