"""Every merge is a function of state dicts and live networks, with the bits of the engine that merges files."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unmergeable.merges
from merges.small_models import State, make_models, write_checkpoint
from network.small_classifier import Classifier, make_task
from unmergeable import merges
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import Mismatch, UsageError
from unmergeable.merges import MERGES, Linear, Merge, TaskArithmetic, Ties, merge, merge_method, merge_state_dicts
from unmergeable.merges.adamerging import learn_coefficients
from unmergeable.merges.regmean import gather_input_grams
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

FROM_DATA = {
    "fisher": {"statistics", "labels", "examples", "seed"},
    "regmean": {"statistics", "examples", "seed"},
    "soup": {"examples", "seed"},
    "adamerging": {"batch_size", "examples", "seed"},
    "adarank": {"statistics", "batch_size", "examples", "seed"},
}
"""Settings that say how data are read: in memory the statistics, a score or tasks are given instead."""

OF_WEIGHTS = [name for name in MERGES if name not in FROM_DATA]


VISIBLE: dict[str, dict[str, Any]] = {"karcher": {"tolerance": 0.99}, "ram": {"threshold": 0.05}}
"""Settings that show in bfloat16 on models as near to each other as these, where half the default does not."""


def equal(first: State, second: State) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", MERGES)
def test_a_function_has_the_settings_of_its_method(name: str) -> None:
    """So that neither a default nor a setting can be changed in one of the two alone."""
    function, method = getattr(merges, name), MERGES[name]
    parameters = dict(inspect.signature(function).parameters)
    assert list(parameters)[:2] == ["base", "experts"]
    hints, types = get_type_hints(function), get_type_hints(method)
    settings = [field for field in fields(method) if field.name not in FROM_DATA.get(name, ())]
    assert [key for key in parameters if key in types] == [field.name for field in settings]
    for field in settings:
        assert parameters[field.name].default == field.default is not MISSING
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert hints[field.name] == types[field.name]
    assert inspect.getdoc(function)


def changed_settings(method: type[Merge]) -> dict[str, Any]:
    """Other values than the defaults: numbers halved, switches turned."""
    defaults = {field.name: field.default for field in fields(method)}
    numbers: dict[str, Any] = {name: value / 2 for name, value in defaults.items() if isinstance(value, float)}
    turned = {name: not value for name, value in defaults.items() if isinstance(value, bool)}
    return numbers | turned | VISIBLE.get(method.name, {})


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_gives_the_bits_of_the_files(name: str, tmp_path: Path) -> None:
    base, experts = make_models(min(2, MERGES[name].most_experts or 2), torch.bfloat16, task_size=0.1)
    folders = [write_checkpoint(tmp_path / str(n), state) for n, state in enumerate((base, *experts))]
    changed = changed_settings(MERGES[name])
    method = merge_method(name, **changed)
    sources = [open_checkpoint(folder) for folder in folders]
    merge(sources[0], [(source, None) for source in sources[1:]], method, tmp_path / "out")
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in (base, *experts)]
    merged = getattr(merges, name)(base, experts, **changed)
    assert equal(merged, {key: load_file(tmp_path / "out" / "model.safetensors")[key] for key in base})
    assert all(equal(state, copy) for state, copy in zip((base, *experts), before, strict=True))
    assert not equal(merged, getattr(merges, name)(base, experts))  # control: the settings reach the method


def test_coefficients_reach_the_method() -> None:
    base, experts = make_models(2)
    merged = merges.task_arithmetic(base, experts, coefficients=[0.5, None])
    assert equal(merged, merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.5, 0.3]))
    assert not equal(merged, merges.task_arithmetic(base, experts))


def test_a_base_is_given_where_one_is_needed() -> None:
    base, experts = make_models(2)
    assert equal(merges.linear(None, experts), merge_state_dicts(None, experts, method=Linear()))
    assert equal(merges.linear(base, experts), merges.linear(None, experts))
    with pytest.raises(UsageError, match="ties merges task vectors: name the base"):
        merges.ties(None, experts)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_in_memory_are_those_in_files(name: str, tmp_path: Path) -> None:
    networks = [Classifier(seed, torch.float32) for seed in (1, 2)]
    experts: list[State] = [dict(network.state_dict()) for network in networks]
    if name == "regmean":
        tasks = [make_task(10, 5, seed=seed, dtype=torch.float32) for seed in (1, 2)]
        statistics = [dict(gather_input_grams(n, t)) for n, t in zip(networks, tasks, strict=True)]
        merged = merges.regmean(None, networks, grams=statistics, alpha=0.5)
        settings: dict[str, Any] = {"alpha": 0.5}
    else:
        statistics = [{key: tensor.square() for key, tensor in state.items()} for state in experts]
        merged = merges.fisher(None, networks, information=statistics, favor_first=False)
        settings = {"favor_first": False}
    for number, tensors in enumerate(statistics, start=1):
        (tmp_path / "statistics").mkdir(exist_ok=True)
        write_checkpoint(tmp_path / "statistics" / str(number), tensors)
    method = merge_method(name, statistics=str(tmp_path / "statistics"), **settings)
    assert equal(merged, merge_state_dicts(None, experts, method=method))
    assert not equal(merged, merges.linear(None, experts))


def test_statistics_must_be_of_use_and_complete() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="ties reads no statistics"):
        merge_state_dicts(base, experts, method=Ties(), statistics=experts)
    with pytest.raises(UsageError, match="statistics of 1 models for 2 experts"):
        merges.fisher(None, experts, information=experts[:1])
    lacking = {name: tensor for name, tensor in experts[1].items() if name != "empty"}
    with pytest.raises(Mismatch, match=r"empty: not in statistics 2"):
        merges.fisher(None, experts, information=[experts[0], lacking])


def test_adamerging_learns_from_tasks_and_a_network() -> None:
    network, base = Classifier(0, torch.float32), Classifier(1, torch.float32)
    experts = [Classifier(seed, torch.float32) for seed in (2, 3)]
    tasks = [make_task(8, 4, seed=seed, labels=False, dtype=torch.float32) for seed in (2, 3)]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = merges.adamerging(base, experts, network=network, tasks=tasks, steps=3, learning_rate=0.1, heads="outer")
    method = merge_method("adamerging", steps=3, learning_rate=0.1, heads="outer")
    vectors = TaskVectors.between(base.state_dict(), [expert.state_dict() for expert in experts])
    heads = [{name: tensor for name, tensor in e.state_dict().items() if name.startswith("outer")} for e in experts]
    learnt = learn_coefficients(network, vectors, tasks, method, heads=heads)  # type: ignore[arg-type]
    assert equal(merged, vectors.merged(learnt.coefficients.__getitem__))
    assert learnt.coefficients["inner.weight"] != (0.3, 0.3)
    assert torch.equal(merged["outer.weight"], base.outer.weight)  # each task keeps its head
    assert equal(dict(network.state_dict()), before)


@pytest.mark.parametrize("toy", ["mixtral", "gpt2"])
def test_live_networks_are_read_by_their_names_on_disk(toy: str, tmp_path: Path) -> None:
    """Mixtral's files split what its modules fuse; GPT-2's hold tied weights once."""
    folder = write_toy(TOYS[toy], tmp_path)
    state = load_file(folder / "model.safetensors")
    network, base = load_network(folder), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    merged = merges.task_arithmetic(base, [network, state], coefficients=[0.25, 0.5])
    expected = merges.task_arithmetic(base, [state, state], coefficients=[0.25, 0.5])
    assert equal(merged, expected)
    assert merges.linear(network, [network, network]).keys() == state.keys()


def test_a_name_is_the_function_although_it_is_a_module_too() -> None:
    from unmergeable.merges import ties

    assert callable(ties)
    assert unmergeable.merges.ties is ties
    module = importlib.import_module("unmergeable.merges.ties")
    assert module.ties is ties is unmergeable.merges.ties


def test_a_method_is_made_by_name() -> None:
    assert merge_method("ties", density="0.5") == Ties(density=0.5)
    with pytest.raises(UsageError, match=r"no merge is called 'tiess'; did you mean 'ties'\?"):
        merge_method("tiess")
    with pytest.raises(UsageError, match=r"ties has no setting 'densty'; did you mean 'density'\?"):
        merge_method("ties", densty=0.5)


def test_nothing_is_copied_that_is_not_merged_or_returned() -> None:
    """A live network's parameters are read where they lie."""
    network = Classifier(0, torch.float32)
    weights = merges.engine.weights_of(network)  # type: ignore[attr-defined]
    own: dict[str, Tensor] = network.state_dict()
    assert all(weights[name].data_ptr() == own[name].data_ptr() for name in own)
