"""Fine-tuning in a subspace: every linear layer learns a low-rank update beside its frozen weight (LoRA, 2106.09685).

    y = W x + (alpha / rank) B A x        A [rank, inputs] random, B [outputs, rank] zero at the start

Inside the context only A and B learn; at its end W + (alpha / rank) B A is the weight, and the network has the modules
and the parameters that it had. The adapters are those of the peft library.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unmergeable.errors import BadInput, UsageError
from unmergeable.network.linear_layers import linear_layers
from unmergeable.optional import optional_package

_ADAPTERS = ("lora_A.", "lora_B.")
"""What peft calls them in the names of parameters."""


@contextmanager
def low_rank_updates(network: nn.Module, *, rank: int, alpha: float, seed: int) -> Iterator[Callable[[str], bool]]:
    """Beside every linear layer, ``nn.Linear`` and GPT-2's ``Conv1D``, an adapter that is merged in at the end.

    A layer that shares its weight with an embedding has none: the update would be the embedding's too. Weights are
    overwritten in place by the merge; after an exception they are as before.

    Args:
        network: changed while the context lasts, so that its names on disk mean nothing inside.
        rank: of each update.
        alpha: the update is scaled by ``alpha / rank``.
        seed: of A; the global generator is put back.

    Yields:
        Whether a parameter, by its module name, is one of the adapters'.

    Raises:
        UsageError: peft is not installed, or the rank is not positive.
        BadInput: the network has no such layer.
    """
    peft = optional_package("peft", "lora")
    if rank < 1:
        raise UsageError(f"rank={rank}: a low-rank update needs at least 1.")
    names = _linear_module_names(network)
    if not names:
        raise BadInput(f"{type(network).__name__} has no linear layer to adapt; train all of its weights instead.")
    # Names in a list would be compared as endings, and take layers along that are not meant.
    targets = "|".join(re.escape(name) for name in names)
    configuration = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds out how each layer is stored
        tuner = peft.LoraModel(network, {"default": configuration}, "default")
    try:
        yield lambda name: any(adapter in name for adapter in _ADAPTERS)
        tuner.merge_and_unload()
    except BaseException:
        tuner.unload()
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _linear_module_names(network: nn.Module) -> list[str]:
    adapted = {layer.module for layer in linear_layers(network)}
    return [name for name, module in network.named_modules() if module in adapted]
