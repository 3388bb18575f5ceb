"""``lm_eval``: any task of EleutherAI's evaluation harness, its own or one in a local YAML file.

The data of the task are that file, or a folder of such files with ``task`` naming one of them or one of the harness's
own. What the file names (data sets of a hub, files) the harness reads in its way; code in such a folder is run by it.
Credits are a metric of the harness, document by document. The loss is -log p of the right answer where the harness asks
for likelihoods (of the right choice, among the choices), and NaN where the model writes its answer.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from unmergeable.data import Example
from unmergeable.errors import BadInput, UsageError, first_line
from unmergeable.network.load import load_tokenizer
from unmergeable.optional import optional_package
from unmergeable.tasks.prompts import reads_with_encoder
from unmergeable.tasks.task_kind import Scores, TaskData, TaskKind

_FEWSHOT_SEED = 1234
"""The harness's own; its worked examples are drawn with it."""


@dataclass(frozen=True)
class HarnessTask(TaskKind):
    """Settings.

    Attributes:
        task: name of the task, where the data are a folder.
        metric: whose value is the credit; empty for the first that the task reports.
        fewshot: worked examples before each question; -1 for as many as the task says.
        chat: whether questions are put into the form of the tokenizer's chat template.
        runs_code: allow a task that runs the programs that the model writes (HumanEval, MBPP). The harness runs them
            with your rights: use a virtual machine or a container without secrets.
    """

    name: ClassVar[str] = "lm_eval"
    revision: ClassVar[int] = 1  # the documents were in their own order, not in that of the source
    task: str = ""
    metric: str = ""
    fewshot: int = -1
    chat: bool = False
    runs_code: bool = False

    def scorer(self, data: TaskData, network: Any) -> HarnessScorer:
        """Loads the task and chooses its documents.

        Raises:
            UsageError: lm-eval is not installed, or the task runs programs and ``runs_code`` does not allow it.
            BadInput: there is no such task, its data cannot be read, or the network is no language model.
        """
        optional_package("lm_eval", "lm-eval")
        backend = "seq2seq" if reads_with_encoder(network) else "causal"
        with _quiet():
            manager, task = self._loaded(data.source.path)
            documents = list(task.eval_docs)
        if getattr(task, "UNSAFE_CODE", False) and not self.runs_code:
            raise UsageError(
                f"{task.config.task} runs the programs that the model writes, with your rights: do it in a container "
                "without secrets, and set runs_code=true."
            )
        records = data.source.select(_Documents(documents, data.source.path))
        chosen = [int(example.record["number"]) for example in records]
        return HarnessScorer(self, manager, task, chosen, load_tokenizer(data.encoder), backend, data.batch_size)

    def facts(self) -> Mapping[str, Any]:
        return {"lm_eval": str(optional_package("lm_eval", "lm-eval").__version__)}

    def _loaded(self, path: Path) -> tuple[Any, Any]:
        managers = importlib.import_module("lm_eval.tasks").TaskManager
        folder = path if path.is_dir() else path.parent
        wanted = self.task if path.is_dir() else str(path)
        if not wanted:
            raise UsageError(f"{path} is a folder; name one of its tasks, or one of lm-eval's, in task.")
        try:
            manager = managers(include_path=str(folder), include_defaults=False)
            if path.is_dir() and wanted not in manager.all_tasks:
                manager = managers(include_path=str(folder))  # takes long: the harness reads all tasks it has
            found = list(manager.load([wanted])["tasks"].values())
        except Exception as error:  # the harness, and the code of a task, raise whatever they like
            raise BadInput(
                f"{path}: lm-eval does not load {wanted!r} ({first_line(error)}); correct the task."
            ) from error
        if len(found) != 1:
            raise BadInput(f"{path}: {wanted!r} is a group of {len(found)} tasks; name one of them.")
        if self.fewshot >= 0:
            found[0].set_config(key="num_fewshot", value=self.fewshot)
        found[0].set_fewshot_seed(seed=_FEWSHOT_SEED)
        return manager, found[0]


@dataclass(frozen=True)
class HarnessScorer:
    """A task of the harness, and the numbers of the documents that count."""

    settings: HarnessTask
    manager: Any
    task: Any
    documents: Sequence[int]
    tokenizer: Any
    backend: str
    batch_size: int

    def __len__(self) -> int:
        return len(self.documents)

    def only(self, start: int, stop: int) -> HarnessScorer:
        return replace(self, documents=self.documents[start:stop])

    def credits(self, network: Any) -> Scores:
        """The metric of each document.

        Raises:
            BadInput: the task reports no such metric, or one that does not lie between 0 and 1.
        """
        samples = self._samples(network)
        metric = self.settings.metric or samples[0]["metrics"][0]
        known = samples[0]["metrics"]
        values = [sample.get(metric) for sample in samples]
        if metric not in known or not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            raise BadInput(
                f"{self.task.config.task}: {metric!r} is no metric between 0 and 1 of each document; it reports "
                f"{', '.join(known)}: name one in metric."
            )
        return np.array(values, float)

    def losses(self, network: Any) -> Scores:
        """-log p of the right answer; NaN where the model writes it."""
        return np.array([_loss(sample, self.task.OUTPUT_TYPE) for sample in self._samples(network)])

    def _samples(self, network: Any) -> list[Mapping[str, Any]]:
        """What the harness keeps of each document, by the first of its filters."""
        harness = optional_package("lm_eval", "lm-eval")
        model = importlib.import_module("lm_eval.models.huggingface").HFLM
        name = self.task.config.task
        with _quiet():
            results = harness.simple_evaluate(
                model=model(
                    pretrained=network, tokenizer=self.tokenizer, backend=self.backend, batch_size=self.batch_size
                ),
                tasks=[self.task],
                task_manager=self.manager,
                samples={name: list(self.documents)},
                apply_chat_template=self.settings.chat,
                bootstrap_iters=0,
                confirm_run_unsafe_code=self.settings.runs_code,
                log_samples=True,
                # the harness would seed the generators of the whole process
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=_FEWSHOT_SEED,
            )
        by_document: dict[int, Mapping[str, Any]] = {}
        for sample in results["samples"][name]:
            by_document.setdefault(sample["doc_id"], sample)
        return [by_document[number] for number in self.documents]


class _Documents:
    """The documents of a task as records whose content decides their part."""

    def __init__(self, documents: Sequence[Any], path: Path) -> None:
        self._documents, self._path = documents, path

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: int) -> Example:
        content = json.dumps(self._documents[number], sort_keys=True, default=str)
        return Example(content, None, f"{self._path}, document {number}", {"number": number})


def _loss(sample: Mapping[str, Any], output_type: str) -> float:
    if output_type not in ("loglikelihood", "loglikelihood_rolling", "multiple_choice"):
        return float("nan")
    found = [_log_probability(response) for response in sample["filtered_resps"]]
    if output_type != "multiple_choice":
        return -found[0]
    target = sample["target"]
    if not isinstance(target, int) or not 0 <= target < len(found):
        return float("nan")
    return float(np.logaddexp.reduce(found) - found[target])


def _log_probability(response: Any) -> float:
    return float(response[0] if isinstance(response, tuple | list) else response)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log and warnings; afterwards all is as before."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
