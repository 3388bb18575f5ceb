"""A mistake in a plan's data or models is found before anything is made: one line, and no folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from unmergeable.errors import BadInput
from unmergeable.evaluation.audits import audit, estimate_audit
from unmergeable.tasks import FeatureHead, write_head

Break = Callable[[Path, dict[str, Any]], object]


def other_arrays(name: str, **changes: Any) -> Break:
    """The data file with some of its arrays changed, in a file of the test's own."""

    def change(folder: Path, document: dict[str, Any]) -> None:
        with np.load(folder / name) as archive:
            arrays = {key: archive[key] for key in archive.files}
        for key, function in changes.items():
            arrays[key] = function(arrays[key])
        write(folder / name, lambda path: np.savez(path, **{k: v for k, v in arrays.items() if v is not None}))

    return change


def write(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()  # a link to the workshop's
    make(path)


def out_of_range(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[7] = 9
    return labels


def bytes_of(name: str, content: bytes) -> Break:
    return lambda folder, document: write(folder / name, lambda path: path.write_bytes(content))


def head(width: int, classes: int = 5) -> Break:
    made = FeatureHead(torch.zeros(classes, width), pooling="rest")
    return lambda folder, document: write(folder / "mine-head.safetensors", lambda path: write_head(made, path))


def learns(samples: Sequence[int], kept: int = 200) -> Break:
    """A plan whose attackers learn, and training data that are ``kept`` examples long."""

    def change(folder: Path, document: dict[str, Any]) -> None:
        other_arrays("mine-train.npz", label=lambda rows: rows[:kept], pixel_values=lambda rows: rows[:kept])(
            folder, document
        )
        document["threat_models"] = ["few_shot"]
        document["few_shot"] = {"samples": list(samples)}
        for task in document["tasks"]:
            task["train"] = f"{task['name'].removesuffix('-task')}-train.npz"

    return change


def other_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """A free-rider whose tensors are others."""

    def changed(folder: Path, document: dict[str, Any]) -> None:
        source = (folder / "theirs").resolve()
        (folder / "theirs").unlink()
        shutil.copytree(source, folder / "theirs")
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "theirs" / "model.safetensors", {"format": "pt"})

    return changed


def owned(data: str, **more: str) -> Break:
    """A protection that is trained on the owner's examples."""
    method = {"method": "mergeguard", "data": data, "head": "mine-head.safetensors", **more}
    return lambda folder, document: document["protect"].update(methods=[method])


def both(*changes: Break) -> Break:
    def change(folder: Path, document: dict[str, Any]) -> None:
        for one in changes:
            one(folder, document)

    return change


def of_texts(folder: Path, document: dict[str, Any]) -> None:
    (folder / "mine-test.jsonl").write_text(json.dumps({"text": "a b", "label": 1}) + "\n")
    document["tasks"][0]["test"] = "mine-test.jsonl"


def release(**entry: str) -> Break:
    return lambda folder, document: document["protect"].update(methods=[{"name": "made", **entry}])


def empty_folder(folder: Path, document: dict[str, Any]) -> None:
    (folder / "nothing").mkdir()
    release(checkpoint="nothing")(folder, document)


def adapter(folder: Path, document: dict[str, Any]) -> None:
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"")
    release(checkpoint="lora")(folder, document)


MISTAKES: dict[str, tuple[Break, str]] = {
    "no archive": (bytes_of("mine-test.npz", b"no"), "task mine-task, test: {}/mine-test.npz: not a readable archive"),
    "label out of range": (
        other_arrays("theirs-validation.npz", label=out_of_range),
        "task theirs-task, validation: {}/theirs-validation.npz[7]: label 9 is out of range; the network has classes 0",
    ),
    "no labels": (
        other_arrays("mine-validation.npz", label=lambda _: None),
        "no label; this use of the data needs one for every example",
    ),
    "fewer classes": (head(32, classes=3), "is out of range; the network has classes 0 to 2"),
    "another width": (
        head(30),
        "task mine-task, validation: the head of this task reads 30 features and ViTModel gives 32",
    ),
    "no head": (bytes_of("mine-head.safetensors", b"no"), "mine-head.safetensors is not a head of a task"),
    "no tokenizer": (of_texts, "holds no usable tokenizer"),
    "too few to learn from": (
        learns([16, 100], kept=50),
        "task mine-task, train: task mine-task: 50 examples to learn",
    ),
    "a tensor is missing": (
        other_tensors(lambda tensors: tensors.pop("embeddings.cls_token")),
        "expert theirs: to be merged, models must hold the same tensors: tensor 'embeddings.cls_token'",
    ),
    "another shape": (
        other_tensors(lambda t: t.update({"layernorm.weight": torch.ones(33)})),
        "expert theirs: to be merged, models must hold the same tensors: tensor 'layernorm.weight'",
    ),
    "the owner's labels": (
        both(other_arrays("mine-train.npz", label=out_of_range), owned("mine-train.npz")),
        "protect, mergeguard: {}/mine-train.npz[7]: label 9 is out of range",
    ),
    "no other inputs": (
        both(
            lambda folder, document: (folder / "others.npz").write_bytes(b"no"),
            owned("mine-train.npz", method="collapse", generic="others.npz"),
        ),
        "protect, collapse: {}/others.npz: not a readable archive",
    ),
    "too few siblings": (
        lambda folder, document: document["protect"].update(
            methods=[{"method": "sensitivity_shield", "data": "mine-train.npz", "siblings": ["theirs"]}]
        ),
        "are 2 and siblings 1; give one for each",
    ),
    "no release": (empty_folder, "made: "),
    "an adapter": (
        adapter,
        "made: {0}/lora is an adapter, which an audit cannot load; write it out first: unmergeable merge",
    ),
    "nothing recovered": (
        both(
            other_tensors(lambda tensors: tensors.pop("layernorm.bias")), release(checkpoint="mine", recovered="theirs")
        ),
        "to be merged, models must hold the same tensors: tensor 'layernorm.bias'",
    ),
}


def test_control_without_a_mistake_it_would_start(plan_file: Path) -> None:
    assert estimate_audit(plan_file, workers=1).has_expert


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_found_first(name: str, plan_file: Path, document: dict[str, Any], tmp_path: Path) -> None:
    change, message = MISTAKES[name]
    change(plan_file.parent, document)
    plan_file.write_text(yaml.safe_dump(document))
    with pytest.raises(BadInput) as error:
        audit(plan_file, out=tmp_path / "out", workers=1)
    assert message.format(plan_file.parent) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_as_many_examples_as_are_asked_for_are_enough(plan_file: Path, document: dict[str, Any]) -> None:
    """Control of the mistake above."""
    learns([16, 50], kept=50)(plan_file.parent, document)
    plan_file.write_text(yaml.safe_dump(document))
    assert estimate_audit(plan_file, workers=1).trainings > 0
