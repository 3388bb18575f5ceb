"""What a training run needs to go on after it was killed, in one safetensors file that is replaced as a whole.

    weights and buffers, the optimizer's moments, torch's generators, the losses so far (and with them the step)

A state belongs to one run: its ``token`` names network, data, settings and seed. A file with another token is not
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmergeable.checkpoint.disk import sync_folder
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec, save_file_order
from unmergeable.checkpoint.writer import ShardWriter
from unmergeable.errors import CheckpointError, first_line

_LOSSES, _GENERATOR, _DEVICE_GENERATOR = "losses", "generator", "generator of the device"


@dataclass(frozen=True)
class Kept:
    """``file`` holds the state of the run ``token``, written again after ``every`` steps. Its folder must exist."""

    file: Path
    token: str
    every: int = 100


def write_state(
    kept: Kept,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    losses: Sequence[float],
) -> None:
    """Keep the state: whoever reads the file sees the one before or this one.

    Args:
        kept: where.
        tensors: weights and buffers, by name.
        optimizer: of some of them.
        device: the network's, whose generator is kept beside the processor's.
        losses: of every step taken.
    """
    state = {f"network.{name}": tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, moment in optimizer.state.get(tensor, {}).items():
            state[f"optimizer.{key}.{name}"] = moment
    state[_LOSSES] = torch.tensor(losses, dtype=torch.float64)
    state[_GENERATOR] = torch.get_rng_state()
    if device.type != "cpu":
        state[_DEVICE_GENERATOR] = torch.get_device_module(device).get_rng_state(device)
    write_tensors(kept.file, kept.token, state)


def restore_state(
    kept: Kept, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> list[float]:
    """Put a kept state back into network, optimizer and generators.

    Returns:
        The losses of the steps taken; none when no state of this run is kept, and then nothing is changed.

    Raises:
        CheckpointError: the file is damaged.
    """
    state = read_tensors(kept.file, kept.token)
    if state is None:
        return []
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            moment, _, name = rest.partition(".")
            # The count of steps, a number, stays on the processor.
            moments.setdefault(name, {})[moment] = value.to(tensors[name].device) if value.dim() else value
    with torch.no_grad():
        for name, tensor in tensors.items():
            before = state[f"network.{name}"].to(tensor.device)
            if not torch.equal(tensor, before):  # most buffers never change, and some cannot be written to
                tensor.copy_(before)
            if name in moments:
                optimizer.state[tensor] = moments[name]
    torch.set_rng_state(state[_GENERATOR])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[_DEVICE_GENERATOR], device)
    losses: list[float] = state[_LOSSES].tolist()
    return losses


def write_tensors(file: Path, token: str, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a file, in place of one that may be there, at once and for good.

    Raises:
        CheckpointError: when it cannot be written; what was there stays.
    """
    specs = {name: TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = save_file_order(specs)
    temporary = file.with_name(file.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with ShardWriter(temporary, [(name, specs[name]) for name in order], {"token": token}) as writer:
        for name in order:
            writer.write(name, tensors[name].detach().cpu())
        writer.finish()
    temporary.replace(file)
    sync_folder(file.parent)


def read_tensors(file: Path, token: str) -> dict[str, Tensor] | None:
    """What :func:`write_tensors` wrote; None when there is no such file, or one with another token.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("token") != token:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  safe_open is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({first_line(error)}); remove it, and the run starts anew."
        ) from error
