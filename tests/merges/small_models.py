"""Small models for the merges: a base and fine-tunes of it, with the odd tensors that checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

SHAPES = {
    "embed.weight": (50, 16),
    "layers.0.weight": (53, 50),
    "layers.0.bias": (300,),
    "layers.1.weight": (16, 3, 2, 2),
    "scale": (),
    "empty": (0, 4),
}


SEVERAL_BLOCKS = SHAPES | {"layers.0.weight": (530, 500)}


def make_models(
    count: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    task_size: float = 0.01,
    several_blocks: bool = False,
) -> tuple[State, list[State]]:
    """A base and ``count`` fine-tunes of it, whose task vectors differ in size from tensor to tensor.

    With ``several_blocks`` one tensor is larger than what a merge holds at a time, which costs a hundred times as much.
    """
    shapes = SEVERAL_BLOCKS if several_blocks else SHAPES
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: normal(shape) for name, shape in shapes.items()}
    experts = [
        {
            name: weight + task_size * (1 + position) * normal(tuple(weight.shape))
            for position, (name, weight) in enumerate(base.items())
        }
        for _ in range(count)
    ]
    return cast(base, dtype), [cast(expert, dtype) for expert in experts]


def cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()} | {"position_ids": torch.arange(7)}


def flat(state: State) -> Tensor:
    """All floating-point weights in one float64 vector."""
    return torch.cat([tensor.double().reshape(-1) for tensor in state.values() if tensor.is_floating_point()])


def size_bound(base: State | None, experts: list[State], coefficients: list[float]) -> Tensor:
    """Per weight, the sum of the magnitudes that a merge adds up: what its rounding errors are proportional to."""
    if base is None:
        return sum((abs(c) * flat(e).abs() for c, e in zip(coefficients, experts, strict=True)), torch.zeros(()))
    tasks = [abs(c) * (flat(e) - flat(base)).abs() for c, e in zip(coefficients, experts, strict=True)]
    return flat(base).abs() + sum(tasks, torch.zeros(()))


def rounding_bound(size: Tensor, dtype: torch.dtype, operations: int) -> Tensor:
    """What a sum of magnitude ``size`` may be off after ``operations`` in the compute dtype and one final rounding.

    Each operation errs by half an epsilon of its result, and float16 by half its smallest step near zero.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    final = size * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # The reference is float64 itself, so its own errors count too where the result is.
    return final + 2 * operations * size * torch.finfo(compute).eps / 2


def write_checkpoint(folder: Path, state: State, *, shards: int = 1, config: dict[str, object] | None = None) -> Path:
    """A checkpoint folder, its tensors dealt to ``shards`` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"], **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {
        name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(state)
    }
    for shard in set(weight_map.values()):
        members = {name: tensor for name, tensor in state.items() if weight_map[name] == shard}
        save_file(members, folder / shard, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
