from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unmergeable.demo.data import (
    MNIST,
    Examples,
    ImageTask,
    PackagedFile,
    Sizes,
    load_animals,
    load_mnist,
    read_array_pickle,
    split_task,
    without_repeats,
)
from unmergeable.errors import BadInput

LOADERS = [load_mnist, load_animals]
Loader = Callable[..., ImageTask]


def image_keys(examples: Examples) -> list[bytes]:
    return [image.tobytes() for image in examples.images]


def parts(task: ImageTask) -> tuple[Examples, Examples, Examples]:
    return task.train, task.validation, task.test


@pytest.mark.parametrize("load", LOADERS)
def test_a_task_is_images_with_labels(load: Loader) -> None:
    sizes = Sizes(train=600, validation=100, test=300)
    task = load(sizes=sizes)

    assert [len(part) for part in parts(task)] == [600, 100, 300]
    for part in parts(task):
        assert part.images.shape == (len(part), 28, 28)
        assert part.images.dtype == np.uint8
        assert part.images.max() == 255
        assert part.labels.dtype == np.int64
    assert len(task.class_names) == 10
    # Ten equal classes: the count of one in 600 draws is 60 with a deviation of 7.
    assert np.bincount(task.train.labels, minlength=10).min() > 60 - 5 * 7


@pytest.mark.parametrize("load", LOADERS)
def test_no_image_is_in_two_parts_or_twice_in_one(load: Loader) -> None:
    task = load()
    keys = [key for part in parts(task) for key in image_keys(part)]
    mirrored = [image[:, ::-1].tobytes() for image in task.test.images]

    assert len(set(keys)) == len(keys)
    assert not set(mirrored) & (set(image_keys(task.train)) | set(image_keys(task.validation)))


@pytest.mark.parametrize("load", LOADERS)
def test_the_seed_decides_the_split(load: Loader) -> None:
    first, again, other = (image_keys(load(seed=seed).test) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_the_test_part_does_not_depend_on_the_size_of_the_others() -> None:
    small, large = (load_mnist(sizes=Sizes(train=count, validation=count, test=50)) for count in (10, 1000))

    assert image_keys(small.test) == image_keys(large.test)


def test_labels_belong_to_their_images() -> None:
    """A nearest-mean rule does far better than chance; it could not if labels were shifted against images."""
    for load in LOADERS:
        task = load()
        images = task.train.images.reshape(len(task.train), -1).astype(float)
        means = np.stack([images[task.train.labels == number].mean(axis=0) for number in range(10)])
        test = task.test.images.reshape(len(task.test), -1).astype(float)
        nearest = ((test[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)

        # Chance is 0.1 with a deviation of 0.013 on 500 images.
        assert (nearest == task.test.labels).mean() > 0.3
        assert (np.roll(nearest, 1) == task.test.labels).mean() < 0.2


def test_repeats_and_mirror_images_are_dropped() -> None:
    images = np.zeros((4, 28, 28), np.uint8)
    images[0, 3, 4] = images[1, 3, 4] = 9
    images[2] = images[0][:, ::-1]
    images[3, 5, 5] = 1

    unique = without_repeats(Examples(images, np.array([0, 0, 0, 1])))

    assert unique.labels.tolist() == [0, 1]
    assert (unique.images == images[[0, 3]]).all()


def test_asking_for_more_images_than_there_are() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)

    with pytest.raises(BadInput, match="5 different images, 6 wanted"):
        split_task("few", "few", ("one",), Examples(images, np.zeros(5, np.int64)), seed=0, sizes=Sizes(2, 2, 2))


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([1.5, -2.0])])
def test_reads_a_pickled_array(array: np.ndarray) -> None:
    assert np.array_equal(read_array_pickle(pickle.dumps(array, protocol=4)), array)


class RunsACommand:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trap}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    content = pickle.dumps(RunsACommand(trap))

    with pytest.raises(BadInput, match="it names"):
        read_array_pickle(content)
    assert not trap.exists()

    pickle.loads(content)  # the control: an ordinary unpickler falls for it
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(np.arange(9))[:-20]])
def test_a_pickle_of_something_else_is_refused(content: bytes) -> None:
    with pytest.raises(BadInput):
        read_array_pickle(content)


def test_a_missing_package_is_named_with_its_remedy() -> None:
    file = PackagedFile("no_such_package", "no-such-package==1.0", "data.gz", "0" * 64)

    with pytest.raises(BadInput, match=r"pip install --no-deps no-such-package==1\.0"):
        file.read()


def test_another_release_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_release"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data.gz").write_bytes(MNIST.read() + b"\0")
    monkeypatch.syspath_prepend(tmp_path)
    file = PackagedFile("other_release", "other-release==1.0", "data.gz", MNIST.sha256)

    with pytest.raises(BadInput, match=r"is not the file of other-release==1\.0"):
        file.read()

    (package / "data.gz").write_bytes(MNIST.read())  # the control; and nothing imports the package on the way
    assert io.BytesIO(file.read()).read(2) == b"\x1f\x8b"
