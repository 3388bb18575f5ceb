"""Every format gives the same examples, and what is wrong with one is said in one line that names it."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from unmergeable.data import DataSource, Example, Fields, class_number, lines
from unmergeable.data.formats import FORMATS, find_format
from unmergeable.errors import BadInput, UsageError

TEXTS = ["a first text", "zweiter Text: ä", "third"]
LABELS = [2, 0, 1]


@pytest.fixture
def pixels() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8))


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_images(folder: Path, images: list[np.ndarray], labels: list[int]) -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return folder


def contents(source: DataSource) -> list[object]:
    return [e.content if isinstance(e.content, str) else np.asarray(e.content).tolist() for e in source]


def test_texts_with_labels_are_the_same_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "texts.parquet")
    np.savez(tmp_path / "texts.npz", text=np.array(TEXTS), labels=np.array(LABELS))
    paths = {
        "parquet": tmp_path / "texts.parquet",
        "jsonl": write_lines(tmp_path / "texts.jsonl", rows),
        "npz": tmp_path / "texts.npz",
        "saved": tmp_path / "saved",
    }
    for name, path in paths.items():
        assert find_format(path) == name
        examples = list(DataSource(path))
        assert [example.content for example in examples] == TEXTS
        assert [example.label for example in examples] == LABELS


def test_plain_text_gives_its_lines_and_skips_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([TEXTS[0], "", "   ", *TEXTS[1:]]) + "\r\n", encoding="utf-8")
    examples = list(DataSource(path))
    assert [example.content for example in examples] == TEXTS
    assert [example.label for example in examples] == [None] * 3
    assert examples[1].origin == f"{path}:4"


def test_images_are_the_same_in_every_format(tmp_path: Path, pixels: list[np.ndarray]) -> None:
    folder = write_images(tmp_path / "images", pixels, LABELS)
    np.savez(tmp_path / "images.npz", images=np.stack(pixels), label=np.array(LABELS))
    files = [f"images/{label}/{number}.png" for number, label in enumerate(LABELS)]
    lines = write_lines(tmp_path / "i.jsonl", [{"image": f, "label": n} for f, n in zip(files, LABELS, strict=True)])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"image": Image.fromarray(image), "label": label} for image, label in zip(pixels, LABELS, strict=True)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "i.parquet")
    for path in (tmp_path / "images.npz", lines, tmp_path / "saved", tmp_path / "i.parquet"):
        examples = list(DataSource(path))
        assert [example.label for example in examples] == LABELS
        assert all(np.array_equal(e.content, image) for e, image in zip(examples, pixels, strict=True))  # type: ignore[arg-type]
    by_class = list(DataSource(folder))  # in the order of the folders
    assert [example.label for example in by_class] == ["0", "1", "2"]
    for example in by_class:
        assert np.array_equal(example.content, pixels[LABELS.index(class_number(example, ["x", "y", "z"]))])  # type: ignore[arg-type]


def test_grey_images_get_three_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", image=np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "flat" / "grey.png")
    for example in (*DataSource(tmp_path / "grey.npz"), *DataSource(tmp_path / "flat")):
        assert isinstance(example.content, np.ndarray)
        assert example.content.shape == (3, 4, 3)
        assert (example.content == example.content[..., :1]).all()
        assert example.label is None


def test_an_archive_may_hold_the_inputs_of_a_network(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(6).reshape(2, 3), attention_mask=np.ones((2, 3)), label=[1, 0])
    first, second = DataSource(tmp_path / "ids.npz")
    assert isinstance(first.content, dict)
    assert sorted(first.content) == ["attention_mask", "input_ids"]
    assert first.content["input_ids"].tolist() == [0, 1, 2]
    assert second.label == 0


def test_a_record_keeps_what_else_stands_in_it(tmp_path: Path) -> None:
    rows = [{"text": "why?", "choices": ["a", "b"], "answer": 1}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for path in (write_lines(tmp_path / "x.jsonl", list(rows)), tmp_path / "saved", tmp_path / "x.parquet"):
        (example,) = DataSource(path)
        assert dict(example.record) == rows[0]
        assert example.label is None


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"question": "why?", "answer": "because"}])
    (example,) = DataSource(path, fields=Fields(text="question", label="answer"))
    assert (example.content, example.label) == ("why?", "because")


def lines_of(*rows: object) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "x.jsonl", list(rows))


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return folder / name

    return write


def arrays(**named: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", **named)  # type: ignore[arg-type]
        return folder / "x.npz"

    return write


def columns(table: dict[str, list[object]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        datasets.Dataset.from_dict(table).to_parquet(folder / "x.parquet")
        return folder / "x.parquet"

    return write


def image_tree(*names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name in names:
            place = folder / "tree" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(place)
        return folder / "tree"

    return write


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(name, data)
        return folder / "x.npz"

    return write


def image_of(width: int, height: int) -> Callable[[Path], Path]:
    """A picture of one colour: kilobytes for millions of pixels."""

    def write(folder: Path) -> Path:
        (folder / "tree").mkdir()
        Image.new("1", (width, height)).save(folder / "tree" / "a.png")
        return folder / "tree" / "a.png"

    return write


def several(folder: Path) -> Path:
    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(folder / "several"))
    return folder / "several"


REFUSED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("hub name", lambda folder: Path("stanfordnlp/imdb"), r"imdb does not exist; data are read from local files"),
    ("suffix", raw("x.csv", b"a,b"), r"x.csv: not a known format of data; use .jsonl, .ndjson"),
    ("empty", raw("x.jsonl", b"\n \n"), r"x.jsonl: no examples; give data"),
    ("empty folder", lambda folder: folder, r": no examples; give data"),
    ("not JSON", raw("x.jsonl", b'{"text": "a"}\n{"text": \n'), r"x.jsonl:2: not JSON"),
    ("no object", lines_of(["a"]), r"x.jsonl:1: not a JSON object"),
    ("not UTF-8", raw("x.txt", b"ok\n\xff\xfe\n"), r"x.txt:2: not UTF-8"),
    ("missing field", lines_of({"text": "a"}, {"body": "b"}), r"x.jsonl:2: no field 'text' or 'image'; it has 'body'"),
    ("empty text", lines_of({"text": " "}), r"x.jsonl:1: the text is empty"),
    ("text of numbers", lines_of({"text": 5}), r"x.jsonl:1: 'text' is int, not a string"),
    ("label of a list", lines_of({"text": "a", "label": [1]}), r"x.jsonl:1: the label is \[1\]; a label is"),
    ("label of truth", lines_of({"text": "a", "label": True}), r"x.jsonl:1: the label is True"),
    ("no such image", lines_of({"image": "gone.png"}), r"gone.png does not exist"),
    ("no image", raw("tree/a.png", b"\x89PNG nonsense"), r"a.png: not a readable image"),
    ("cut image", raw("tree/a.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF"), r"a.jpg: not a readable image"),
    ("some without class", image_tree("a.png", "cats/b.png"), r"a.png lies beside folders of images"),
    ("no archive", raw("x.npz", b"PK nonsense"), r"x.npz: not a readable archive"),
    ("objects", arrays(text=np.array([None, 1], dtype=object)), r"x.npz: not a readable archive"),
    ("lengths", arrays(text=np.array(["a"]), label=np.arange(2)), r"x.npz: arrays of different lengths"),
    ("a scalar", arrays(text=np.array("a")), r"x.npz: arrays of different lengths"),
    ("only labels", arrays(label=np.arange(2)), r"x.npz: no array 'text', 'image' or of network inputs"),
    ("image of floats", arrays(image=np.zeros((1, 2, 2))), r"x.npz\[0\]: an image of float64 \[2, 2\]; it must be"),
    ("label of fractions", arrays(text=np.array(["a"]), label=np.array([0.5])), r"x.npz\[0\]: the label is 0.5"),
    ("no parquet", raw("x.parquet", b"PAR1 nonsense"), r"x.parquet: not a readable parquet file"),
    ("parquet of numbers", columns({"text": [5]}), r"x.parquet\[0\]: 'text' is int; it must be text or an image"),
    ("parquet of other bytes", columns({"image": [{"bytes": b"x"}]}), r"x.parquet\[0\]: not a readable image"),
    ("several sets", several, r"several holds several data sets; give one of them: .*several/test, .*several/train"),
    ("half a character", raw("x.jsonl", b'{"text": "\\ud800"}'), r"x.jsonl:1: the text holds half a character"),
    ("nested without end", raw("x.jsonl", b'{"text": ' + b"[" * 100_000), r"x.jsonl:1: not JSON"),
    ("endless number", raw("x.jsonl", b'{"label": 1' + b"0" * 10_000 + b"}"), r"x.jsonl:1: not JSON"),
    (
        "labels of arrays",
        arrays(text=np.array(["a"]), label=np.ones((1, 2))),
        r"x.npz\[0\]: the label is an array \[2\]",
    ),
    ("an array alone", raw("x.npz", npy_bytes(np.ones(3))), r"x.npz: not a readable archive"),
    ("no arrays inside", zipped("notes.txt", b"text"), r"x.npz: arrays of different lengths"),
    ("a bomb of zeros", zipped("text.npy", bytes(300_000_000)), r"x.npz: unpacks to 300,000,000 bytes"),
    ("a large picture", image_of(8_000, 8_000), r"a.png: an image of 8000 x 8000 pixels; give one of at most 40"),
    (
        "a document",
        raw("tree/a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"),
        r"a.png: not a readable image",
    ),
    ("broken set", raw("set/state.json", b"{}"), r"set: not readable as a data set"),
]


@pytest.mark.parametrize(("write", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refuses_in_one_line(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    path = write(tmp_path)
    path = path.parent if path.parent.name in ("tree", "set") else path
    with pytest.raises(BadInput, match=message) as caught:
        list(DataSource(path))
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    path = raw("x.txt", b"short\n" + b"x" * 1000 + b"\n")(tmp_path)
    assert len(list(DataSource(path))) == 2
    path = raw("x.txt", b"short\n" + b"x" * 1001 + b"\n")(tmp_path)
    with pytest.raises(BadInput, match=r"x.txt:2: a line of more than 1,000 bytes"):
        list(DataSource(path))


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "a.png"])
def test_whatever_is_damaged_is_refused_or_read_and_never_an_internal_error(name: str, tmp_path: Path) -> None:
    """Bytes are flipped, cut out and doubled: 150 files of each format."""
    if name == "x.npz":
        whole = arrays(text=np.array(TEXTS), label=np.array(LABELS))(tmp_path).read_bytes()
    elif name == "x.parquet":
        whole = columns({"text": list(TEXTS), "label": list(LABELS)})(tmp_path).read_bytes()
    else:
        whole = image_tree("a.png")(tmp_path).joinpath("a.png").read_bytes()
    chance = random.Random(0)
    path = tmp_path / "tree" / name if name == "a.png" else tmp_path / name
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place, length = chance.randrange(len(data)), chance.randint(1, 20)
            data[place : place + length] = chance.choice(
                (chance.randbytes(length), b"", data[place : place + length] * 2)
            )
        path.write_bytes(data)
        try:
            list(DataSource(path.parent if name == "a.png" else path))
        except BadInput:
            refused += 1
    assert refused > 75, "the damage did not show"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_does_not_fit_the_path_is_refused(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "x.bin", [{"wrong": 1}])
    if name == "text":  # any line is an example: the control
        assert len(list(DataSource(path, format="text"))) == 1
        return
    with pytest.raises(BadInput):
        list(DataSource(path, format=name))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"x:1: label 3 is out of range; the network has classes 0 to 2"),
        (-1, r"label -1 is out of range"),
        ("7", r"label 7 is out of range"),
        ("horse", r"'horse' is none of the network's classes \(cat, dog, 2\)"),
        (None, r"x:1: no label"),
    ],
)
def test_labels_out_of_range_are_refused(label: int | str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        class_number(Example("text", label, "x:1"), ["cat", "dog", "2"])


def test_labels_are_names_before_they_are_numbers() -> None:
    names = ["cat", "dog", "0"]
    assert [class_number(Example("text", label, "x:1"), names) for label in ("dog", "0", "1", 0)] == [1, 2, 1, 0]


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw("set/state.json", b"{}")(tmp_path).parent
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="datasets is not installed; pip install datasets"):
        list(DataSource(path))
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UsageError, match="Pillow is not installed"):
        list(DataSource(image_tree_without_pillow(tmp_path)))


def image_tree_without_pillow(folder: Path) -> Path:
    return raw("tree/a.png", b"")(folder).parent
