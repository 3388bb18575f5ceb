"""What a merge has to find out from data before it can be written: statistics, a recipe, or coefficients.

Each method gets the data of the experts in their order, a live network to show it to, and returns the merge with
everything it learnt. The merge itself is then an ordinary one that streams.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import AdaMerging, Fisher, Merge, RegMean, Soup
from unmergeable.merges.variation import Variation, Vary
from unmergeable.network.disk_weights import find_places, swapped
from unmergeable.network.encoding import EncodedData, Encoder, class_names_of, ordered_names
from unmergeable.network.fisher_information import diagonal_fisher
from unmergeable.network.greedy_soup import find_greedy_soup
from unmergeable.network.input_grams import gather_input_grams, linear_layers
from unmergeable.network.learn_coefficients import learn_coefficients
from unmergeable.network.load import load_network
from unmergeable.network.statistics import write_statistics
from unmergeable.network.task_vectors import TaskVectors
from unmergeable.network.tasks import Task, accuracy, is_causal_language_model
from unmergeable.progress import Progress

_MARKER = ".unmergeable-statistics"
"""Says that a folder of statistics is a merge's own, and may be removed by the next one."""

STATISTICS_BATCH = 8
SCORING_BATCH = 32


@dataclass(frozen=True)
class Request:
    """A merge that needs data. ``template`` is the folder whose config, tokenizer and image processor are used."""

    method: Merge
    base: TensorSource | None
    experts: tuple[TensorSource, ...]
    coefficients: tuple[float | None, ...]
    data: tuple[Path, ...]
    template: Path
    out: Path
    progress: Progress

    def task(
        self, number: int, network: Any, *, batch_size: int, examples: int, seed: int, is_labelled: bool = False
    ) -> Task:
        """The data of one expert as a task. Classes have the names they have in that expert's configuration."""
        names = None
        if is_labelled and not is_causal_language_model(network):
            # Of a soup, whose experts share a task, there may be more data than experts.
            named = self.experts[min(number, len(self.experts) - 1)].config.get("id2label")
            names = ordered_names(named) if named else class_names_of(network)
        source = DataSource(self.data[number], seed=seed, limit=examples)
        return Task(str(source.path), EncodedData(source, Encoder(self.template), batch_size, names))


@dataclass(frozen=True)
class Informed:
    """A merge with all that it needs. ``learnt`` is what the user wants to know of it, None where data had no part."""

    method: Merge
    coefficients: tuple[float | None, ...]
    vary: Vary | None = None
    learnt: Mapping[str, Any] | None = None


@contextmanager
def informed_by_data(
    method: Merge,
    base: TensorSource | None,
    experts: Sequence[tuple[TensorSource, float | None]],
    data: Sequence[Path],
    *,
    out: Path,
    progress: Progress,
) -> Iterator[Informed]:
    """The merge to be written inside; statistics made for it are gone outside.

    Raises:
        UsageError: data for a method that takes none, none for one that needs them, or not one for each expert.
        BadInput: the data cannot be used, or ``out`` exists.
        Mismatch: the experts are not of one architecture.
    """
    sources, coefficients = tuple(source for source, _ in experts), tuple(value for _, value in experts)
    inform = DATA_DRIVEN.get(method.name)
    if inform is None or (not data and _gathered(method)):
        if data:
            raise UsageError(f"{method.name} merges without data; leave out --data.")
        yield Informed(method, coefficients)
        return
    method.validate()
    method.resolve(coefficients)
    _require_data(method, len(sources), len(data))
    require_absent(out)
    template = sources[0] if base is None else base
    for number, source in enumerate(sources, start=1):
        require_same_tensors(template, source, f"expert {number}")
    request = Request(method, base, sources, coefficients, tuple(data), template.folder, out, progress)
    with inform(request) as informed:
        yield informed


def _require_data(method: Merge, experts: int, data: int) -> None:
    if experts < method.fewest_experts:
        raise UsageError(f"{method.name}: {experts} experts given, at least {method.fewest_experts} needed.")
    if isinstance(method, Soup) and data:
        return
    if data != experts:
        how = "at least once" if isinstance(method, Soup) else "once for each expert, in their order"
        raise UsageError(f"{method.name}: {experts} experts and data of {data}; give --data {how}.")
    if _gathered(method):
        raise UsageError(f"{method.name}: give either data or statistics, not both.")


def _gathered(method: Merge) -> str:
    """The folder of statistics that a method is given in its settings."""
    return str(getattr(method, "statistics", ""))


@contextmanager
def _with_fisher(request: Request) -> Iterator[Informed]:
    method = cast(Fisher, request.method)

    def write(network: Any, number: int, folder: Path) -> str:
        task = request.task(
            number,
            network,
            batch_size=STATISTICS_BATCH,
            examples=method.examples,
            seed=method.seed,
            is_labelled=method.labels == "empirical",
        )
        found = diagonal_fisher(network, task, labels=method.labels, seed=method.seed, progress=request.progress)
        shapes = _floating_shapes(request.experts[number])
        # What the network does not have it does not use.
        tensors = ((name, found.get(name, torch.zeros(shapes[name]))) for name in sorted(shapes))
        facts = {"statistics": "diagonal Fisher information", "labels": method.labels, "data": task.name}
        return write_statistics(folder, shapes, tensors, facts=facts)

    with _statistics(request, write) as folder:
        yield Informed(replace(method, statistics=str(folder)), request.coefficients, learnt=_data_facts(request))


