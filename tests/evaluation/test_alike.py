"""Models that differ by roundings are scored once, all others by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from unmergeable.evaluation.alike import SAME, SCORED_AS, scored_once
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.scoring import Checkpoint

WIDTH = 64


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in ("first", "second")}


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def variant(name: str, path: Path, recovery: str | None = None) -> Variant:
    return Variant(name, 0, recovery, Checkpoint(path, str(path)), 0.0, {"confidence": 1.0})


def test_models_that_differ_by_roundings_have_one_checkpoint(tmp_path: Path) -> None:
    base, update, noise = drawn(1), drawn(2), drawn(3)
    expert = {name: tensor + 0.01 * update[name] for name, tensor in base.items()}

    def away(share: float) -> dict[str, torch.Tensor]:
        """``expert``, off by this share of its update."""
        return {name: tensor + share * 0.01 * noise[name] for name, tensor in expert.items()}

    variants = [
        variant("identity", written(tmp_path / "expert", expert)),
        variant("first", written(tmp_path / "near", away(SAME / 2)), "nearest_orbit"),
        variant("second", written(tmp_path / "far", away(SAME * 2)), "nearest_orbit"),
        variant("third", written(tmp_path / "shrunk", {n: base[n] + 0.65 * (expert[n] - base[n]) for n in base})),
        variant("fourth", written(tmp_path / "wider", {"first": torch.zeros(2, 2), "second": expert["second"]})),
        Variant("fifth", 0, "kabsch", None, 0.0, {}, refusal="none"),
    ]
    found = scored_once(variants, written(tmp_path / "base", base))
    paths = [one.checkpoint and one.checkpoint.path.name for one in found]
    assert paths == ["expert", "expert", "far", "shrunk", "wider", None]
    assert found[1].facts == {"confidence": 1.0, SCORED_AS: "identity (seed 0)"}
    assert [one for number, one in enumerate(found) if number != 1] == [
        one for number, one in enumerate(variants) if number != 1
    ]


def test_the_base_itself_is_like_nothing_but_itself(tmp_path: Path) -> None:
    """The control: a model that changes nothing has no update to be small against."""
    base = drawn(1)
    folder = written(tmp_path / "base", base)
    near = {name: tensor + 1e-6 for name, tensor in base.items()}
    variants = [variant("nothing", folder), variant("near", written(tmp_path / "near", near))]
    assert scored_once(variants, folder) == variants
