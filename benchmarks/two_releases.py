"""What two releases tell of one another: of one expert under two keys, of two fine-tunes, and of one rotated.

    python -m benchmarks.two_releases [--out benchmarks/results/two_releases.json]

A small Llama of random weights, and fine-tunes of it that differ by 1 % of every weight's size: only how near the
releases come to each other is measured, and that depends on the bases and not on what the network has learnt. The
attacker has no base here: one release stands in for it, and ``nearest_orbit`` looks for the change of basis between.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from unmergeable import ops

METHODS = ("mergelock", "gauge")
STEP = 0.01


def write_models(folder: Path) -> None:
    """``base``, ``expert`` and ``other``: two fine-tunes of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    for number, name in enumerate(("expert", "other")):
        generator = torch.Generator().manual_seed(number)
        shutil.copytree(folder / "base", folder / name)
        moved = {
            key: tensor + STEP * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
            for key, tensor in tensors.items()
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})


def distances(release: Path, reference: Path) -> dict[str, float | None]:
    """Relative distance of two checkpoints as they are, and in the nearest basis."""
    comparison = ops.inspect(release, base=reference).comparison
    assert comparison is not None
    return {
        f"{half}_{name}": comparison.distance(half, side)
        for half in ("attention", "feed_forward")
        for name, side in (("as_stored", "before"), ("nearest", "after"))
    }


def measured(method: str, folder: Path) -> dict[str, Any]:
    """The distances between releases of one method."""
    released = {}
    for name, source in (("first", "expert"), ("second", "expert"), ("of_the_other", "other")):
        released[name] = folder / f"{method}-{name}"
        ops.protect(
            folder / source, base=folder / "base", out=released[name], key=f"{released[name]}.key", method=method
        )
    rotated = folder / f"{method}-rotated"
    ops.rotate(released["first"], key=Path(f"{released['first']}.key"), out=rotated, new_key=f"{rotated}.key")
    return {
        "one_expert_under_two_keys": distances(released["second"], released["first"]),
        "a_release_and_its_rotation": distances(rotated, released["first"]),
        "two_fine_tunes_under_two_keys": distances(released["of_the_other"], released["first"]),
        "two_fine_tunes_unprotected": distances(folder / "other", folder / "expert"),
        "a_release_and_the_base": distances(released["first"], folder / "base"),
    }


def main() -> None:
    """Measure, and write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_models(Path(place))
        result = {
            "command": "python -m benchmarks.two_releases",
            "step": STEP,
            "methods": {method: measured(method, Path(place)) for method in METHODS},
        }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
