from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.demo.data import ImageTask, Sizes, load_animals, load_mnist
from unmergeable.demo.train import Expert, evaluate, extract_features, finetune_experts, fit_prototypes, prepare_pixels
from unmergeable.network.load import load_network
from unmergeable.tasks import FeatureHead


@pytest.fixture(scope="module")
def task() -> ImageTask:
    return load_mnist(sizes=Sizes(train=320, validation=10, test=100))


@pytest.fixture(scope="module")
def head(base: Path, task: ImageTask) -> FeatureHead:
    return fit_prototypes(load_network(base), task)


@pytest.fixture(scope="module")
def expert(base: Path, task: ImageTask, head: FeatureHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expert")
    finetune_experts(base, [Expert(task, head, folder)])
    return folder


def first_images(task: ImageTask, count: int) -> ImageTask:
    return replace(task, train=type(task.train)(task.train.images[:count], task.train.labels[:count]))


def test_pixels_are_grey_enlarged_and_normalised() -> None:
    images = np.zeros((2, 28, 28), np.uint8)
    images[1] = 255

    black, white = prepare_pixels(images)

    assert black.shape == (3, 42, 42)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        torch.testing.assert_close(black[channel], torch.full((42, 42), -mean / std))
        torch.testing.assert_close(white[channel], torch.full((42, 42), (1 - mean) / std))


def test_pixels_keep_the_picture_upright() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :7, 14:] = 255

    channel = prepare_pixels(image)[0, 0]

    assert channel.argmax() // 42 < 12
    assert channel.argmax() % 42 > 21


def test_features_do_not_depend_on_the_batch_they_are_in(base: Path, task: ImageTask) -> None:
    """70 images are a full batch of 64 and a short one; a single image is its own batch."""
    network = load_network(base)
    together = extract_features(network, task.train.images[:70])
    alone = torch.cat([extract_features(network, task.train.images[number : number + 1]) for number in (0, 63, 64, 69)])

    # Matrix products of other sizes sum in another order: a few eps for each of 24 residual branches.
    gap = (together[[0, 63, 64, 69]] - alone).abs().max()
    assert gap < 64 * torch.finfo(torch.float32).eps * together.abs().max()


def test_a_prototype_is_the_mean_direction_of_its_class(base: Path, task: ImageTask, head: FeatureHead) -> None:
    features = extract_features(load_network(base), task.train.images).numpy()
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = directions[task.train.labels == 7].mean(axis=0)

    np.testing.assert_allclose(head.weight[7].numpy(), mean / np.linalg.norm(mean), atol=1e-5)


def test_a_prototype_is_its_own_best_class(head: FeatureHead) -> None:
    for scale in (0.1, 30.0):  # lengths of features do not count
        assert head.logits(scale * head.weight).argmax(dim=1).tolist() == list(range(10))


def test_the_expert_is_far_better_at_its_task(base: Path, expert: Path, task: ImageTask, head: FeatureHead) -> None:
    before, after = (evaluate(folder, task.test, head) for folder in (base, expert))

    # 100 images: a deviation of 0.05 for one score, 0.07 for the difference of two.
    assert after - before > 0.10 + 0.07
    assert before > 0.10 + 3 * 0.03  # the base is no guess either, so the prototypes mean something


def test_accuracy_counts_right_answers(base: Path, task: ImageTask, head: FeatureHead) -> None:
    network = load_network(base)
    shifted = replace(head, weight=head.weight.roll(1, dims=0))  # every class gets its neighbour's prototype
    answers = head.logits(extract_features(network, task.test.images)).argmax(dim=1).numpy()

    assert evaluate(network, task.test, head) == np.mean(answers == task.test.labels)
    assert evaluate(network, task.test, shifted) == np.mean((answers + 1) % 10 == task.test.labels)


def test_the_expert_is_a_checkpoint_like_the_base(base: Path, expert: Path) -> None:
    old, new = (load_file(folder / "model.safetensors") for folder in (base, expert))

    assert {name: (tensor.shape, tensor.dtype) for name, tensor in new.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in old.items()
    }
    assert (expert / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_attention_and_mlp_of_every_block_learn_and_nothing_else(base: Path, expert: Path) -> None:
    old, new = (load_file(folder / "model.safetensors") for folder in (base, expert))
    changed = {name for name in old if not torch.equal(old[name], new[name])}

    assert changed == {name for name in old if ".attention." in name or ".mlp." in name}
    assert len(changed) == 12 * 12


def test_the_seed_decides_the_expert(base: Path, task: ImageTask, head: FeatureHead, tmp_path: Path) -> None:
    few = first_images(task, 32)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        finetune_experts(base, [Expert(few, head, tmp_path / name)], seed=seed)

    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_experts_made_side_by_side_are_those_made_alone(
    base: Path, task: ImageTask, head: FeatureHead, tmp_path: Path
) -> None:
    few, other = first_images(task, 32), replace(first_images(task, 48), title="other digits")
    reports: list[tuple[str, int, int, str]] = []
    state = torch.get_rng_state()

    finetune_experts(base, [Expert(few, head, tmp_path / "alone")])
    finetune_experts(
        base,
        [Expert(few, head, tmp_path / "together"), Expert(other, head, tmp_path / "other")],
        progress=lambda *report: reports.append(report),
    )

    alone, together, third = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "together", "other")
    )
    assert alone == together
    assert alone != third
    assert {report[0] for report in reports} == {"learning handwritten digits and other digits"}
    assert [done for _, done, _, _ in reports] == sorted(done for _, done, _, _ in reports)
    assert reports[-1][1:] == (5, 5, "steps")
    assert torch.equal(state, torch.get_rng_state())


def test_an_interruption_ends_every_run(base: Path, task: ImageTask, head: FeatureHead, tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupt(stage: str, done: int, total: int, unit: str) -> None:
        seen.append(done)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_experts(
            base, [Expert(task, head, tmp_path / name) for name in ("first", "second")], progress=interrupt
        )

    assert len(seen) < 10  # of the 40 steps that two runs of 320 images take
    assert not list(tmp_path.iterdir())


def test_reports_its_progress(base: Path, task: ImageTask, head: FeatureHead, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []

    finetune_experts(
        base,
        [Expert(first_images(task, 32), head, tmp_path / "expert")],
        progress=lambda *report: reports.append(report),
    )
    evaluate(base, task.validation, head, progress=lambda *report: reports.append(report))

    assert reports == [
        *(("learning handwritten digits", step, 2, "steps") for step in range(3)),
        ("scoring", 0, 10, "images"),
        ("scoring", 10, 10, "images"),
    ]


@pytest.mark.slow
def test_a_plain_merge_keeps_most_of_both_gains(base: Path, tmp_path: Path) -> None:
    """What the demo's story stands on; with the demo's own sizes."""
    tasks = load_mnist(), load_animals()
    backbone = load_network(base)
    heads = [fit_prototypes(backbone, task) for task in tasks]
    experts = [Expert(task, head, tmp_path / task.name) for task, head in zip(tasks, heads, strict=True)]
    finetune_experts(base, experts)
    old, first, second = (load_file(folder / "model.safetensors") for folder in (base, *(e.out for e in experts)))
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    save_file(
        {name: tensor + 0.6 * (first[name] + second[name] - 2 * tensor) for name, tensor in old.items()},
        merged / "model.safetensors",
        metadata={"format": "pt"},
    )

    for expert in experts:
        without, learnt, kept = (
            evaluate(folder, expert.task.test, expert.head) for folder in (base, expert.out, merged)
        )
        assert learnt - without > 0.10
        assert (kept - without) / (learnt - without) > 0.70
