"""A trained protection of an adapter that stays an adapter: its A and B are trained, and the base's weights stay.

    y = W x + s B A x        s = alpha / rank

A merge that takes c of the adapter, and something else, adds up

    W + c s B A + noise

so that c belongs to B, whose base is 0; A counts with 1; and the noise, as large as the expert's own s B A, is added to
W. The loss and its gradient are those of whole weights (:mod:`.merged_loss`); only the parameters differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.checkpoint.adapter.alone import LoneAdapter, Product
from unmergeable.devices import network_device
from unmergeable.errors import BadInput
from unmergeable.network.load import load_network
from unmergeable.network.precision import warn_if_slower
from unmergeable.network.tasks import accuracy
from unmergeable.optional import optional_package
from unmergeable.protections.base import Inputs
from unmergeable.protections.trained import LOSSES, TrainedFacts, TrainedProtection, TrainingJob, TrainingRun

_WHOLE = "merge it into its base by leaving out --keep-adapter (keep_adapter)"


@dataclass(frozen=True)
class TrainedAdapter:
    """``tensors`` by the keys of the adapter's file, in its order and precision."""

    tensors: Mapping[str, Tensor]
    job: TrainingJob
    facts: TrainedFacts


def check_adapter(protection: TrainedProtection, inputs: Inputs, adapter: LoneAdapter) -> None:
    """Refuse what can be refused before the training.

    Raises:
        UsageError, BadInput: naming what is wrong and what to do.
    """
    protection.job(inputs, _with_adapter(inputs, adapter))


def train_adapter(protection: TrainedProtection, inputs: Inputs, adapter: LoneAdapter) -> TrainedAdapter:
    """Train A and B. Killed, the same call goes on. Raises as :func:`check_adapter`, and as the method's training."""
    network = _with_adapter(inputs, adapter)
    job = protection.job(inputs, network)
    device = network_device()
    warn_if_slower(protection.precision, device)
    network.to(device)
    factors = _factors(network, adapter)
    before = accuracy(network, job.task)

    def train() -> dict[str, Tensor]:
        parameters = dict(network.named_parameters())
        run = TrainingRun(
            network,
            {b: torch.zeros_like(parameters[b]) for _, b in factors.values()},
            job.task.predict,
            job.examples,
            job.generic,
            also_trained=frozenset(a for a, _ in factors.values()),
            disturbed=dict(_disturbed(parameters, adapter.products)),
            seed=job.recipe["seed"],
            kept=job.kept,
            progress=inputs.progress,
        )
        losses = protection.train(run)
        stored = {}
        for product in adapter.products:
            for key, name in zip((product.key_a, product.key_b), factors[product.module], strict=True):
                dtype = adapter.file.tensor(key).dtype
                stored[key] = parameters[name].detach().cpu().to(dtype).contiguous()
        return {**stored, LOSSES: torch.tensor(losses, dtype=torch.float64)}

    stored = dict(job.trained(train))
    facts = TrainedFacts(tuple(stored.pop(LOSSES).tolist()))
    _show(network, adapter, stored)  # rounded as the file stores them
    accuracies = {"expert": before, "protected": accuracy(network, job.task)}
    return TrainedAdapter({key: stored[key] for key in adapter.file.specs}, job, replace(facts, accuracies=accuracies))


def _with_adapter(inputs: Inputs, adapter: LoneAdapter) -> Any:
    """The base's live network with the adapter beside its weights."""
    peft = optional_package("peft", "lora")
    other = next(iter(adapter.others), None)
    if other is None:
        other = next((product.key_a for product in adapter.products if not _is_of_module(product)), None)
    if other is not None:
        raise BadInput(f"{adapter.folder}: {other} is no A or B of a linear layer, and cannot be trained; {_WHOLE}.")
    network = load_network(inputs.base_folder)
    peft.LoraModel(network, {"default": peft.LoraConfig.from_pretrained(str(adapter.folder))}, "default")
    _show(network, adapter, {key: adapter.file.tensor(key) for key in adapter.file.specs})
    return network.eval()


def _is_of_module(product: Product) -> bool:
    return product.stacked == 1 and product.key_a.endswith(".lora_A.weight")


def _factors(network: nn.Module, adapter: LoneAdapter) -> dict[str, tuple[str, str]]:
    """Names of A and B in the live network, by module.

    Raises:
        BadInput: the network has no such module, or one that the file knows nothing of.
    """
    live = {name for name, _ in network.named_parameters() if ".lora_" in name}
    found = {
        product.module: (f"{product.module}.lora_A.default.weight", f"{product.module}.lora_B.default.weight")
        for product in adapter.products
    }
    differing = live.symmetric_difference(name for names in found.values() for name in names)
    if differing:
        raise BadInput(
            f"{adapter.folder}: {min(differing)} is in the network or in the file, not in both, with the transformers "
            f"that is installed; {_WHOLE}."
        )
    return found


@torch.no_grad()
def _show(network: nn.Module, adapter: LoneAdapter, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for product in adapter.products:
        names = _factors(network, adapter)[product.module]
        for key, name in zip((product.key_a, product.key_b), names, strict=True):
            parameters[name].copy_(tensors[key])


def _disturbed(parameters: Mapping[str, Tensor], products: tuple[Product, ...]) -> list[tuple[str, float]]:
    """The weights beside which adapters lie, with the standard deviation of what each adds."""
    sizes = []
    for product in products:
        a, b = (parameters[f"{product.module}.lora_{part}.default.weight"].detach().flatten(1) for part in "AB")
        spread = float((b @ a).std(correction=0)) * abs(product.scale)
        sizes.append((f"{product.module}.base_layer.weight", spread))
    return sizes
