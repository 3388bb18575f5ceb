"""The network that an adapter was trained in, without its weights: what its modules and its files call a tensor.

transformers renames tensors when it loads them, and stacks some (the experts of a mixture). An adapter's keys are the
names of modules in memory, a checkpoint's those on disk. The way from the one to the other is found by sending marked
tensors without storage through transformers' own conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.errors import BadInput, UsageError, shown
from unmergeable.optional import optional_package, quiet

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""What peft calls the tasks that put another head on a network, and the class that does."""

_OTHER_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}

_PROBE_SIZE = 12  # of the axes that are not looked at; divides as what is stacked of 2, 3, 4 or 6 parts does


@dataclass(frozen=True)
class Region:
    """Where a part of a stacked parameter [experts, x, y] lies on disk, as the matrix ``name``.

    ``x`` and ``y`` are the indices its rows and columns have in the parameter, int64, or, ``is_transposed``, its
    columns and rows.
    """

    name: str
    expert: int
    x: Tensor
    y: Tensor
    is_transposed: bool


class Skeleton:
    """A network on the meta device."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @classmethod
    def of(cls, config: Mapping[str, Any], class_name: str) -> Skeleton:
        """The network of this class that a parsed ``config.json`` describes.

        Raises:
            UsageError: transformers is not installed.
            BadInput: it has no such class, or cannot build it.
        """
        transformers = optional_package("transformers", "hf")
        network_class: Any = getattr(transformers, class_name, None)
        settings_class = getattr(network_class, "config_class", None)
        if settings_class is None:
            raise BadInput(f"the network class {class_name!r} is unknown to transformers {transformers.__version__}.")
        with quiet(transformers):
            try:
                settings = settings_class.from_dict(dict(config))
                with torch.device("meta"):
                    return cls(network_class(settings))
            except Exception as error:  # configurations of strangers make it raise anything
                raise BadInput(f"transformers cannot build {class_name} from config.json ({error}).") from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that its files hold, by the name on disk. Of tied weights files hold one."""
        return {name: tuple(tensor.shape) for name, tensor in self._on_disk.items()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names in memory of tensors that are others' by tying, with those others'."""
        return dict(getattr(self.network, "all_tied_weights_keys", None) or {})

    def disk_name(self, name: str) -> str | None:
        """The name on disk of a tensor in memory, where its file holds it as it is; None elsewhere."""
        return self._renamed.get(name)

    def parameter(self, name: str) -> Tensor | None:
        """A parameter or buffer in memory, without values."""
        return self._state.get(name)

    def module(self, path: str) -> Any:
        """A module, or None."""
        try:
            return self.network.get_submodule(path)
        except AttributeError:
            return None

    def regions(self, name: str) -> list[Region]:
        """The parts on disk of a stacked parameter [experts, x, y] by its name in memory.

        Raises:
            BadInput: its files hold it in another way than in whole rows and columns of experts.
        """
        shape = self._state[name].shape
        experts, first, second = (self._probe(name, shape, axis) for axis in range(3))
        found = []
        for disk_name, expert in experts.items():
            x, y = _index_along(first[disk_name], (0, 1)), _index_along(second[disk_name], (1, 0))
            if x is None or y is None or x[0] == y[0] or bool((expert != expert.flatten()[0]).any()):
                raise BadInput(f"parameter {name} is stored in another way than in rows and columns of its experts.")
            found.append(Region(disk_name, int(expert.flatten()[0]), x[1], y[1], is_transposed=x[0] == 1))
        return found

    def _probe(self, name: str, shape: torch.Size, axis: int) -> dict[str, Tensor]:
        """The indices along one axis, [x, y] by name on disk. Of the other axes a few indices do, but all experts."""
        sizes = [
            size if number in (0, axis) or size % _PROBE_SIZE else _PROBE_SIZE for number, size in enumerate(shape)
        ]
        indices = torch.arange(shape[axis]).view([-1 if number == axis else 1 for number in range(3)]).expand(sizes)
        return to_disk_names(self.network, {name: indices})

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        tied = self.tied
        state = self.network.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in tied}

    @cached_property
    def _on_disk(self) -> dict[str, Tensor]:
        """Marked tensors as they come out: number n lies at offset n of a storage of its own, with no strides."""
        marked = {
            name: torch.empty(number + 1, device="meta").as_strided(tensor.shape, (0,) * tensor.dim(), number)
            for number, (name, tensor) in enumerate(self._state.items())
        }
        return to_disk_names(self.network, marked)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        names = list(self._state)
        found = {}
        for disk_name, tensor in self._on_disk.items():
            if not any(tensor.stride()) and tensor.storage_offset() < len(names):
                name = names[tensor.storage_offset()]
                if tensor.shape == self._state[name].shape:
                    found[name] = disk_name
        return found


def part_of_class(config: Mapping[str, Any], class_name: str) -> str:
    """What a configuration of several networks calls the one of this class: ``vision`` for its ``vision_config``.

    Empty where it has none, or transformers does not know the class or is not installed.
    """
    try:
        network_class = getattr(optional_package("transformers", "hf"), class_name, None)
    except UsageError:
        return ""
    kind = getattr(getattr(network_class, "config_class", None), "model_type", None)
    parts = (
        key.removesuffix("_config")
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and value.get("model_type") == kind
    )
    return next(parts, "") if kind else ""


def _index_along(indices: Tensor, axes: tuple[int, int]) -> tuple[int, Tensor] | None:
    """The first of two axes along which alone the indices of a matrix change, and how; None where there is none."""
    for axis in axes if indices.dim() == 2 else ():
        values = indices.select(1 - axis, 0)
        if bool((indices == values.unsqueeze(1 - axis)).all()):
            return axis, values
    return None


def task_class(config: Mapping[str, Any], task: str) -> str:
    """The class that transformers gives networks of this configuration for a task, as peft calls it.

    Raises:
        UsageError: transformers is not installed.
        BadInput: it has none, or there is no such task.
    """
    automatic = (TASK_CLASSES | _OTHER_CLASSES).get(task)
    if automatic is None:
        raise BadInput(f"task_type {shown(task)} names no network class")
    transformers = optional_package("transformers", "hf")
    model_type = str(config.get("model_type"))
    mapping = getattr(transformers, automatic)._model_mapping
    with quiet(transformers):
        try:
            return str(mapping[type(transformers.AutoConfig.for_model(model_type))].__name__)
        except (KeyError, ValueError):
            raise BadInput(f"transformers {transformers.__version__} has no {automatic} for {model_type!r}.") from None