@contextmanager
def _with_grams(request: Request) -> Iterator[Informed]:
    method = cast(RegMean, request.method)

    def write(network: Any, number: int, folder: Path) -> str:
        task = request.task(number, network, batch_size=STATISTICS_BATCH, examples=method.examples, seed=method.seed)
        shapes = {layer.key: (layer.inputs, layer.inputs) for layer in linear_layers(network)}
        grams = gather_input_grams(network, task, progress=request.progress)
        facts = {"statistics": "Gram matrices of the inputs of linear layers", "data": task.name}
        return write_statistics(folder, shapes, grams, facts=facts)

    with _statistics(request, write) as folder:
        yield Informed(replace(method, statistics=str(folder)), request.coefficients, learnt=_data_facts(request))


@contextmanager
def _statistics(request: Request, write: Callable[[Any, int, Path], str]) -> Iterator[Path]:
    """A folder with the statistics of every expert, in one beside OUT that is removed at the end.

    Its name is a hash of what it holds. A merge that was killed goes on where it was only for the same settings, and so
    for the same statistics.
    """
    place = request.out.with_name(f"{request.out.name}.statistics")
    network = load_network(request.template)
    used = find_places(network).keys()
    if (place / _MARKER).is_file():
        shutil.rmtree(place)  # left by a merge that was killed
    try:
        place.mkdir()
        (place / _MARKER).touch()
    except OSError as error:
        raise BadInput(f"{place} cannot be created: {error.strerror}; remove it, or choose another OUT.") from None
    try:
        gathered = place / "gathered"
        gathered.mkdir()
        digest = hashlib.sha256()
        for number, expert in enumerate(request.experts):
            with swapped(network, _state(expert, used)):
                digest.update(write(network, number, gathered / str(number + 1)).encode())
        yield gathered.rename(place / digest.hexdigest())
    finally:
        shutil.rmtree(place)


def _with_soup(request: Request) -> nullcontext[Informed]:
    method = cast(Soup, request.method)
    if any(value is not None for value in request.coefficients):
        raise UsageError("soup chooses its experts by their scores; give them without coefficients.")
    network = load_network(request.template)
    tasks = [
        request.task(
            number, network, batch_size=SCORING_BATCH, examples=method.examples, seed=method.seed, is_labelled=True
        )
        for number in range(len(request.data))
    ]

    def score(network: Any) -> float:
        return fmean(accuracy(network, task) for task in tasks)

    used = find_places(network).keys()
    states = [lambda expert=expert: _state(expert, used) for expert in request.experts]
    soup = find_greedy_soup(network, states, score, progress=request.progress)
    learnt = {
        **_data_facts(request),
        "scores": list(soup.scores),
        "trials": [
            {"experts": [n + 1 for n in trial.experts], "score": trial.score, "kept": trial.is_kept}
            for trial in soup.trials
        ],
        "soup": [number + 1 for number in soup.experts],
    }
    return nullcontext(Informed(method, soup.coefficients, learnt=learnt))


def _with_coefficients(request: Request) -> nullcontext[Informed]:
    method = cast(AdaMerging, request.method)
    if request.base is None:
        raise UsageError("adamerging merges task vectors: name the base that the experts were tuned from.")
    network = load_network(request.template)
    tasks = [
        request.task(number, network, batch_size=method.batch_size, examples=method.examples, seed=method.seed)
        for number in range(len(request.data))
    ]
    used = find_places(network).keys()
    states = [_state(expert, used) for expert in request.experts]
    beginnings = tuple(method.heads.split())
    heads = [{n: t for n, t in state.items() if beginnings and n.startswith(beginnings)} for state in states]
    if beginnings and not heads[0]:
        raise BadInput(f"heads={method.heads}: no tensor begins so; `inspect` lists their names.")
    found = learn_coefficients(
        network,
        TaskVectors.between(_state(request.base, used), states),
        tasks,
        method,
        start=method.resolve(request.coefficients),
        heads=heads,
        progress=request.progress,
    )
    learnt = {
        **_data_facts(request),
        "coefficients": {name: list(values) for name, values in found.coefficients.items()},
        "entropies": [list(values) for values in found.entropies],
    }

    def vary(name: str) -> Variation:
        return Variation(found.coefficients.get(name))

    return nullcontext(Informed(method, request.coefficients, vary, learnt))


DATA_DRIVEN: Mapping[str, Callable[[Request], Any]] = {
    Fisher.name: _with_fisher,
    RegMean.name: _with_grams,
    Soup.name: _with_soup,
    AdaMerging.name: _with_coefficients,
}
"""The methods that need data, and what each makes of them: a context in which the merge is informed."""


def _data_facts(request: Request) -> dict[str, Any]:
    return {"data": [str(path) for path in request.data]}


def _state(source: TensorSource, used: Collection[str]) -> dict[str, Tensor]:
    """The tensors that the network has; loading passes over the rest, masks and the like of older checkpoints."""
    return {name: source.tensor(name) for name in source.names if name in used}


def _floating_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    specs = {name: source.spec(name) for name in source.names}
    return {name: tuple(spec.shape) for name, spec in specs.items() if torch_dtype(spec.dtype).is_floating_point}
