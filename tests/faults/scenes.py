"""Commands to be disturbed: what lies in a folder before each, its arguments, and what it writes there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

from zoo import TOYS, write_toy

PASSPHRASE = "of a scene"


@dataclass(frozen=True)
class Scene:
    """``prepare`` fills a folder; ``arguments`` are relative to it; ``outputs`` are the checkpoints it writes.

    ``environment`` is that of the command, besides the usual one.
    """

    prepare: Callable[[Path], None]
    arguments: Sequence[str]
    outputs: Sequence[str] = ("out",)
    environment: Mapping[str, str] = field(default_factory=dict)


def _networks(folder: Path, *names: str) -> None:
    for seed, name in enumerate(("base", *names)):
        write_toy(TOYS["llama"], folder / name, seed=seed)


def _expert(folder: Path) -> None:
    _networks(folder, "expert")


def _pair(folder: Path) -> None:
    _networks(folder, "first", "second")


def _composition(folder: Path) -> None:
    _networks(folder, "expert", "sibling", "other")
    np.savez(folder / "data.npz", input_ids=np.random.default_rng(0).integers(3, 67, size=(8, 11)))


def _protected(folder: Path) -> None:
    from unmergeable import ops

    _expert(folder)
    ops.protect(
        folder / "expert",
        base=folder / "base",
        out=folder / "release",
        key=folder / "release.key",
        method="gauge",
        seed=5,
    )


def _encrypted(folder: Path) -> None:
    from unmergeable import ops

    _protected(folder)
    ops.change_passphrase(folder / "release.key", new=PASSPHRASE)


def _workshop(folder: Path) -> None:
    """Two fine-tunes of a vision transformer that are random, with random tasks: what is scored is no matter."""
    from transformers import ViTConfig, ViTModel

    from unmergeable.tasks import FeatureHead, write_head

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()
    for name in ("base", "mine", "theirs"):
        network.save_pretrained(folder / name)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    experts, tasks = [], []
    for name in ("mine", "theirs"):
        write_head(
            FeatureHead(torch.randn(3, 16, generator=generator), pooling="rest"), folder / f"{name}-head.safetensors"
        )
        for part in ("validation", "test"):
            pixels = torch.randn(12, 3, 8, 8, generator=generator).numpy()
            np.savez(folder / f"{name}-{part}.npz", pixel_values=pixels, label=np.arange(12) % 3)
        files = {"validation": f"{name}-validation.npz", "test": f"{name}-test.npz", "head": f"{name}-head.safetensors"}
        tasks.append({"name": f"{name}-task", **files, "examples": {"validation": 12, "test": 12}})
        experts.append({"name": name, "path": name, "task": f"{name}-task"})
    plan = {
        "base": "base",
        "experts": experts,
        "protect": {"expert": "mine", "methods": ["mergelock"]},
        "merges": ["task_arithmetic"],
        "recoveries": ["nearest_orbit"],
        "coefficients": {"defended": [1.0], "rider": [1.0], "refinements": 0},
        "tiers": ["T0"],
        "tasks": tasks,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))


def _protect(method: str, *more: str) -> list[str]:
    given = ["--base", "base", "--out", "out", "--key", "out.key", "--method", method, "--seed", "5"]
    return ["protect", "expert", *given, *more]


_SHIELD = ("--data", "data.npz", "--sibling", "sibling", "--sibling", "other")

SCENES = {
    "protect": Scene(_expert, _protect("gauge", "--key", "the.key")),
    "protect, three steps": Scene(_composition, _protect("sensitivity_shield,mergelock,taylor_mlp", *_SHIELD)),
    "restore": Scene(_protected, ["restore", "release", "--key", "release.key", "--out", "out"]),
    "recover": Scene(_protected, ["recover", "release", "--base", "base", "--method", "nearest_orbit", "--out", "out"]),
    "merge": Scene(
        _pair,
        ["merge", "--base", "base", "--expert", "first", "--expert", "second", "--method", "ties", "--out", "out"],
    ),
    "rotate": Scene(
        _protected, ["rotate", "release", "--key", "release.key", "--out", "out", "--new-key", "out.key", "--seed", "6"]
    ),
    "key": Scene(
        _encrypted,
        ["key", "change-passphrase", "release.key", "--unencrypted"],
        outputs=(),
        environment={"UNMERGEABLE_PASSPHRASE": PASSPHRASE},
    ),
    "verify": Scene(_protected, ["verify", "expert", "release"], outputs=()),
    "inspect": Scene(_protected, ["inspect", "release", "--base", "base"], outputs=()),
    "audit": Scene(_workshop, ["audit", "plan.yaml", "--out", "audit", "--workers", "1"], outputs=()),
}


def timeless(name: str, data: bytes) -> bytes:
    """The bytes of a file without what differs from run to run by its nature.

    Of a manifest what the whole network was measured to do, which a read that fails may leave out with the reason, and
    the signature over it.
    """
    if name.endswith(".html"):
        return b""
    if name.endswith("unmergeable.json"):
        return _without(data, ("logits", "signature"))
    return _without(data, ("seconds",)) if name.startswith("audit/") and name.endswith(".json") else data


def _without(data: bytes, left_out: Sequence[str]) -> bytes:
    """JSON without the entries whose names contain one of these."""

    def without(value: object) -> object:
        if isinstance(value, dict):
            kept = {key: item for key, item in value.items() if not any(part in key for part in left_out)}
            return {key: without(item) for key, item in kept.items()}
        return [without(item) for item in value] if isinstance(value, list) else value

    try:
        return json.dumps(without(json.loads(data)), sort_keys=True).encode()
    except ValueError:  # half a file, which is what is looked for
        return data
